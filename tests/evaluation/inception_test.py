"""Weights of the FID's Inception from files, and the extractor: any batch, any number of devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import given_images, inception, reference
from diffusion_distillation.evaluation.features import batch_size
from diffusion_distillation.networks.inception import Outputs
from diffusion_distillation.system import sharding, torch_files
from tests import peers


@functools.cache
def entries():
  return {entry['name']: entry for entry in peers.read('fid_inception_32_299')[0]['parameters']}


def zeros():
  """A state dict without numbers of its own."""
  return {
    name: np.broadcast_to(np.float32(0), entry['shape'])
    for name, entry in entries().items()
    if entry['kind'] != 'fixed'
  }


def test_names_and_shapes_are_those_of_the_peer():
  assert inception._shapes() == {name: value.shape for name, value in zeros().items()}


def without(*names):
  return lambda state: [state.pop(name) for name in names]


def having(name, value):
  return lambda state: state.update({name: np.asarray(value)})


BIAS = 'Conv2d_1a_3x3.bn.bias'
PROBLEMS = {
  'a missing tensor': (without(BIAS), f'x lacks {BIAS}, so it is not the Inception of the FID'),
  'missing tensors': (
    without(BIAS, 'Mixed_7c.branch1x1.conv.weight', 'fc.bias'),
    f'x lacks {BIAS} and 2 others',
  ),
  'half of the last layer': (without('fc.weight'), 'x lacks fc.weight, so'),
  "torchvision's": (
    having('AuxLogits.fc.bias', np.zeros(1000, np.float32)),
    'x has AuxLogits.fc.bias, so it is not',
  ),
  'other classes': (
    having('fc.bias', np.zeros(1000, np.float32)),
    r'fc.bias has shape \(1000,\) instead of \(1008,\)',
  ),
  'whole numbers': (having(BIAS, np.zeros(32, np.int64)), f'{BIAS} holds int64 instead of floating'),
  'numbers that are none': (having(BIAS, np.full(32, np.nan, np.float32)), f'{BIAS} has .* not finite'),
  'a negative variance': (
    having('Conv2d_1a_3x3.bn.running_var', np.full(32, -1, np.float32)),
    'running_var has numbers that are negative',
  ),
}


@pytest.mark.parametrize('name', PROBLEMS)
def test_other_tensors_are_refused_by_name(name):
  change, message = PROBLEMS[name]
  state = zeros()
  change(state)
  with pytest.raises(UserError, match=message):
    inception._checked(state, 'x')


def test_weights_may_lack_the_last_layer_and_have_counters_and_half_precision():
  state = zeros() | {'Conv2d_1a_3x3.bn.num_batches_tracked': np.int64(3)}
  without('fc.weight', 'fc.bias')(state)
  state[BIAS] = np.full(32, 1.5, jnp.bfloat16)
  checked = inception._checked(state, 'x')
  assert checked.keys() == zeros().keys() - {'fc.weight', 'fc.bias'}
  assert checked[BIAS].dtype == np.float32 and (checked[BIAS] == 1.5).all()


def test_normalization_is_folded_into_kernel_and_bias(monkeypatch):
  rng = np.random.default_rng(0)
  shapes = {'conv.weight': (4, 3, 2, 5), **{f'bn.{name}': (4,) for name in inception._NORMS}}
  state = {
    f'a.b.{name}': rng.uniform(0.5, 2, shape).astype(np.float32) for name, shape in shapes.items()
  }
  folded = inception._to_params(state)['a']['b']
  x = rng.standard_normal((2, 7, 9, 3)).astype(np.float32)
  layout = ('NHWC', 'OIHW', 'NHWC')
  plain = jax.lax.conv_general_dilated(
    x, state['a.b.conv.weight'], (1, 1), 'VALID', dimension_numbers=layout
  )
  scale, shift, mean, var = (state[f'a.b.bn.{name}'] for name in inception._NORMS)
  expected = (np.asarray(plain) - mean) / np.sqrt(var + 1e-3) * scale + shift
  layout = ('NHWC', 'HWIO', 'NHWC')
  found = jax.lax.conv_general_dilated(x, folded['kernel'], (1, 1), 'VALID', dimension_numbers=layout)
  np.testing.assert_allclose(found + folded['bias'][None, None, None], expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('kind', ['.pth', '.safetensors'])
def test_files_are_read_by_their_kind(tmp_path, monkeypatch, kind):
  """The digest is of the weights, whatever file they are in."""
  state = {name: np.ones(entry, np.float32) for name, entry in (('a.conv.weight', (2, 3, 1, 1)),)}
  state |= {f'a.bn.{name}': np.ones(2, np.float32) for name in inception._NORMS}
  monkeypatch.setattr(inception, '_shapes', lambda: {name: value.shape for name, value in state.items()})
  monkeypatch.setattr(torch_files, 'read', lambda path, source: state)
  path = tmp_path / f'weights{kind}'
  safetensors.numpy.save_file(state, path)
  found = inception.read_weights(path, '--inception')
  assert found.num_logits == 0 and found.digest == inception.digest(state)
  assert found.params['a']['kernel'].shape == (1, 1, 3, 2)


def test_files_that_are_none_are_refused(tmp_path):
  with pytest.raises(
    UserError, match=r'--inception=.*none\.pth: there is no such file; name the pt_inc'
  ):
    inception.read_weights(tmp_path / 'none.pth', '--inception')
  (tmp_path / 'x.safetensors').write_bytes(b'\xff' * 100)
  with pytest.raises(UserError, match='is damaged or not a safetensors file'):
    inception.read_weights(tmp_path / 'x.safetensors', '--inception')


def simple(params, images, num_logits):
  """Instead of the network: some numbers of each image."""
  pool3 = images[:, ::60, ::60].mean((1, 2)) + params['shift'][None]
  logits = pool3 @ jnp.ones((3, num_logits)) if num_logits else None
  return Outputs(pool3, logits, images[:, 100, 100:105].reshape(len(images), -1), None, None, None)


@pytest.mark.parametrize(
  ('count', 'devices', 'at_once'), [(8, 8, 64), (24, 1, 7), (24, 2, 5), (32, 8, 3)]
)
@pytest.mark.parametrize('num_logits', [0, 4])
def test_parts_of_a_batch_are_put_together_in_order(monkeypatch, count, devices, at_once, num_logits):
  sizes = []

  def spy(params, images, num_logits):
    sizes.append(len(images))
    return simple(params, images, num_logits)

  monkeypatch.setattr(inception, '_forward', spy)
  monkeypatch.setattr(inception, 'AT_ONCE', at_once)
  images = np.random.default_rng(0).integers(0, 256, (count, 6, 5, 3), np.uint8)
  params = {'shift': np.arange(3, dtype=np.float32)}
  apply = jax.jit(inception._of_images.__wrapped__, static_argnums=(2, 3))
  found = apply(params, images, num_logits, devices)
  assert max(sizes) <= at_once * devices
  whole = simple(params, inception.preprocess(images), num_logits)
  assert (found.logits is None) == (num_logits == 0)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), found, whole)


def test_the_extractor_says_what_it_is_and_leaves_out_the_bias_of_logits(monkeypatch):
  monkeypatch.setattr(inception, '_forward', simple)
  bias = np.arange(4, dtype=np.float32)
  params = {'shift': np.zeros(3, np.float32), 'fc': {'bias': bias}}
  extractor = inception.InceptionExtractor(inception.Weights(params, 4, 'd' * 64))
  assert (extractor.metric, extractor.digest) == ('FID', 'd' * 64)
  images = sharding.spread(np.full((8, 6, 5, 1), 255, np.uint8))
  found = sharding.to_host(extractor.of(images))
  np.testing.assert_allclose(found.features, 1.0, atol=1e-6)
  np.testing.assert_allclose(found.logits, np.tile(3 - bias, (8, 1)), atol=1e-5)
  assert found.spatial.shape == (8, 15)


def test_given_images_of_many_sizes_fill_their_batches(monkeypatch):
  """And asking only for shapes beforehand leaves no traced arrays behind."""
  monkeypatch.setattr(inception, '_of_preprocessed', simple)
  monkeypatch.setattr(inception, '_forward', simple)
  params = {'shift': np.zeros(3, np.float32), 'fc': {'bias': np.zeros(4, np.float32)}}
  extractor = inception.InceptionExtractor(inception.Weights(params, 4, ''))
  abstract = jax.ShapeDtypeStruct((8, 5, 4, 3), jnp.uint8)
  assert jax.eval_shape(extractor.of, abstract).features.shape == (8, 3)
  rng = np.random.default_rng(0)
  images = [rng.integers(0, 256, (5 + k // 3, 9, 3), np.uint8) for k in range(21)]
  batches = [
    given_images.Batch(np.arange(k, k + 3), np.stack(images[k : k + 3])) for k in range(0, 21, 3)
  ]
  found = list(extractor.of_given(batches, 8))
  assert [count for count, _ in found] == [8, 8, 5]
  features = np.concatenate([np.asarray(x.features)[:count] for count, x in found])
  whole = np.concatenate([inception.preprocess(image[None]) for image in images])
  np.testing.assert_allclose(features, simple(params, whole, 0).pool3, atol=1e-5)


def test_batches_are_not_larger_than_what_there_is():
  extractor = inception.InceptionExtractor(inception.Weights({}, 0, ''))
  sizes = [batch_size(extractor, number) for number in (1, 9, 10_000)]
  assert sizes == [8, 16, 8 * inception.AT_ONCE]  # of 8 devices


def test_the_number_of_features_is_known_without_tracing(monkeypatch):
  extractor = inception.InceptionExtractor(inception.Weights({}, 0, ''))
  monkeypatch.setattr(inception, '_of_images', None)
  assert reference.dimension(extractor, (8, 8, 3)) == 2048
