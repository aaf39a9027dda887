"""The U-Net of the papers as a UNet2DModel: at the sampling steps it is the same function, and the noise is the same."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.diffusion import schedules, times
from diffusion_distillation.diffusion.discrete import Discrete
from diffusion_distillation.errors import UserError
from diffusion_distillation.interop import diffusers, diffusers_unet, exporting
from diffusion_distillation.networks.unet import UNet
from diffusion_distillation.stages import model
from tests.stages.model_test import stored

SHAPE = (8, 8, 1)


def network(**changes):
  given = {'out_ch': 1, 'ch': 8, 'emb_ch': 12, 'ch_mult': (1, 2), 'num_res_blocks': 1, 'num_groups': 4}
  return UNet(**given | {'attn_resolutions': (4,)} | changes)


CASES = {
  'classes': (
    {'num_classes': 3, 'num_heads': 2, 'attn_resolutions': ()},
    schedules.Cosine(),
    times.uniform(3),
  ),
  'convolutions': (
    {'resblock_resample': False, 'head_dim': 4, 'attn_resolutions': (8, 4), 'time_input': 'c_noise'},
    schedules.Karras(),
    times.karras(2, schedules.Karras()),
  ),
  'discrete': (
    {'time_input': 't', 'schedule': Discrete(zero_snr=True)},
    Discrete(zero_snr=True),
    times.uniform(4),
  ),
}


@pytest.mark.parametrize(
  'case', ['classes', *(pytest.param(c, marks=pytest.mark.slow) for c in ('convolutions', 'discrete'))]
)
def test_the_network_is_the_same_function_at_the_sampling_steps(case):
  changes, schedule, grid = CASES[case]
  net = network(**changes)
  params = stored(net).params
  assert not diffusers_unet.problems(net, SHAPE)
  theirs = diffusers_unet.express(net, params, schedule, grid, SHAPE)
  theirs.network.check(SHAPE)
  count = len(grid) - 1
  z = jax.random.normal(jax.random.key(1), (count, *SHAPE))
  cond = {'label': jnp.arange(count) % 3} if net.num_classes else None
  expected = jax.jit(net.apply)({'params': params}, z, schedule(jnp.asarray(grid[1:])), cond)
  logsnr = theirs.schedule(jnp.asarray(times.uniform(count)[1:]))
  found = jax.jit(theirs.network.apply)({'params': theirs.params}, z, logsnr, cond)
  np.testing.assert_allclose(found, expected, atol=1e-5 * float(jnp.abs(expected).max()))


@pytest.mark.parametrize(
  ('schedule', 'name', 'steps'),
  [
    (schedules.Cosine(), 'uniform', 1),
    (schedules.Cosine(), 'quadratic', 8),
    (schedules.Cosine(), 'uniform', 128),
    (schedules.ShiftedCosine(256), 'uniform', 7),
    (schedules.LinearBeta(), 'uniform', 4),
    (schedules.Karras(), 'karras', 18),
  ],
)
def test_float32_betas_have_the_noise_of_the_sampling_steps(schedule, name, steps):
  grid = times.make_grid(name, steps, schedule)
  discrete, _ = diffusers_unet._discretized(schedule, grid)
  count = discrete.num_timesteps
  assert count % steps == 0 and (1000 <= count < 1000 + steps or (name, count) == ('karras', steps))
  betas = np.array(discrete.trained_betas, np.float32)
  held = np.cumprod(np.float32(1.0) - betas, dtype=np.float64).astype(np.float32)  # as in diffusers
  found = np.float64(held[count // steps - 1 :: count // steps])
  wanted = 1.0 / (1.0 + np.exp(-np.asarray(schedule(jnp.asarray(grid[1:])), np.float64)))
  np.testing.assert_allclose(
    np.sqrt(found), np.sqrt(wanted), rtol=0.0, atol=4e-8
  )  # half a unit of float32 alpha^2
  np.testing.assert_allclose(np.sqrt(1.0 - found), np.sqrt(1.0 - wanted), rtol=0.0, atol=1e-5)


def export(tmp_path, net, output='v', **changes):
  of = stored(net, output=output)
  model.write(tmp_path / 'model', dataclasses.replace(of, **changes))
  exporting.export(tmp_path / 'model', None, tmp_path / 'out', 'diffusers')
  return tmp_path / 'out'


def test_every_part_that_diffusers_lacks_is_named_in_one_line(tmp_path):
  net = network(out_ch=2, ch_mult=(2, 4), num_heads=2, attn_resolutions=(8,))
  with pytest.raises(UserError) as caught:
    export(tmp_path, net, 'both', sampler='ancestral', num_steps=2)
  message = str(caught.value)
  assert message.startswith('--format=diffusers: ch_mult=(2, 4)') and '\n' not in message
  for part in ('num_heads=2', 'a network that predicts both', 'the sampler Ancestral is not DDIM'):
    assert part in message
  with pytest.raises(UserError, match=re.escape('misses the noise level of step 1 of 4000 by')):
    export(tmp_path, network(), num_steps=4000)
  assert [path.name for path in tmp_path.iterdir()] == ['model']


@pytest.mark.slow
def test_a_class_conditional_student_becomes_a_pipeline_with_its_images(tmp_path):
  out = export(tmp_path, network(num_classes=3), num_steps=4, clip_x=True)
  config = json.loads((out / 'unet' / 'config.json').read_text())
  assert config['time_embedding_type'] == 'learned' and config['num_train_timesteps'] == 1000
  scheduler = json.loads((out / 'scheduler' / 'scheduler_config.json').read_text())
  assert scheduler['timestep_spacing'] == 'trailing' and len(scheduler['trained_betas']) == 1000
  found = diffusers.read(out, 4)
  assert found.denoise.conditioning['label'].count == 3 and found.denoise.output == 'v'
