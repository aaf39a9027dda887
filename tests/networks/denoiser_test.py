"""Networks as denoisers, and bound to their parameters. The network here is three convolutions."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.config import keys
from diffusion_distillation.diffusion.process import OUTPUTS
from diffusion_distillation.networks import NETWORKS
from diffusion_distillation.networks.conditioning import Classes
from diffusion_distillation.networks.denoiser import (
  BOTTLENECK,
  ENCODED,
  INNERMOST,
  Bound,
  Denoiser,
  Function,
  ModelSection,
)
from diffusion_distillation.networks.spaces import SPACES
from diffusion_distillation.networks.unet import UNet

SHAPE = (4, 4, 1)


class Small(nn.Module):
  """Three convolutions; the time and the label are added as constants."""

  out_ch: int
  ch: int = 4
  num_classes: int = 0
  dropout: float = 0.0
  sows: bool = True

  @property
  def conditioning(self):
    return {'label': Classes(self.num_classes)} if self.num_classes else {}

  def check(self, image_shape):
    if image_shape[0] % 2 or image_shape[1] % 2:
      raise ValueError(f'sides must divide by 2; these are {image_shape[0]}x{image_shape[1]}')

  @nn.compact
  def __call__(self, z, logsnr, cond, deterministic=True):
    h = nn.Conv(self.ch, (3, 3), name='conv0')(z) + jnp.tanh(logsnr)[:, None, None, None]
    if self.num_classes:
      one_hot = jax.nn.one_hot(cond['label'], self.num_classes)
      h = h + nn.Dense(self.ch, name='label')(one_hot)[:, None, None, :]
    h = nn.Dropout(self.dropout)(nn.swish(h), deterministic=deterministic)
    h = nn.Conv(2 * self.ch, (3, 3), strides=2, name='conv1')(h)
    if self.sows:
      self.sow(BOTTLENECK, 'h', h)
    h = jnp.repeat(jnp.repeat(nn.swish(h), 2, axis=1), 2, axis=2)
    return nn.Conv(self.out_ch, (3, 3), name='conv2')(h)


NETWORK = Small(1, num_classes=3, dropout=0.5)
DENOISE = Denoiser(NETWORK, 'v')


@pytest.fixture(scope='module')
def params():
  return DENOISE.init(jax.random.key(1), SHAPE)


@pytest.fixture(scope='module')
def inputs():
  z = jax.random.normal(jax.random.key(0), (3, *SHAPE))
  return z, jnp.array([-1.0, 0.5, 2.0]), {'label': jnp.array([0, 2, 1])}


def test_a_bound_network_is_called_without_its_parameters(params, inputs):
  bound, rng = Bound(DENOISE, params), jax.random.key(2)
  for got, expected in (
    (bound(*inputs), DENOISE(params, *inputs)),
    (bound(*inputs, rng), DENOISE(params, *inputs, rng)),
    (bound(*inputs, rng=rng), DENOISE(params, *inputs, rng=rng)),
    (bound.bottleneck(*inputs), DENOISE.bottleneck(params, *inputs)),
  ):
    jax.tree.map(np.testing.assert_array_equal, got, expected)


def test_a_bound_network_is_a_pytree_of_its_parameters(params, inputs):
  bound = Bound(DENOISE, params)
  for leaf, expected in zip(jax.tree.leaves(bound), jax.tree.leaves(params), strict=True):
    assert leaf is expected
  doubled = jax.tree.map(lambda p: 2 * p, bound)
  assert doubled.network is DENOISE
  twice = DENOISE(jax.tree.map(lambda p: 2 * p, params), *inputs)
  jax.tree.map(np.testing.assert_array_equal, doubled(*inputs), twice)


def test_a_bound_network_that_is_stopped_passes_gradients_on_to_z_and_not_to_its_parameters(
  params, inputs
):
  z, *others = inputs

  def loss(bound, z, stop):
    return jnp.sum(jax.lax.stop_gradient(bound)(z, *others).x if stop else bound(z, *others).x)

  gradients = jax.grad(loss, argnums=(0, 1))
  (free, free_z), (held, held_z) = (gradients(Bound(DENOISE, params), z, stop) for stop in (False, True))
  assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(free))
  assert all((leaf == 0).all() for leaf in jax.tree.leaves(held))
  np.testing.assert_array_equal(held_z, free_z)


def test_a_module_as_a_function_of_its_parameters():
  module, x = nn.Dense(2), jnp.ones((1, 3))
  params = module.init(jax.random.key(0), x)['params']
  np.testing.assert_array_equal(Bound(Function(module), params)(x), module.apply({'params': params}, x))


@pytest.mark.parametrize('output', OUTPUTS)
def test_the_width_of_the_bottleneck_is_that_of_its_activations(params, inputs, output):
  network = dataclasses.replace(NETWORK, out_ch=2 if output == 'both' else 1)
  assert Denoiser(network, output).bottleneck_shape(SHAPE) == (2, 2, 8)
  assert DENOISE.bottleneck(params, *inputs).shape == (3, 2, 2, 8)


def test_of_a_unet_the_bottleneck_is_as_wide_as_its_lowest_level():
  unet = UNet(out_ch=1, ch=8, emb_ch=8, ch_mult=(1, 3), num_res_blocks=1, num_groups=4)
  assert Denoiser(unet, 'v').bottleneck_shape((8, 8, 1))[-1] == 24


def test_of_a_unet_what_follows_the_encoder_is_what_comes_before_the_middle():
  unet = UNet(out_ch=1, ch=8, emb_ch=8, ch_mult=(1,), num_res_blocks=1, num_groups=4)
  denoise = Denoiser(unet, 'v')
  assert denoise.bottleneck_shape((8, 8, 1), ENCODED) == (8, 8, 8)
  params = jax.tree.map(
    lambda leaf: 0.1 * jax.random.normal(jax.random.key(0), leaf.shape),
    jax.eval_shape(lambda: denoise.init(jax.random.key(0), (8, 8, 1))),
  )
  broken = {
    k: jax.tree.map(lambda v: v * jnp.nan, v) if k.startswith('mid') else v for k, v in params.items()
  }

  @jax.jit
  def activations(params):
    z, logsnr = jnp.ones((1, 8, 8, 1)), jnp.zeros(1)
    return [denoise.bottleneck(params, z, logsnr, None, place) for place in (ENCODED, INNERMOST)]

  (encoded, innermost), (same, lost) = activations(params), activations(broken)
  np.testing.assert_array_equal(encoded, same)
  assert np.std(encoded) > 1e-3 and np.isfinite(innermost).all() and np.isnan(lost).all()
  assert np.abs(encoded - innermost).max() > 1e-3


def test_a_network_without_a_bottleneck_is_named():
  with pytest.raises(ValueError, match='the network Small has no bottleneck for a GAN'):
    Denoiser(dataclasses.replace(NETWORK, sows=False), 'v').bottleneck_shape(SHAPE)


def test_without_dropout_all_denoisers_of_a_shape_are_equal(params, inputs):
  quiet = DENOISE.without_dropout()
  assert quiet == Denoiser(Small(1, num_classes=3), 'v') == quiet.without_dropout()
  assert hash(quiet) == hash(quiet.without_dropout()) and quiet != DENOISE
  assert quiet.conditioning == DENOISE.conditioning == {'label': Classes(3)}
  dropped, kept = (d(params, *inputs, jax.random.key(0)).x for d in (DENOISE, quiet))
  np.testing.assert_array_equal(kept, DENOISE(params, *inputs).x)
  assert np.abs(dropped - kept).max() > 0.01


def test_the_config_s_section_offers_what_the_tables_have():
  declared = keys(ModelSection)
  assert set(declared['output'].choices) == set(OUTPUTS)
  assert set(declared['space'].choices) == set(SPACES)
  assert ModelSection().name in NETWORKS
  assert ModelSection().output in OUTPUTS and ModelSection().space in SPACES


@pytest.mark.parametrize('name', NETWORKS)
def test_networks_have_the_hyper_parameters_that_their_section_names(name):
  cls = NETWORKS[name]
  fields = {field.name for field in dataclasses.fields(cls)}
  assert set(keys(cls.Section)) <= fields and not set(keys(cls.Section)) & set(keys(ModelSection))
  assert {'out_ch', 'dropout', 'num_classes'} <= fields


def test_a_student_and_its_teacher_are_traced_once(monkeypatch):
  traced, call = [], Small.__call__
  monkeypatch.setattr(Small, '__call__', lambda self, *args: traced.append(self) or call(self, *args))
  denoise, z = Denoiser(Small(1), 'x'), jnp.zeros((2, *SHAPE))
  params = denoise.init(jax.random.key(0), SHAPE)
  traced.clear()

  @jax.jit
  def loss(i, key):  # as in a round: both at times of their own, and only the student is given a key
    student = denoise(params, z, -i / 4, None, key).x
    return jnp.mean((student - denoise(params, z, jnp.log(1.0 + i), None).x) ** 2)

  loss(jnp.arange(2), jax.random.key(1))
  assert len(traced) == 1
