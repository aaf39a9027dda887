"""Checks that both sides of `rival.py` do the same work, by running PyTorch's network with our parameters."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks import cases, rival_torch, rival_torch_work, workloads
from diffusion_distillation.diffusion import samplers, times
from diffusion_distillation.networks import conditioning
from diffusion_distillation.networks.denoiser import Bound

BATCH = 4
STEPS = 4  # with many steps, the target of a round is a small difference of large numbers


def errors(network: str, works: list[str]) -> dict[str, float]:
  """Largest differences relative to the largest value: of the networks' outputs, and of the results of each kind of work.

  Args:
    network: a name in `cases.NETWORKS`; both sides compute in float32, PyTorch on the CPU.
    works: names in `rival.WORKS`; their results are losses of base training and of a round, and images.
  """
  rival_torch.compute_exactly()
  with jax.default_matmul_precision('highest'):
    both = {'output': output, 'base': base, 'round': one_round, 'sampling': sampling}
    return {name: both[name](Sides(network, name)) for name in ('output', *works)}


class Sides:
  """Both networks with the same parameters, and the inputs of both sides."""

  def __init__(self, network: str, work: str) -> None:
    case = cases.Case(network, 'base' if work == 'output' else work, calls=STEPS)
    self.stage = case.stage()
    spec = rival_torch_work.Spec(**{**workloads.describe(case), 'num_steps': STEPS})
    self.params = workloads.random_params(self.stage.abstract_params)
    self.net = rival_torch_work.build(spec, 'cpu').eval()
    rival_torch.load(self.net, self.params)
    self.diffusion = rival_torch_work.Diffusion(spec)
    self.ours = Bound(self.stage.denoise, self.params)
    rng = np.random.default_rng(1)
    shape = (BATCH, *self.stage.recipe.shape[1:])
    self.x = rng.uniform(-1.0, 1.0, shape).astype(np.float32)
    self.eps = rng.standard_normal(shape, np.float32)
    self.t = np.linspace(0.2, 0.9, BATCH, dtype=np.float32)
    self.i = np.arange(BATCH, dtype=np.int32) % STEPS + 1
    self.label = np.zeros(BATCH, np.int32) if spec.network['num_classes'] else None
    conditions = self.stage.denoise.conditioning
    self.cond = conditioning.zeros(conditions, BATCH)

  def torch(self, *names: str) -> list[Any]:
    """The inputs as tensors of PyTorch."""
    return [rival_torch.from_numpy(getattr(self, name)) for name in names]


def _error(ours: Callable[[], Any], theirs: Any) -> float:
  found, expected = rival_torch.to_numpy(theirs), np.asarray(jax.jit(ours)())
  assert found.shape == expected.shape, (found.shape, expected.shape)
  return float(np.abs(found - expected).max() / np.abs(expected).max())


def output(sides: Sides) -> float:
  """The outputs of the networks."""
  logsnr = np.array(sides.stage.schedule(sides.t))
  given = (sides.x, logsnr, sides.cond)
  z, label = sides.torch('x', 'label')
  theirs = sides.net(z, rival_torch.from_numpy(logsnr), label)
  network = sides.stage.denoise.network
  return _error(lambda: network.apply({'params': sides.params}, *given), theirs)


def base(sides: Sides) -> float:
  """Losses of base training."""
  method = sides.stage.recipe.method
  batch = {'x': sides.x, 'eps': sides.eps, 't': sides.t, 'cond': sides.cond}
  theirs = sides.diffusion.base_losses(sides.net, *sides.torch('x', 'eps', 't', 'label'))
  return _error(lambda: method.losses(sides.ours, batch), theirs)


def one_round(sides: Sides) -> float:
  """Losses of a round of progressive distillation, where the student is its own teacher."""
  method = dataclasses.replace(sides.stage.recipe.method, num_steps=STEPS)
  batch = {'x': sides.x, 'eps': sides.eps, 'i': sides.i, 'cond': sides.cond}
  given = sides.torch('x', 'eps', 'i', 'label')
  theirs = sides.diffusion.round_losses(sides.net, sides.net, *given)
  nets = {'student': sides.ours, 'teacher': sides.ours}
  return _error(lambda: method.losses(nets, batch), theirs)


def sampling(sides: Sides) -> float:
  """Samples of DDIM from the same noise."""
  denoise = samplers.clipped(lambda *args: sides.ours(*args, sides.cond), sides.stage.space.clip)
  keys = jax.random.split(jax.random.key(0), BATCH)
  given = (sides.stage.schedule, times.uniform(STEPS), sides.eps, keys)
  noise, label = sides.torch('eps', 'label')
  theirs = sides.diffusion.sample(sides.net, noise, label)
  return _error(lambda: samplers.sample(samplers.DDIM(), denoise, *given), theirs)
