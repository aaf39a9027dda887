"""What every method promises."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation import times
from diffusion_distillation.diffusion import Prediction
from diffusion_distillation.methods import METHODS, Denoising, Progressive
from diffusion_distillation.schedules import Cosine
from diffusion_distillation.unet import Denoiser, UNet
from diffusion_distillation.weightings import SnrTrunc
from tests.exact import Gaussian

SCHEDULE = Cosine()
GAUSSIAN = Gaussian(mean=0.3, std=0.5)
KEY = jax.random.key(0)
FIELDS = {'num_steps': 4, 'schedule': SCHEDULE, 'weighting': SnrTrunc()}
SHAPE = (8, 8, 8, 1)
NETWORK = UNet(
  out_ch=1, ch=8, emb_ch=8, ch_mult=(1,), num_res_blocks=1, num_groups=4, dropout=0.1, num_classes=3
)


def build(cls):
  """The method with its own defaults, and FIELDS for what has none."""
  missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
  return cls(**{name: FIELDS[name] for name in missing})


def size(tree):
  """The largest absolute value."""
  return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


@pytest.fixture(scope='module')
def student():
  """As a new network has them: random, and zero where it starts with zeros."""
  tree = jax.eval_shape(lambda: Denoiser(NETWORK, 'v').init(KEY, (8, 8, 1)))
  rng = np.random.default_rng(1)

  def draw(path, leaf):
    zero = {'conv_out', 'conv2', 'proj_out'} & {key.key for key in path}
    return jnp.zeros(leaf.shape) if zero else jnp.float32(0.3 * rng.normal(size=leaf.shape))

  return jax.tree_util.tree_map_with_path(draw, tree)


@pytest.fixture(scope='module', params=METHODS)
def case(request, student):
  """A method with a small network, its parameters, a different teacher's, and one compiled gradient."""
  method, denoise = build(METHODS[request.param]), Denoiser(NETWORK, 'v')
  rng = np.random.default_rng(0)
  teacher = jax.tree.map(lambda p: p + jnp.float32(0.1 * rng.normal(size=p.shape)), student)
  data = {'x': jnp.float32(rng.uniform(-1, 1, SHAPE)), 'label': jnp.arange(8) % 3}

  @jax.jit
  def gradients(method, params, teacher, draws, rng):
    """((loss, metrics), (gradient of params, gradient of teacher))."""

    def loss(params, teacher):
      return method.loss(denoise, params, teacher, data | draws, rng, jnp.array(0))

    return jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)(params, teacher)

  return types.SimpleNamespace(
    method=method,
    params=method.init(student),
    teacher=teacher,
    gradients=lambda params, key=KEY, rng=KEY: gradients(
      method, params, teacher, method.draw(key, SHAPE), rng
    ),
  )


def test_the_student_starts_from_the_parameters_given(case, student):
  jax.tree.map(np.testing.assert_array_equal, case.params['student'], student)


def test_loss_is_a_finite_scalar_and_so_are_the_metrics(case):
  (loss, metrics), _ = case.gradients(case.params)
  for value in (loss, *metrics.values()):
    assert value.shape == ()
    assert np.isfinite(value)


def test_every_trained_network_has_a_gradient_from_the_first_update_and_in_all_layers_soon(case):
  """The zeros of a new network hide what lies before them: for one update, and in blocks for two."""
  params = case.params
  for update in range(3):
    _, (gradient, _) = case.gradients(params)
    for name, network in gradient.items():
      largest = {module: size(leaves) for module, leaves in network.items()}
      assert np.isfinite(list(largest.values())).all()
      assert largest['conv_out'] > 1e-6, name
      if update >= 1:
        assert largest['conv_in'] > 1e-6, name
      if update >= 2:
        assert min(largest.values()) > 1e-6, (name, largest)
    params = jax.tree.map(lambda p, g: p - 0.01 * np.sign(g), params, gradient)


def test_the_teacher_has_no_gradient(case):
  moved = jax.tree.map(lambda p: p + 0.05, case.params)
  _, (_, gradient) = case.gradients(moved)
  for leaf in jax.tree.leaves(gradient):
    np.testing.assert_array_equal(leaf, 0.0)


@pytest.mark.parametrize('which', ['key', 'rng'])
def test_loss_is_a_function_of_the_key_of_the_draws_and_of_that_of_dropout(case, which):
  moved = jax.tree.map(lambda p: p + 0.05, case.params)
  one, same, other = (case.gradients(moved, **{which: jax.random.key(seed)})[0][0] for seed in (1, 1, 2))
  assert one == same
  assert one != other


def test_a_method_is_an_argument_of_a_compiled_step(case):
  """Numbers are leaves, all else is hashable: an equal method does not trace anew."""
  traces = []

  @jax.jit
  def step(method):
    traces.append(method)
    return 0

  for method in (case.method, build(type(case.method))):
    step(method)
  assert len(traces) == 1


VARIANTS = {
  **{name: build(cls) for name, cls in METHODS.items()},
  'discrete': Denoising(SCHEDULE, SnrTrunc(), times.Uniform(stratified=True), num_steps=1000),
  'by_three': Progressive(4, SCHEDULE, SnrTrunc(), factor=3),
  'by_four': Progressive(4, SCHEDULE, SnrTrunc(), factor=4),
}
every_variant = pytest.mark.parametrize('method', VARIANTS.values(), ids=VARIANTS)


def shifted(params, z, logsnr, label, rng=None):
  """A denoiser of one parameter."""
  x, eps = GAUSSIAN(z, logsnr)
  return Prediction(x + params, eps - params)


@every_variant
def test_draws_are_a_function_of_the_key_and_have_the_batch_in_front(method):
  one, same, other = (method.draw(jax.random.key(seed), SHAPE) for seed in (1, 1, 2))
  assert one['eps'].shape == SHAPE
  for name, values in one.items():
    assert values.shape[0] == SHAPE[0]
    np.testing.assert_array_equal(values, same[name])
    assert (values != other[name]).any()


@every_variant
def test_the_student_is_called_once_and_the_teacher_as_often_as_is_said(method):
  calls = []

  def counting(params, z, logsnr, label, rng=None):
    calls.append(params)
    return GAUSSIAN(z, logsnr)

  data = {'x': jnp.zeros(SHAPE), 'label': None} | method.draw(KEY, SHAPE)
  method.loss(counting, method.init('student'), 'teacher', data, None, 0)
  assert calls.count('student') == 1
  assert calls.count('teacher') == method.teacher_calls


@every_variant
def test_the_loss_of_a_batch_is_the_mean_over_its_examples(method):
  """Each with its own draws: a batch may be cut into micro-batches."""
  data = {'x': jax.random.uniform(KEY, SHAPE, minval=-1.0), 'label': jnp.arange(8)}
  data |= method.draw(KEY, SHAPE)

  @jax.jit
  def loss(data):
    return method.loss(shifted, {'student': 0.1}, 0.2, data, None, 0)[0]

  alone = [loss(jax.tree.map(lambda a, k=k: a[k : k + 1], data)) for k in range(8)]
  assert np.std(alone) > 0.01 * np.mean(alone)
  np.testing.assert_allclose(loss(data), np.mean(alone), rtol=1e-5)
