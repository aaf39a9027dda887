"""One of several processes, as tests start them: some updates of each method, by a network that compiles in a second.

python -m tests.peer OUT FSDP METHODS [COORDINATOR NUM_PROCESSES PROCESS_ID]
"""

import dataclasses
import json
import pathlib
import sys
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distillation.diffusion import process
from diffusion_distillation.networks.denoiser import Denoiser
from diffusion_distillation.system import checkpoints, cluster, files, sharding
from diffusion_distillation.training import step as update
from tests import tiny

METHODS = ('progressive', 'knowledge', 'consistency', 'dmd', 'dmd2')
SMALL = {
  'train__batch_size': 16,
  'distill__start_steps': 2,
  'pairs__num_pairs': 32,
  'pairs__num_steps': 2,
  **{f'{name}__batch_size': 16 for name in (*METHODS[1:], 'distill', 'pairs')},
  **{f'{name}__num_updates': 10 for name in METHODS[1:]},
  **{f'{name}__warmup': 0 for name in ('train', *METHODS[1:])},
}


class Network(nn.Module):
  """Three convolutions; methods don't know the difference."""

  @nn.compact
  def __call__(self, z, logsnr):
    time = jnp.stack([jnp.sin(logsnr / 4), jnp.cos(logsnr / 4)], axis=-1)
    h = nn.Conv(8, (3, 3), name='conv0')(z) + nn.Dense(8, name='time')(time)[:, None, None, :]
    h = nn.swish(nn.Conv(8, (3, 3), strides=2, name='conv1')(nn.swish(h)))
    up = jnp.repeat(jnp.repeat(h, 2, axis=1), 2, axis=2)
    return nn.Conv(z.shape[-1], (3, 3), name='conv2')(up), h


@dataclasses.dataclass(frozen=True)
class Small:
  """A denoiser over it."""

  conditioning: ClassVar[dict] = {}

  def without_dropout(self):
    return self

  def init(self, rng, shape):
    return Network().init(rng, jnp.zeros((1, *shape)), jnp.zeros(1))['params']

  def __call__(self, params, z, logsnr, cond, rng=None):
    return process.OUTPUTS['v'](z, logsnr, Network().apply({'params': params}, z, logsnr)[0])

  def bottleneck(self, params, z, logsnr, cond, place='h'):
    return Network().apply({'params': params}, z, logsnr)[1]


def stages_of(methods):
  """The stages of these methods, 'base' among them if it is named, and the images."""
  planned, images = tiny.plan(methods=tuple(name for name in METHODS if name in methods), **SMALL)
  wanted = [stage for stage in planned if stage.parent or 'base' in methods]
  small = [stage.recipe.map_networks(_small) for stage in wanted]
  return [
    dataclasses.replace(stage, recipe=recipe, teacher=stage.teacher and Small())
    for stage, recipe in zip(wanted, small, strict=True)
  ], images


def _small(network):
  return Small() if isinstance(network, Denoiser) else network


def params_of(stage):
  """The parameters that a stage starts from, and that its teacher has, on the host."""
  params = sharding.to_host(stage.init_params(jax.random.key(0)))
  return params, params if stage.parent else None


def batch_of(stage, images, k):
  """This process's part of batch k of a stage."""
  rng, size = np.random.default_rng(k), stage.batch_size
  image = images.images.batch(np.arange(k * size, (k + 1) * size))['image']
  noise = rng.normal(size=(2, *image.shape)).astype(np.float32)
  pairs = {'noise': noise[0], 'image': np.tanh(noise[1]), 'cond': None}
  index, count = sharding.part()
  needs = stage.recipe.method.needs
  whole = {'cond': None} | ({'image': image} if 'images' in needs else {})
  whole |= {'pairs': pairs} if 'pairs' in needs else {}
  return jax.tree.map(lambda a: np.split(a, count)[index], whole)


def train(stage, images, updates=2):
  """The state after some updates, and what each reported."""
  params, teacher = params_of(stage)
  state = sharding.create(stage.recipe.create_state, params)
  frozen = sharding.place(stage.frozen(teacher, None))
  step, told = sharding.compile_step(update.train_steps), []
  for k in range(updates):
    batch = sharding.put(batch_of(stage, images, k))
    last = stage.recipe.at(stage.recipe.method.period - 1)  # every network has its turn
    state, metrics = step(last, state, frozen, batch)
    told.append({name: float(value) for name, value in metrics.items()})
  assert step._cache_size() == 1, 'compiled more than once'
  return state, told


def main(out, fsdp, methods, *of_cluster):
  if of_cluster:
    cluster.start(of_cluster[0], int(of_cluster[1]), int(of_cluster[2]), 60)
  with sharding.laid_out(fsdp=int(fsdp)):
    work(out, methods)


def work(out, methods):
  """Trains, saves and restores; writes what it found."""
  stages, images = stages_of(methods.split(','))
  index, count = sharding.part()
  assert cluster.from_first({'of': [index, 'é']}) == {'of': [0, 'é']}
  assert cluster.agree(True) and cluster.agree(index == 0) == (count == 1)
  assert files.writes() == (index == 0)
  found = {}
  for stage in stages:
    state, told = train(stage, images)
    found[stage.name] = {'told': told, 'digest': checkpoints.digest(state)}
  kept = checkpoints.Checkpoints(pathlib.Path(out))
  kept.stage_dir.mkdir(exist_ok=True)
  kept.save(2, state, 0.0)
  kept.wait()
  again, _ = kept.restore(jax.tree.map(jax.typeof, state), set_aside=False)
  found['restored'] = checkpoints.digest(again)
  kept.close()
  if sharding.part()[0] == 0:
    (kept.stage_dir / 'found.json').write_text(json.dumps(found))


if __name__ == '__main__':
  main(*sys.argv[1:])
