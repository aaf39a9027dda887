"""Mixed precision and recomputation change how the network is computed, not what it is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.networks.denoiser import Denoiser
from diffusion_distillation.networks.unet import UNet
from diffusion_distillation.stages import provenance
from tests import tiny

pytestmark = pytest.mark.slow

NETWORK = UNet(1, 8, 16, (1, 2), 1, attn_resolutions=(4,), num_groups=4, dropout=0.3)
SHAPE = (8, 8, 1)


@pytest.fixture(scope='module')
def params():
  """Not those it begins with, where the last convolution is zero."""
  tree = jax.eval_shape(lambda: Denoiser(NETWORK, 'v').init(jax.random.key(0), SHAPE))
  rng = np.random.default_rng(1)

  def draw(path, leaf):
    noise = rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]) if leaf.ndim > 1 else 100)
    return jnp.float32(noise + (path[-1].key == 'scale'))

  return jax.tree_util.tree_map_with_path(draw, tree)


def denoiser(**changes):
  return Denoiser(dataclasses.replace(NETWORK, **changes), 'v')


@pytest.fixture(scope='module')
def computed(params):
  """computed(**changes): x, and the loss's gradient, with dropout."""
  z = jax.random.normal(jax.random.key(2), (4, *SHAPE))
  logsnr = jnp.linspace(-5.0, 5.0, 4)
  known = {}

  def compute(**changes):
    def loss(params):
      x = denoiser(**changes)(params, z, logsnr, None, jax.random.key(3)).x
      return jnp.mean(jnp.square(x)), x

    key = tuple(changes.items())
    if key not in known:
      known[key] = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    (_, x), grads = known[key]
    return x, grads

  return compute


def flat(tree):
  return np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)


def test_recomputed_activations_give_the_same_gradient(computed):
  """With the same dropout masks, but for rounding; other masks change x by 0.8 of its largest value, and the gradient by 0.3."""
  x, grads = computed()
  again, grads_again = computed(remat=True)
  np.testing.assert_allclose(again, x, atol=1e-6 * np.abs(x).max())
  np.testing.assert_allclose(flat(grads_again), flat(grads), atol=1e-6 * np.abs(flat(grads)).max())


@pytest.mark.parametrize('remat', [False, True])
def test_bfloat16_is_float32_to_its_precision(computed, remat):
  x, grads = computed()
  coarse, coarse_grads = computed(dtype='bfloat16', remat=remat)
  assert coarse.dtype == jnp.float32
  assert {leaf.dtype.name for leaf in jax.tree.leaves(coarse_grads)} == {'float32'}
  error = np.linalg.norm(coarse - x) / np.linalg.norm(x)
  assert 1e-4 < error < 2e-2
  of_grads = np.linalg.norm(flat(coarse_grads) - flat(grads)) / np.linalg.norm(flat(grads))
  assert 1e-4 < of_grads < 5e-2


@pytest.mark.parametrize('changes', [{'remat': True}, {'dtype': 'bfloat16'}], ids=str)
def test_the_parameters_are_the_same_ones(changes):
  """By name, shape, type and value: a checkpoint of one is one of the other."""
  rng = jax.random.key(0)
  found, expected = denoiser(**changes).init(rng, SHAPE), denoiser().init(rng, SHAPE)
  assert jax.tree.structure(found) == jax.tree.structure(expected)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert {leaf.dtype.name for leaf in jax.tree.leaves(found)} == {'float32'}


def test_recomputation_keeps_less_for_the_way_back(params):
  def kept(**changes):
    z = jax.ShapeDtypeStruct((16, *SHAPE), jnp.float32)

    def residuals(params, z):
      return jax.vjp(lambda p: denoiser(**changes)(p, z, jnp.zeros(16), None).x, params)[1]

    shapes = jax.tree.leaves(jax.eval_shape(residuals, params, z))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in shapes if 16 in leaf.shape)

  assert kept(remat=True) < 0.4 * kept()
  assert kept(dtype='bfloat16') < 0.75 * kept()


def test_what_is_no_type_is_refused():
  with pytest.raises(ValueError, match=r"dtype='float8' is not one of \['float32', 'bfloat16'\]"):
    dataclasses.replace(NETWORK, dtype='float8').check(SHAPE)


def test_lineage_does_not_know_how_a_stage_was_computed():
  plain = tiny.plan()[0][0]
  other = tiny.plan(compute__dtype='bfloat16', compute__remat=True)[0][0]
  assert other.denoise.network.dtype == 'bfloat16' and other.denoise.network.remat
  assert provenance.describe(other) == provenance.describe(plain)


def test_time_and_class_are_embedded_in_float32():
  """Where activations are bfloat16, too: its 8 bits do not tell neighbouring noise levels apart."""
  logsnr, cond, z = jnp.array([1.0, 1.001]), {'label': jnp.array([0, 2])}, jnp.zeros((2, *SHAPE))
  embedded = {}
  for dtype in ('float32', 'bfloat16'):
    network = dataclasses.replace(NETWORK, num_classes=3, dtype=dtype)
    params = Denoiser(network, 'v').init(jax.random.key(0), SHAPE)

    def embed(params, network=network):
      return network.apply(
        {'params': params},
        *(z, logsnr, cond),
        capture_intermediates=lambda module, _: module.name in ('dense1', 'class_emb'),
        mutable=['intermediates'],
      )[1]['intermediates']

    embedded[dtype] = jax.jit(embed)(params)
  assert embedded['float32'].keys() == {'dense1', 'class_emb'}
  jax.tree.map(np.testing.assert_array_equal, embedded['bfloat16'], embedded['float32'])
  assert {leaf.dtype.name for leaf in jax.tree.leaves(embedded['bfloat16'])} == {'float32'}
