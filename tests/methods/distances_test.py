"""Distances between images: limits, invariances, LPIPS against NumPy, and files that do not fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from diffusion_distillation.errors import UserError
from diffusion_distillation.methods.distances import L2, Features, Lpips, PseudoHuber, load
from diffusion_distillation.networks import classifier

KEY = jax.random.key(0)
X, Y = jax.random.uniform(KEY, (2, 3, 8, 8, 1), minval=-1.0)


@pytest.fixture(scope='module')
def of_classifier():
  """Parameters of a small classifier, with biases that are not zero."""
  params = classifier.Classifier(4).init(KEY, X)['params']
  rng = np.random.default_rng(0)
  return jax.tree.map(lambda p: p + np.float32(0.1 * rng.normal(size=p.shape)), params)


def lpips_shapes():
  """The state of the lpips package's network: VGG-16's convolutions by their numbers in torchvision."""
  layers = {
    1: ((0, 64), (2, 64)),
    2: ((5, 128), (7, 128)),
    3: ((10, 256), (12, 256), (14, 256)),
    4: ((17, 512), (19, 512), (21, 512)),
    5: ((24, 512), (26, 512), (28, 512)),
  }
  shapes, below = {}, 3
  for part, convolutions in layers.items():
    for number, width in convolutions:
      shapes[f'net.slice{part}.{number}.weight'] = (width, below, 3, 3)
      shapes[f'net.slice{part}.{number}.bias'] = (width,)
      below = width
    shapes[f'lin{part - 1}.model.1.weight'] = (1, below, 1, 1)
  return shapes


@pytest.fixture(scope='module')
def of_lpips():
  """Random weights of a size that keeps activations alive, and lin's positive, as learned ones are."""
  rng = np.random.default_rng(0)

  def draw(name, shape):
    values = rng.standard_normal(shape, np.float32)
    scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) == 4 else 0.1
    return np.abs(values) if name.startswith('lin') else np.float32(scale) * values

  return {name: draw(name, shape) for name, shape in lpips_shapes().items()}


def enlarged(x, size):
  """Bilinear, pixels being areas: along each axis, from the two nearest centres, or the last."""
  for axis in (1, 2):
    old = x.shape[axis]
    at = np.clip((np.arange(size) + 0.5) * old / size - 0.5, 0, old - 1)
    low = np.floor(at).astype(int)
    high = np.minimum(low + 1, old - 1)
    share = (at - low).reshape([-1 if a == axis else 1 for a in range(4)])
    x = (1 - share) * x.take(low, axis) + share * x.take(high, axis)
  return x


def lpips_by_numpy(weights, x, y, size):
  """LPIPS as the lpips package computes it, in float64."""

  def activations(x):
    h = enlarged(np.repeat(np.float64(x), 3 // x.shape[-1], axis=-1), size)
    h = (h - [-0.030, -0.088, -0.188]) / [0.458, 0.448, 0.450]
    found = []
    for part in range(1, 6):
      if part > 1:
        n, height, width, channels = h.shape
        h = h.reshape(n, height // 2, 2, width // 2, 2, channels).max((2, 4))
      numbers = [name.split('.')[2] for name in weights if f'slice{part}.' in name and 'weight' in name]
      for number in numbers:
        around = np.pad(h, ((0, 0), (1, 1), (1, 1), (0, 0)))
        patches = np.lib.stride_tricks.sliding_window_view(around, (3, 3), (1, 2))
        name = f'net.slice{part}.{number}'
        h = np.tensordot(patches, np.float64(weights[f'{name}.weight']), ((3, 4, 5), (1, 2, 3)))
        h = np.maximum(h + weights[f'{name}.bias'], 0)
      found.append(h / (np.linalg.norm(h, axis=-1, keepdims=True) + 1e-10))
    return found

  parts = enumerate(zip(activations(x), activations(y), strict=True))
  return sum(
    np.mean((a - b) ** 2 @ np.float64(weights[f'lin{k}.model.1.weight'][0, :, 0, 0]), (1, 2))
    for k, (a, b) in parts
  )


@pytest.fixture(scope='module')
def lpips(of_lpips):
  """(x, y) of shape (3, 8, 8, C) to (distance, its gradient in x), compiled once for each C."""
  weights = jax.tree.map(jnp.array, of_lpips)

  @jax.jit
  def both(weights, x, y):
    def total(x):
      values = Lpips(size=32)(x, y, weights)
      return jnp.sum(values), values

    return jax.grad(total, has_aux=True)(x)

  def call(x, y):
    slope, values = both(weights, x, y)
    return values, slope

  return call


def test_lpips_is_that_of_its_package(lpips, of_lpips):
  values, slope = lpips(X, Y)
  np.testing.assert_allclose(values, lpips_by_numpy(of_lpips, X, Y, 32), rtol=1e-4)
  assert np.abs(slope).max() > 1e-4


def assert_least(same, apart):
  """Value and gradient between equal images are zero up to rounding, beside those between others."""
  assert (np.abs(same[0]) < 1e-10 * apart[0]).all()
  assert np.abs(same[1]).max() < 1e-4 * np.abs(apart[1]).max()


def test_lpips_of_equal_images_is_zero_and_has_no_gradient(lpips):
  assert_least(lpips(X, X), lpips(X, Y))


def test_lpips_takes_colours_in_their_order_and_grey_for_three_equal_ones(of_lpips):
  """The first layer sees what is fed to it; larger images are left at their size."""
  weights = jax.tree.map(jnp.array, of_lpips)

  @jax.jit
  def first(x):
    return Lpips(size=8).layers(weights, x)[0]

  colours = jax.random.uniform(KEY, (1, 16, 16, 3), minval=-1.0)
  assert first(colours).shape == (1, 16, 16, 64)
  assert np.abs(first(colours) - first(colours[..., ::-1])).max() > 0.01
  grey = colours[..., :1]
  np.testing.assert_allclose(first(grey), first(jnp.repeat(grey, 3, axis=-1)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('name', ['net.slice1.0.bias', 'net.slice4.19.weight', 'lin3.model.1.weight'])
@pytest.mark.parametrize('how', ['missing', 'mis-shaped'])
def test_a_file_that_is_not_of_lpips_is_refused_with_the_name_of_the_tensor(name, how):
  shapes = lpips_shapes()
  weights = {key: np.broadcast_to(np.float32(0), shape) for key, shape in shapes.items()}
  assert set(Lpips().check(weights | {'scaling_layer.shift': np.zeros(3)}, (8, 8, 1))) == set(shapes)
  if how == 'missing':
    del weights[name]
  else:
    weights[name] = np.broadcast_to(np.float32(0), (7, *shapes[name][1:]))
  with pytest.raises(ValueError, match=f'{name} should have shape') as raised:
    Lpips().check(weights, (8, 8, 1))
  assert '\n' not in str(raised.value)


def test_l2_is_the_mean_square_of_the_difference():
  np.testing.assert_allclose(L2()(X, Y), np.mean((X - Y) ** 2, (1, 2, 3)), rtol=1e-5)


def test_pseudo_huber_by_its_definition_over_sums():
  """Song & Dhariwal 2023, Eq. 7 with c sqrt(D), over sqrt(D)."""
  c, pixels = 0.1 * np.sqrt(64), np.float64(X - Y).reshape(3, -1)
  expected = np.sqrt(np.sum(pixels**2, 1) + c**2) - c
  np.testing.assert_allclose(PseudoHuber(0.1)(X, Y), expected / np.sqrt(64), rtol=1e-5)


def test_pseudo_huber_is_l2_for_small_differences_and_its_root_for_large_ones():
  small = X + 0.02 * (Y - X)
  np.testing.assert_allclose(PseudoHuber(0.5)(X, small), L2()(X, small) / (2 * 0.5), rtol=1e-3)
  large = X + 1e3 * (Y - X)
  np.testing.assert_allclose(PseudoHuber(0.1)(X, large), np.sqrt(L2()(X, large)), rtol=1e-3)


def test_pseudo_huber_has_no_gradient_at_equality_and_one_of_length_1_far_from_it():
  """Times sqrt(D): the root mean square is a norm over sqrt(D)."""
  slope = jax.grad(lambda x, y: jnp.sum(PseudoHuber()(x, y)))
  np.testing.assert_array_equal(slope(X, X), 0.0)
  lengths = np.sqrt(64 * np.sum(np.square(slope(X, Y)), (1, 2, 3)))
  np.testing.assert_allclose(lengths, 1.0, rtol=1e-4)


def test_features_are_zero_at_equality_symmetric_and_positive_between_different_images(of_classifier):
  def total(x, y):
    values = Features()(x, y, of_classifier)
    return jnp.sum(values), values

  both = jax.jit(jax.grad(total, has_aux=True))
  (same, apart, back) = (both(*images)[::-1] for images in ((X, X), (X, Y), (Y, X)))
  assert_least(same, apart)
  np.testing.assert_allclose(apart[0], back[0], rtol=1e-5)
  assert (apart[0] > 0.01).all() and np.abs(apart[1]).max() > 1e-3


def test_features_by_definition(of_classifier):
  """Sums over channels, means over places, sums over layers, of activations at unit length."""
  expected = np.zeros(3)
  for of_x, of_y in zip(*(classifier.layers(of_classifier, a) for a in (X, Y)), strict=True):
    units = [a / np.linalg.norm(np.float64(a), axis=-1, keepdims=True).clip(1e-12) for a in (of_x, of_y)]
    expected += np.sum((units[0] - units[1]) ** 2, -1).reshape(3, -1).mean(1)
  np.testing.assert_allclose(Features()(X, Y, of_classifier), expected, rtol=1e-4)


def test_the_size_of_activations_does_not_matter(monkeypatch):
  """Only where they point: 1 - cos, twice."""
  a, b = jax.random.normal(KEY, (2, 3, 4, 4, 8))
  monkeypatch.setattr(classifier, 'layers', lambda weights, x: (weights * x,))
  cos = np.sum(a * b, -1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
  for scale in (1.0, 5.0):
    for other in (b, 3.0 * b):
      got = Features()(a, other, scale)
      np.testing.assert_allclose(got, np.mean(2.0 - 2.0 * cos, (1, 2)), rtol=1e-4)


@pytest.mark.parametrize('silent', ['x', 'y', 'xy'])
def test_activations_that_are_all_zero_have_a_finite_gradient(of_classifier, silent):
  """Biases that silence every unit of the first layer for dark images, not for bright ones."""
  conv0 = {'kernel': jnp.ones_like(of_classifier['conv0']['kernel']), 'bias': jnp.zeros(32)}
  params = {**of_classifier, 'conv0': conv0}
  x, y = (jnp.full((2, 8, 8, 1), -0.5 if name in silent else 0.5) for name in ('x', 'y'))
  assert (float(jnp.max(classifier.layers(params, x)[0])) == 0.0) == ('x' in silent)

  def total(x):
    values = Features()(x, y, params)
    return jnp.sum(values), values

  slope, values = jax.grad(total, has_aux=True)(x)
  assert np.isfinite(slope).all() and np.isfinite(values).all()
  assert (values > 0.5).all() if len(silent) == 1 else (values == 0.0).all()


def flat(params):
  return {k: np.asarray(v) for k, v in traverse_util.flatten_dict(params, sep='/').items()}


def test_weights_of_a_classifier_are_read_from_its_file(of_classifier, tmp_path):
  path = tmp_path / 'extractor.safetensors'
  safetensors.numpy.save_file(flat(of_classifier), path)
  weights = load(Features(), str(path), (8, 8, 1), 'dmd.distance_weights')
  jax.tree.map(np.testing.assert_array_equal, weights, dict(of_classifier))
  for distance in (L2(), PseudoHuber()):
    assert load(distance, '', (8, 8, 1), 'dmd.distance_weights') is None


def test_numbers_that_numpy_does_not_have_are_refused_in_one_line(tmp_path):
  path, header = (
    tmp_path / 'weights.safetensors',
    b'{"w":{"dtype":"F8_E4M3","shape":[1],"data_offsets":[0,1]}}',
  )
  path.write_bytes(len(header).to_bytes(8, 'little') + header + b'0')
  with pytest.raises(UserError, match='arrays of a type that NumPy does not have') as raised:
    load(Features(), str(path), (8, 8, 1), 'dmd.distance_weights')
  assert '\n' not in str(raised.value)


@pytest.mark.parametrize('mse', [1e-14, 1e-10, 1e-7, 1e-3, 1.0])
def test_pseudo_huber_is_exact_for_the_smallest_differences(mse):
  x = jnp.full((1, 4, 4, 1), np.sqrt(mse))
  got = float(PseudoHuber()(x, jnp.zeros_like(x))[0])
  assert got == pytest.approx(np.sqrt(mse + 0.00054**2) - 0.00054, rel=1e-4 if mse > 1e-12 else 1e-2)


BROKEN = {
  'other_channels': lambda f: f | {'conv0/kernel': np.zeros((3, 3, 3, 32), np.float32)},
  'other_width': lambda f: f | {'features/kernel': np.zeros((10, 64), np.float32)},
  'without_a_layer': lambda f: {k: v for k, v in f.items() if not k.startswith('conv1')},
  'without_logits': lambda f: {k: v for k, v in f.items() if not k.startswith('logits')},
  'with_a_layer_too_many': lambda f: f | {'conv9/bias': np.zeros(64, np.float32)},
  'of_lpips': lambda f: {'net.slice1.0.bias': np.zeros(64, np.float32)},
}


def test_a_file_that_is_none_of_a_classifier_is_refused_in_one_line(of_classifier, tmp_path):
  path = tmp_path / 'extractor.safetensors'
  for broken in BROKEN.values():
    safetensors.numpy.save_file(broken(flat(of_classifier)), path)
    with pytest.raises(UserError) as raised:
      load(Features(), str(path), (8, 8, 1), 'dmd.distance_weights')
    assert (
      str(raised.value)
      == f'dmd.distance_weights={path}: this is not a classifier of images with shape (8, 8, 1)'
    )


@pytest.mark.parametrize('distance', [Features(), Lpips()], ids=str)
def test_what_is_no_file_of_weights_is_refused_in_one_line(distance, tmp_path):
  text = tmp_path / 'weights.safetensors'
  text.write_text('these are no weights\n')
  for path in ('', str(tmp_path / 'nowhere'), str(tmp_path), str(text)):
    with pytest.raises(UserError, match=r'knowledge\.distance_weights=') as raised:
      load(distance, path, (8, 8, 1), 'knowledge.distance_weights')
    assert '\n' not in str(raised.value) and path in str(raised.value)
