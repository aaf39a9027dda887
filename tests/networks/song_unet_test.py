"""SongUNet against the outputs of the released networks, and against its own definitions."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.networks.denoiser import ENCODED, INNERMOST, Denoiser
from diffusion_distillation.networks.edm_blocks import resample
from diffusion_distillation.networks.song_unet import SCALE, SongUNet, random_frequencies
from tests import edm_cases

NETWORK = SongUNet(
  out_ch=3, ch=8, emb_ch=16, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), dropout=0.5
)
SHAPE = (8, 8, 3)


@pytest.mark.parametrize(
  'name',
  [
    pytest.param('edm_ddpmpp_uncond', marks=pytest.mark.slow),  # as the next, with less in it
    *('edm_ddpmpp_cond_aug', 'vp_ddpmpp_uncond', 've_ncsnpp_cond', 'edm_skip_aug'),
  ],
)
def test_recorded_outputs(name, tmp_path):
  edm_cases.check(edm_cases.Case(name), tmp_path)


@pytest.mark.parametrize('taps', [(1, 1), (1, 3, 3, 1), (1, 2, 3, 5)])
def test_resampling_is_the_filter_between_zeros(taps):
  """Down: every other pixel of the convolution; up: the convolution of pixels with zeros between, times 4."""
  rng = np.random.default_rng(0)
  h = rng.normal(size=(2, 6, 4, 3)).astype(np.float32)
  row = np.array(taps) / sum(taps)
  margin = (len(taps) - 1) // 2

  def filtered(axis, values, kernel):
    return np.apply_along_axis(lambda line: np.convolve(line, kernel), axis, values)

  wide = filtered(2, filtered(1, np.float64(h), row[::-1]), row[::-1])  # correlation, as torch has it
  start = len(taps) - 1 - margin
  down = wide[:, start::2, start::2][:, :3, :2]
  np.testing.assert_allclose(resample(jnp.array(h), 'down', taps), down, atol=1e-6)
  spread = np.zeros((2, 11, 7, 3))
  spread[:, ::2, ::2] = h
  up = 4 * filtered(2, filtered(1, spread, row), row)[:, margin:, margin:][:, :12, :8]
  np.testing.assert_allclose(resample(jnp.array(h), 'up', taps), up, atol=1e-6)


@pytest.mark.slow
def test_it_is_a_network_with_gradients_dropout_and_a_bottleneck():
  network = dataclasses.replace(NETWORK, ch_mult=(1,), num_classes=3, attn_resolutions=())
  denoise, rng = Denoiser(network, 'edm'), np.random.default_rng(0)
  abstract = jax.eval_shape(lambda rng: denoise.init(rng, SHAPE), jax.random.key(0))
  params = jax.tree.map(lambda leaf: np.float32(0.3 * rng.normal(size=leaf.shape)), abstract)
  args = (np.ones((2, *SHAPE), np.float32), np.zeros(2, np.float32), {'label': np.array([0, -1])})

  def loss(params, rng):
    return jnp.sum(jnp.square(denoise(params, *args, rng).x))

  call = jax.jit(jax.value_and_grad(loss))
  value, gradient = call(params, jax.random.key(1))
  other, _ = call(params, jax.random.key(2))
  assert np.isfinite(value) and abs(value - other) > 1e-3 * abs(value)
  flat = jax.tree_util.tree_leaves_with_path(gradient)
  assert [path for path, leaf in flat if not np.abs(leaf).max() > 0] == []
  assert [Denoiser(NETWORK, 'v').bottleneck_shape(SHAPE, at)[-1] for at in (ENCODED, INNERMOST)] == [
    16,
    16,
  ]


def test_random_frequencies_are_the_same_at_each_call_and_not_trained():
  assert random_frequencies(5)[:3] == random_frequencies(3) and len(random_frequencies(5)) == 5
  assert np.std(random_frequencies(4000)) == pytest.approx(SCALE, rel=0.05)
  network = dataclasses.replace(NETWORK, embedding='fourier', frequencies=(1.0, 2.0, 3.0))
  params = jax.eval_shape(lambda rng: Denoiser(network, 'v').init(rng, SHAPE), jax.random.key(0))
  assert params['map_layer0']['kernel'].shape == (6, 16)
  assert not [name for name in params if 'noise' in name or 'freq' in name]


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_way_it_is_computed_changes_no_parameter(dtype):
  """remat and dtype are arguments of the computation alone; what is returned is float32."""
  network = dataclasses.replace(NETWORK, remat=True, dtype=dtype, decoder='skip', encoder='skip')
  ours, plain = (
    jax.eval_shape(lambda rng, n=n: Denoiser(n, 'v').init(rng, SHAPE), jax.random.key(0))
    for n in (network, dataclasses.replace(network, remat=False, dtype='float32'))
  )
  assert ours == plain
  z = jax.ShapeDtypeStruct((1, *SHAPE), jnp.float32)
  found = jax.eval_shape(lambda p, z: nn.Module.apply(network, {'params': p}, z, jnp.zeros(1)), plain, z)
  assert found.dtype == jnp.float32 and found.shape == (1, *SHAPE)


MISFITS = {
  'sides': ({'ch_mult': (1, 1, 1, 1, 1)}, 'sides are divisible by 16'),
  'groups': ({'ch': 130}, 'a width of 130 channels'),
  'few channels': ({'ch': 2}, 'ch=2 must be even and at least 4'),
  'odd filter': ({'resample_filter': (1, 2, 1)}, 'an even number of taps'),
  'filter without sum': ({'resample_filter': (1, -1)}, 'sum other than 0'),
  'embedding': ({'embedding': 'sines'}, "embedding='sines' is not one of"),
  'encoder': ({'encoder': 'none'}, 'encoder'),
  'decoder': ({'decoder': 'residual'}, 'decoder'),
  'preconditioning': ({'preconditioning': 'iddpm'}, 'preconditioning'),
  'attention': ({'attention': 'flash'}, 'attention'),
  'dtype': ({'dtype': 'float16'}, 'dtype'),
  'betas': ({'preconditioning': 'vp', 'beta_min': 0.0}, 'beta_min=0.0 must be positive'),
}


@pytest.mark.parametrize('case', MISFITS)
def test_what_does_not_fit_is_named(case):
  change, message = MISFITS[case]
  NETWORK.check(SHAPE)
  with pytest.raises(ValueError, match='(?s).*'.join(message.split('...'))):
    dataclasses.replace(NETWORK, **change).check(SHAPE)
