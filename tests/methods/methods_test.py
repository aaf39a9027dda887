"""What every method promises."""

import dataclasses
import functools
import types
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.process import Prediction
from diffusion_distillation.diffusion.samplers import Heun
from diffusion_distillation.diffusion.schedules import Cosine
from diffusion_distillation.diffusion.weightings import SnrTrunc
from diffusion_distillation.methods import DMD, METHODS, Consistency, Denoising, Gan, Progressive
from diffusion_distillation.networks.conditioning import Classes
from diffusion_distillation.networks.denoiser import BOTTLENECK, Bound, Denoiser
from diffusion_distillation.networks.unet import UNet
from tests.exact import Gaussian

SCHEDULE = Cosine()
GAUSSIAN = Gaussian(mean=0.3, std=0.5)
KEY = jax.random.key(0)
FIELDS = {
  'num_steps': 4,
  'schedule': SCHEDULE,
  'weighting': SnrTrunc(),
  'num_updates': 100,
  'start_intervals': 2,
  'end_intervals': 8,
}
GAN = Gan(width=16, generator_weight=0.7, fake_weight=0.3)
SHAPE = (8, 8, 8, 1)
UNET = UNet(
  out_ch=1, ch=8, emb_ch=8, ch_mult=(1,), num_res_blocks=1, num_groups=4, dropout=0.1, num_classes=3
)


class Plain(nn.Module):
  """Three convolutions with dropout, told time and class; the last begins at zero, as that of a U-Net."""

  dropout: float = 0.1
  conditioning = FrozenDict({'label': Classes(3)})

  @nn.compact
  def __call__(self, z, logsnr, cond, deterministic=True):
    about = nn.Dense(8, name='time')(0.1 * logsnr[:, None]) + nn.Embed(3, 8, name='class')(cond['label'])
    h = jnp.tanh(nn.Conv(8, (3, 3), name='conv_in')(z) + about[:, None, None, :])
    h = nn.Dropout(self.dropout, deterministic=deterministic)(h)
    h = jnp.tanh(nn.Conv(8, (3, 3), name='conv')(h))
    self.sow(BOTTLENECK, 'h', h)
    return nn.Conv(z.shape[-1], (3, 3), kernel_init=nn.initializers.zeros, name='conv_out')(h)


def build(cls):
  """The method with its own defaults, and FIELDS for what has none."""
  missing = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
  return cls(**{name: FIELDS[name] for name in missing})


def dmd2(**fields):
  """DMD without pairs, with a GAN and two time scales."""
  given = {'regression': 0.0, 'fake_updates': 3, 'gan': GAN} | fields
  return DMD(SCHEDULE, SnrTrunc(), **given)


def nets(method, params, frozen=None, student=None, teacher=None):
  """The networks of the method's loss, bound to `params` and `frozen`; all of them are `student` without a `teacher`."""
  student = Shifted() if student is None else student
  found = method.networks(student, student if teacher is None else teacher)
  held = {**(frozen or {}), **params}
  return {name: Bound(network, held.get(name)) for name, network in found.items()}


def size(tree):
  """The largest absolute value."""
  return max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def new_params(network):
  """As a new network has them: random, and zero where it starts with zeros."""
  tree = jax.eval_shape(lambda: Denoiser(network, 'v').init(KEY, (8, 8, 1)))
  rng = np.random.default_rng(1)

  def draw(path, leaf):
    zero = {'conv_out', 'conv2', 'proj_out'} & {key.key for key in path}
    return jnp.zeros(leaf.shape) if zero else jnp.float32(0.3 * rng.normal(size=leaf.shape))

  return jax.tree_util.tree_map_with_path(draw, tree)


OF_UNET = [pytest.param(('denoising', UNET), id='denoising-unet')]
OF_UNET += [pytest.param(('dmd2', UNET), id='dmd2-unet', marks=pytest.mark.slow)]


@pytest.fixture(
  scope='module', params=[*(pytest.param((name, Plain()), id=name) for name in METHODS), *OF_UNET]
)
def case(request):
  """A method with a small network, its parameters, a different teacher's, and one compiled gradient."""
  name, network = request.param
  method = build(METHODS[name])
  if isinstance(method, DMD):  # DMD with pairs and a GAN, DMD2 without pairs
    method = dataclasses.replace(method, gan=GAN.replace(width=8), regression=0.25 * (name == 'dmd'))
  denoise, rng = Denoiser(network, 'v'), np.random.default_rng(0)
  student = new_params(network)
  teacher = jax.tree.map(lambda p: p + jnp.float32(0.1 * rng.normal(size=p.shape)), student)
  cond = {'label': jnp.arange(8) % 3, 'guidance': jnp.linspace(0.0, 4.0, 8)}
  data = {'x': jnp.float32(rng.uniform(-1, 1, SHAPE)), 'cond': cond}
  noise, image = jnp.float32(rng.normal(size=(2, *SHAPE)))
  data['pairs'] = {'noise': noise, 'image': image, 'cond': cond}
  frozen = {'teacher': teacher, 'average': teacher}

  @jax.jit
  def gradients(method, params, frozen, draws, rng):
    """((loss, metrics), gradient of params)."""

    def loss(params):
      bound = nets(method, params, frozen, denoise)
      return method.loss(bound, data | draws, rng, jnp.array(0))

    return jax.value_and_grad(loss, has_aux=True)(params)

  return types.SimpleNamespace(
    method=method,
    params=method.init(student, teacher, KEY),
    student=student,
    teacher=teacher,
    gradients=lambda params, key=KEY, rng=KEY: gradients(
      method, params, frozen, method.draw(key, SHAPE), rng
    ),
  )


def test_the_student_starts_from_its_own_parameters_and_the_fake_score_from_the_teachers(case):
  starts = {'student': case.student, 'fake_score': case.teacher}
  for name, params in case.params.items():
    if name in starts:
      jax.tree.map(np.testing.assert_array_equal, params, starts[name])


def test_loss_is_a_finite_scalar_and_so_are_the_metrics(case):
  (loss, metrics), _ = case.gradients(case.params)
  for value in (loss, *metrics.values()):
    assert value.shape == ()
    assert np.isfinite(value)


def test_every_trained_network_has_a_gradient_from_the_first_update_and_in_all_layers_soon(case):
  """The zeros of a new network hide what lies before them: for one update, and in blocks for two."""
  params = case.params
  ends = {'head': ('logit', 'conv0')}
  for update in range(3):
    _, gradient = case.gradients(params)
    for name, network in gradient.items():
      largest = {module: size(leaves) for module, leaves in network.items()}
      last, first = ends.get(name, ('conv_out', 'conv_in'))
      assert np.isfinite(list(largest.values())).all()
      assert largest[last] > 1e-6 or (update == 0 and name == 'student'), name
      if update >= 1:
        assert largest[first] > 1e-6, name
      if update >= 2:
        assert min(largest.values()) > 1e-6, (name, largest)
    params = jax.tree.map(lambda p, g: p - 0.01 * np.sign(g), params, gradient)


@pytest.mark.parametrize('which', ['key', 'rng'])
def test_loss_is_a_function_of_the_key_of_the_draws_and_of_that_of_dropout(case, which):
  moved = jax.tree.map(lambda p: p + 0.05, case.params)
  one, same, other = (case.gradients(moved, **{which: jax.random.key(seed)})[0][0] for seed in (1, 1, 2))
  assert one == same
  if which == 'rng' or case.method.draw(KEY, SHAPE):
    assert one != other


def test_a_method_is_an_argument_of_a_compiled_step(case):
  """Numbers are leaves, all else is hashable: an equal method does not trace anew."""
  traces = []

  @jax.jit
  def step(method):
    traces.append(method)
    return 0

  for method in (case.method, dataclasses.replace(case.method)):
    step(method)
  assert len(traces) == 1


VARIANTS = {
  **{name: build(cls) for name, cls in METHODS.items() if name != 'dmd2'},
  'discrete': Denoising(SCHEDULE, SnrTrunc(), times.Uniform(stratified=True), num_steps=1000),
  'by_three': Progressive(4, SCHEDULE, SnrTrunc(), factor=3),
  'by_four': Progressive(4, SCHEDULE, SnrTrunc(), factor=4),
  'heun': Consistency(100, 2, 8, SCHEDULE, solver=Heun(), follows_average=False),
  'dmd_by_scores_alone': dmd2(fake_updates=1, gan=None),
  'dmd2': dmd2(),
  'dmd2_in_steps': dmd2(num_steps=3),
  'dmd2_of_data': dmd2(num_steps=4, simulated=False, gan=None),
}
every_variant = pytest.mark.parametrize('method', VARIANTS.values(), ids=VARIANTS)


class Shifted:
  """A denoiser of one parameter, which shifts the images that have a class."""

  conditioning: ClassVar = {'label': Classes(3)}

  def __call__(self, params, z, logsnr, cond, rng=None):
    x, eps = GAUSSIAN(z, logsnr)
    shift = params * (cond['label'] >= 0)[:, None, None, None]
    return Prediction(x + shift, eps - shift)

  def bottleneck(self, params, z, logsnr, cond, place='h'):
    return jnp.repeat(z + params, GAN.width, axis=-1)


def given(method):
  """Images, labels, stored pairs, and what the method draws."""
  x, noise, image = jax.random.uniform(KEY, (3, *SHAPE), minval=-1.0)
  cond = {'label': jnp.arange(len(x)) % 3, 'guidance': jnp.linspace(0.0, 4.0, len(x))}
  pairs = {'noise': noise, 'image': image, 'cond': cond}
  return {'x': x, 'cond': cond, 'pairs': pairs} | method.draw(KEY, SHAPE)


FROZEN = {'teacher': jnp.array(0.2), 'average': jnp.array(0.15)}


def shifts(method):
  """The parameters of the networks in training: shifts that differ, and a head if the method has one."""
  params = method.init(jnp.array(0.1), FROZEN['teacher'], KEY)
  return params | ({'fake_score': jnp.array(-0.1)} if 'fake_score' in params else {})


@every_variant
def test_draws_are_a_function_of_the_key_and_have_the_batch_in_front(method):
  one, same, other = (method.draw(jax.random.key(seed), SHAPE) for seed in (1, 1, 2))
  for name, values in one.items():
    assert values.shape[0] == SHAPE[0]
    assert (values == same[name]).all()
    assert (values != other[name]).any()


@every_variant
def test_networks_are_called_as_often_as_is_said(method, monkeypatch):
  """In the mean over a period; the way down to the innermost activations is half a call."""
  calls = []

  def unrolled(low, high, body, state):
    return functools.reduce(lambda state, k: body(k, state), range(low, high), state)

  class Counting(Shifted):
    def __call__(self, *args):
      calls.append(1.0)
      return super().__call__(*args)

    def bottleneck(self, *args):
      calls.append(0.5)
      return super().bottleneck(*args)

  monkeypatch.setattr(jax.lax, 'fori_loop', unrolled)
  for step in range(method.period):
    bound = nets(method, shifts(method), FROZEN, Counting())
    jax.eval_shape(method.at(step).loss, bound, given(method), None, step)
  assert sum(calls) / method.period == pytest.approx(method.calls)


class Watched(dict):
  """A dict that knows which of its entries were asked for."""

  def __init__(self, *args):
    super().__init__(*args)
    self.asked = set()

  def __getitem__(self, key):
    self.asked.add(key)
    return super().__getitem__(key)


@every_variant
def test_the_loss_takes_what_the_method_says_that_it_needs_and_nothing_else(method):
  """Over a period: of the batch `needs` and what was drawn, and every network of `networks`."""
  entries = {'images': 'x', 'labels': 'cond', 'pairs': 'pairs'}
  needed = {entries[name] for name in method.needs}
  batch, bound = Watched(given(method)), Watched(nets(method, shifts(method), FROZEN))
  for step in range(method.period):
    jax.eval_shape(lambda step=step: method.at(step).loss(bound, batch, None, step)[0])
  assert batch.asked - set(method.draw(KEY, SHAPE)) == needed
  assert bound.asked == set(method.networks('student', 'teacher'))
  assert set(method.init(None, None, KEY)) <= bound.asked


@every_variant
def test_the_loss_of_a_batch_is_the_mean_over_its_examples(method):
  """Each with its own draws: a batch may be cut into micro-batches."""
  data = given(method)

  @jax.jit
  def loss(chosen):
    examples = jax.tree.map(lambda a: a[chosen], data)
    return method.loss(nets(method, shifts(method), FROZEN), examples, None, 0)[0]

  alone = [loss(jnp.full(8, k)) for k in range(8)]
  assert np.std(alone) > 0.01 * np.mean(alone)
  np.testing.assert_allclose(loss(jnp.arange(8)), np.mean(alone), rtol=1e-5)


@every_variant
def test_turns_repeat_after_a_period_and_every_network_has_one(method):
  turns = [method.at(step) for step in range(2 * method.period)]
  assert turns[: method.period] == turns[method.period :]
  assert {name for turn in turns for name in turn.trained} == set(method.init(None, None, KEY))
