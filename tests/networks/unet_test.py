"""The network: its parameter tree, its embedding of time, and what its output may depend on."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from diffusion_distillation.diffusion.process import OUTPUTS, edm_input, output_channels
from diffusion_distillation.diffusion.schedules import Cosine, Karras, LinearBeta, ShiftedCosine
from diffusion_distillation.networks.denoiser import Denoiser
from diffusion_distillation.networks.unet import TIME_INPUTS, UNet, time_embedding
from tests.exact import scales

UNCONDITIONAL = UNet(
  out_ch=2, ch=8, emb_ch=12, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(4,), num_groups=4
)
NETWORK = dataclasses.replace(UNCONDITIONAL, num_classes=3, dropout=0.5)
SMALL = dataclasses.replace(NETWORK, out_ch=1, ch_mult=(1,), attn_resolutions=())
SHAPE = (8, 8, 1)
KEY = jax.random.key(0)

# The network above on 8x8 images: level 0 has 8 channels, level 1 has 16, 4x4 pixels and attention.
RES = {'norm1', 'conv1', 'temb_proj', 'norm2', 'conv2'}
RES_TO_OTHER_WIDTH = {*RES, 'nin_shortcut'}
ATTN = {'norm', 'q', 'k', 'v', 'proj_out'}
DENSE = CONV = {'kernel', 'bias'}
TREE = {
  'dense0': DENSE,
  'dense1': DENSE,
  'class_emb': DENSE,
  'conv_in': CONV,
  'down_0.block_0': RES,
  'down_0.downsample': RES,
  'down_1.block_0': RES_TO_OTHER_WIDTH,
  'down_1.attn_0': ATTN,
  'mid.block_1': RES,
  'mid.attn_1': ATTN,
  'mid.block_2': RES,
  'up_1.block_0': RES_TO_OTHER_WIDTH,
  'up_1.attn_0': ATTN,
  'up_1.block_1': RES_TO_OTHER_WIDTH,
  'up_1.attn_1': ATTN,
  'up_1.upsample': RES,
  'up_0.block_0': RES_TO_OTHER_WIDTH,
  'up_0.block_1': RES_TO_OTHER_WIDTH,
  'norm_out': {'scale', 'bias'},
  'conv_out': CONV,
}


def shapes(network):
  """The parameter tree, without computing it."""
  return jax.eval_shape(lambda: Denoiser(network, 'v').init(KEY, SHAPE))


def random_params(tree, seed=0):
  """Parameters of that tree that are nowhere zero."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: jnp.float32(0.3 * rng.normal(size=leaf.shape)), tree)


@pytest.fixture(scope='module')
def params():
  return random_params(shapes(NETWORK))


@pytest.fixture(scope='module')
def inputs():
  z = jax.random.normal(KEY, (3, *SHAPE))
  return z, jnp.array([-3.0, 0.5, 4.0]), {'label': jnp.array([0, 2, 1])}


@pytest.fixture(scope='module')
def apply():
  """(params, z, logsnr, cond) to the network's output, compiled."""
  return jax.jit(lambda params, *args: NETWORK.apply({'params': params}, *args))


def test_modules_have_the_names_of_the_released_checkpoints():
  assert {name: set(module) for name, module in shapes(NETWORK).items()} == TREE


def test_an_unconditional_network_has_no_class_embedding():
  assert set(shapes(UNCONDITIONAL)) == set(TREE) - {'class_emb'}


def test_convolutions_beside_the_blocks_resample_under_the_same_names():
  tree = shapes(dataclasses.replace(NETWORK, resblock_resample=False))
  assert set(tree) == set(TREE)
  assert tree['down_0.downsample']['kernel'].shape == (3, 3, 8, 8)
  assert tree['up_1.upsample']['kernel'].shape == (3, 3, 16, 16)


def test_parameters_have_the_shapes_of_the_released_checkpoints():
  flat = traverse_util.flatten_dict(shapes(NETWORK), sep='/')
  expected = {
    'dense0/kernel': (8, 12),
    'dense1/kernel': (12, 12),
    'class_emb/kernel': (3, 12),
    'conv_in/kernel': (3, 3, 1, 8),
    'down_1.block_0/conv1/kernel': (3, 3, 8, 16),
    'down_1.block_0/temb_proj/kernel': (12, 32),
    'down_1.block_0/nin_shortcut/kernel': (8, 16),
    'down_1.attn_0/q/kernel': (16, 1, 16),
    'down_1.attn_0/q/bias': (1, 16),
    'down_1.attn_0/proj_out/kernel': (1, 16, 16),
    'up_1.block_0/norm1/scale': (16 + 16,),
    'up_1.block_1/norm1/scale': (16 + 8,),
    'up_0.block_0/norm1/scale': (16 + 8,),
    'up_0.block_1/norm1/scale': (8 + 8,),
    'conv_out/kernel': (3, 3, 8, 2),
  }
  assert {name: flat[name].shape for name in expected} == expected


@pytest.mark.parametrize(('heads', 'features'), [({'num_heads': 8}, (8, 2)), ({'head_dim': 8}, (2, 8))])
def test_attention_heads_are_set_by_number_or_by_size(heads, features):
  attn = shapes(dataclasses.replace(NETWORK, **heads))['mid.attn_1']
  assert attn['q']['kernel'].shape == (16, *features)
  assert attn['proj_out']['kernel'].shape == (*features, 16)


def test_a_new_network_says_zero_and_its_blocks_change_nothing(apply, params, inputs):
  zero_at_init = {('conv_out',)} | {
    (module, 'conv2' if 'conv2' in layers else 'proj_out')
    for module, layers in TREE.items()
    if 'block' in module or 'attn' in module or 'sample' in module
  }

  @jax.jit
  def new():
    flat = traverse_util.flatten_dict(Denoiser(NETWORK, 'v').init(KEY, SHAPE))
    return {path: leaf for path, leaf in flat.items() if path[:-1] in zero_at_init}

  last = new()
  assert {path[:-1] for path in last} == zero_at_init
  for leaf in last.values():
    np.testing.assert_array_equal(leaf, 0.0)
  conv_out = {name: last['conv_out', name] for name in CONV}
  np.testing.assert_array_equal(apply(params | {'conv_out': conv_out}, *inputs), 0.0)


def test_output_has_the_shape_of_the_image_and_its_own_channels(apply, params, inputs):
  output = apply(params, *inputs)
  assert output.shape == (3, 8, 8, 2)
  assert output.dtype == jnp.float32
  assert (jnp.std(output, (1, 2, 3)) > 0.1).all()


@pytest.mark.parametrize('name', TIME_INPUTS)
def test_time_inputs_are_their_closed_forms(name):
  logsnr = np.array([-30.0, -20.0, -10.0, -3.0, 0.0, 1.7, 10.0, 20.0, 30.0])
  softplus = np.log1p(np.exp(-logsnr))
  expected = {
    'inv_cos': np.arctan(np.exp(-np.clip(logsnr, -20, 20) / 2)) * 2 / np.pi,
    'linear': (logsnr + 10) / 20,
    'sigmoid': scales(logsnr)[0] ** 2,
    'c_noise': np.log(scales(logsnr)[1] / scales(logsnr)[0]) / 4 / 1000,
    'edm': np.log(scales(logsnr)[1] / scales(logsnr)[0]) / 4,
    't': (np.sqrt(0.1**2 + 2 * 19.9 * softplus) - 0.1) / 19.9,
  }[name]
  with jax.enable_x64(True):
    got = np.array(TIME_INPUTS[name](jnp.array(logsnr), LinearBeta(logsnr_max=80.0)))
  np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-12)


def test_the_inverse_cosine_input_is_the_time_of_the_unclipped_cosine_schedule():
  t = np.linspace(0.01, 0.99, 9)
  with jax.enable_x64(True):
    got = np.array(TIME_INPUTS['inv_cos'](Cosine(-30.0, 60.0)(jnp.array(t))))
  np.testing.assert_allclose(got, t, atol=1e-6)  # e^-15 of angle is left out at t = 1


@pytest.mark.parametrize('schedule', [Cosine(), ShiftedCosine(32), LinearBeta(), Karras()], ids=str)
def test_the_time_input_t_is_the_inverse_of_the_schedule(schedule, inputs):
  logsnr = jnp.array([-4.0, 0.5, 6.0])
  np.testing.assert_array_equal(TIME_INPUTS['t'](logsnr, schedule), schedule.inverse(logsnr))
  t = np.linspace(0.1, 0.9, 9)
  with jax.enable_x64(True):
    np.testing.assert_allclose(TIME_INPUTS['t'](schedule(jnp.array(t)), schedule), t, rtol=1e-9)
  network = dataclasses.replace(SMALL, time_input='t')
  with pytest.raises(ValueError, match="'t' needs the schedule"):
    jax.eval_shape(lambda: Denoiser(network, 'v').init(KEY, SHAPE))


@pytest.mark.parametrize('dim', [4, 10])
def test_time_embedding_is_sines_then_cosines_of_a_thousandfold_input(dim):
  u = np.array([-0.5, 0.0, 1e-3, 0.3, 1.0, 1.5])
  half = dim // 2
  angles = 1000 * u[:, None] * 10000.0 ** (-np.arange(half) / (half - 1))
  with jax.enable_x64(True):
    got = np.array(time_embedding(jnp.array(u), dim))
  np.testing.assert_allclose(got, np.concatenate([np.sin(angles), np.cos(angles)], 1), atol=1e-9)


@pytest.mark.parametrize(('name', 'factor'), [('c_noise', 1), ('edm', 1000)])
def test_the_angles_of_edm_s_embedding_are_c_noise_times_the_frequencies(name, factor):
  """1, ..., 1e-4, sines first, as in EDM's DDPM++; models that were trained with 1000 times c_noise keep it."""
  sigma = np.geomspace(0.002, 80.0, 7)
  angles = factor * np.log(sigma)[:, None] / 4 * 1e-4 ** (np.arange(8) / 7)
  with jax.enable_x64(True):
    got = np.array(time_embedding(TIME_INPUTS[name](jnp.array(-2 * np.log(sigma))), 16))
  np.testing.assert_allclose(got, np.concatenate([np.sin(angles), np.cos(angles)], 1), atol=1e-9)


def test_the_network_sees_logsnr_by_its_time_input_alone(inputs):
  """Networks that differ in it agree at logsnr of the same input, and nowhere else."""
  z, _, cond = inputs
  params = random_params(shapes(SMALL))
  u = np.array([0.2, 0.6, 0.9])
  same = {
    'inv_cos': -2 * np.log(np.tan(np.pi / 2 * u)),
    'linear': 20 * u - 10,
    'sigmoid': np.log(u / (1 - u)),
    'c_noise': -8000 * u,
    'edm': -8 * u,
    't': np.float64(LinearBeta()(jnp.float32(u))),
  }

  small = dataclasses.replace(SMALL, schedule=LinearBeta())

  @jax.jit
  def outputs(logsnr):
    networks = {name: dataclasses.replace(small, time_input=name) for name in TIME_INPUTS}
    return {n: network.apply({'params': params}, z, logsnr[n], cond) for n, network in networks.items()}

  got = outputs({name: jnp.float32(logsnr) for name, logsnr in same.items()})
  apart = outputs({name: jnp.float32(same['linear']) for name in TIME_INPUTS})
  for name in TIME_INPUTS.keys() - {'linear'}:
    np.testing.assert_allclose(got[name], got['linear'], atol=1e-3)
    assert np.abs(apart[name] - apart['linear']).max(axis=(1, 2, 3)).min() > 0.01


def test_denoiser_reads_the_output_by_its_parameterization(inputs):
  networks = {c: dataclasses.replace(SMALL, out_ch=c) for c in (1, 2)}
  params = {c: random_params(shapes(network)) for c, network in networks.items()}

  needed = {output: output_channels(output, 1) for output in OUTPUTS}
  given = {out: (edm_input(*inputs[:2]), *inputs[1:]) if out == 'edm' else inputs for out in OUTPUTS}

  @jax.jit
  def predictions(params):
    raw = {out: networks[c].apply({'params': params[c]}, *given[out]) for out, c in needed.items()}
    return raw, {out: Denoiser(networks[c], out)(params[c], *inputs) for out, c in needed.items()}

  raw, read = predictions(params)
  for output, prediction in read.items():
    expected = OUTPUTS[output](*inputs[:2], raw[output])
    assert prediction.x.shape == prediction.eps.shape == inputs[0].shape
    np.testing.assert_allclose(prediction.x, expected.x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(prediction.eps, expected.eps, rtol=1e-4, atol=1e-4)
  assert np.abs(raw['edm'] - raw['x']).max() > 0.01  # the same network, which was given something else


def test_denoiser_refuses_a_parameterization_that_does_not_exist():
  with pytest.raises(ValueError, match="'w'"):
    Denoiser(NETWORK, 'w')


def test_there_is_dropout_only_with_a_key(inputs):
  params = random_params(shapes(SMALL))

  @jax.jit
  def outputs(key):
    dropping, never = (Denoiser(n, 'eps') for n in (SMALL, dataclasses.replace(SMALL, dropout=0.0)))
    with_key, without = (dropping(params, *inputs, rng).eps for rng in (key, None))
    return with_key, without, never(params, *inputs).eps

  one, without, never = outputs(jax.random.key(1))
  same, other = (outputs(jax.random.key(seed))[0] for seed in (1, 2))
  np.testing.assert_array_equal(without, never)
  np.testing.assert_array_equal(one, same)
  assert np.abs(one - other).max() > 0.1
  assert np.abs(one - without).max() > 0.1


def test_output_depends_on_label_and_on_time(apply, params, inputs):
  z, logsnr, cond = inputs
  base = apply(params, z, logsnr, cond)
  relabelled = apply(params, z, logsnr, {'label': jnp.array([0, 1, 1])})
  later = apply(params, z, logsnr - jnp.array([0.0, 1.0, 0.0]), cond)
  for changed in (relabelled, later):
    np.testing.assert_array_equal(changed[::2], base[::2])
    assert np.abs(changed[1] - base[1]).max() > 0.01


def test_a_conditional_network_refuses_to_go_without_labels(params, inputs):
  z, logsnr, _ = inputs
  with pytest.raises(ValueError, match='3 classes needs labels'):
    Denoiser(NETWORK, 'v')(params, z, logsnr, None)


def test_an_image_does_not_depend_on_the_others_of_its_batch(apply, params, inputs):
  z, logsnr, cond = inputs
  among = apply(params, z, logsnr, cond)
  others = jnp.array([2, 1, 0])  # image 1 keeps its place
  scale = jnp.array([4.0, 1.0, 4.0])[:, None, None, None]
  moved = apply(params, scale * z[others], logsnr[others], jax.tree.map(lambda a: a[others], cond))
  np.testing.assert_array_equal(moved[1], among[1])
  assert np.abs(moved[2] - among[0]).max() > 0.01


def test_check_takes_what_goes_through():
  NETWORK.check(SHAPE)
  NETWORK.check((4, 6, 3))
  dataclasses.replace(NETWORK, ch_mult=(1,)).check((7, 5, 1))


@pytest.mark.parametrize(
  ('change', 'shape', 'message'),
  [
    ({}, (7, 8, 1), '2 levels .* divisible by 2; these are 7x8'),
    ({'ch_mult': (1, 1, 1)}, (8, 6, 1), '3 levels .* divisible by 4; these are 8x6'),
    ({'num_groups': 3}, SHAPE, 'num_groups=3 does not divide a width of 8'),
    ({'ch_mult': (2, 1), 'num_groups': 16}, SHAPE, 'num_groups=16 does not divide a width of 8'),
    ({'num_heads': 3}, SHAPE, 'heads do not divide a width of 8'),
    ({'head_dim': 16}, SHAPE, 'heads do not divide a width of 8'),
    ({'num_heads': 2, 'head_dim': 4}, SHAPE, 'not both'),
    ({'ch': 9, 'num_groups': 3}, SHAPE, 'ch=9 must be even'),
    ({'ch': 2, 'num_groups': 2}, SHAPE, 'ch=2 must be even and at least 4'),
    ({'attention': 'fast'}, SHAPE, "attention='fast' is not one of .*'cudnn'"),
    ({'time_input': 'cos'}, SHAPE, "time_input='cos' is not one of .*'linear'"),
    ({'time_input': 't'}, SHAPE, "time_input='t' needs the schedule"),
  ],
)
def test_check_refuses_what_does_not_and_says_why(change, shape, message):
  with pytest.raises(ValueError, match=message):
    dataclasses.replace(NETWORK, **change).check(shape)
