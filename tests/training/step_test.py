"""One update: micro-batches, moving averages, and whose weights a round starts from."""

import dataclasses
import json

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from diffusion_distillation.diffusion.process import from_v
from diffusion_distillation.errors import UserError
from diffusion_distillation.methods import METHODS, Method, Student
from diffusion_distillation.networks.conditioning import Classes
from diffusion_distillation.run import run
from diffusion_distillation.run.inputs import shapes
from diffusion_distillation.stages import provenance, trained
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.system import sharding
from diffusion_distillation.system.checkpoints import digest
from diffusion_distillation.training import step as update
from diffusion_distillation.training.optimizers import Adam, LearningRate
from tests import tiny
from tests.run.loop_test import IMAGES, advance, assert_same

STUDENTS = [name for name, cls in METHODS.items() if issubclass(cls, Student)]


def assert_close(tree, other, rtol):
  """Up to rounding in float32, as a share of the largest entry of each array."""

  def check(a, b):
    np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol * np.abs(b).max() + 1e-9)

  jax.tree.map(check, sharding.to_host(tree), sharding.to_host(other))


@dataclasses.dataclass(frozen=True)
class Small:
  """A conditional denoiser that compiles at once: one dense layer over all pixels."""

  conditioning = FrozenDict({'label': Classes(10)})

  def init(self, rng, shape):
    size = int(np.prod(shape))
    kernel, classes = jax.random.split(rng)
    return {
      'kernel': jax.random.normal(kernel, (size, size)) / np.sqrt(size),
      'classes': jax.random.normal(classes, (10, size)),
      'time': jnp.zeros(size),
    }

  def __call__(self, params, z, logsnr, cond, rng=None):
    classes = jax.nn.one_hot(cond['label'], 10) @ params['classes']
    h = z.reshape(len(z), -1) @ params['kernel'] + classes
    v = jnp.tanh(h + logsnr[:, None] * params['time'][None, :])
    return from_v(z, logsnr, v.reshape(z.shape))


@flax.struct.dataclass
class Reporting:
  """A method that reports a mean over its batch as well."""

  method: Method
  trained = ('student',)
  period = 1

  def networks(self, student, teacher):
    return self.method.networks(student, teacher)

  def init(self, student, teacher, rng):
    return self.method.init(student, teacher, rng)

  def draw(self, rng, shape):
    return self.method.draw(rng, shape)

  def loss(self, nets, batch, rng, step):
    loss, _ = self.method.loss(nets, batch, rng, step)
    label = batch['cond']['label'][:, None, None, None]
    return loss, {'eps_of_label': jnp.mean(batch['eps'] * label)}


def small(place, **changes):
  """Stage `place` of a plan with stratified time and flips, over the small denoiser; 32 images a batch."""
  stage = tiny.plan(time__stratified=True, dataset__random_flip=True)[0][place]
  method = Reporting(stage.recipe.method)
  changes |= {'networks': FrozenDict(method.networks(Small(), Small())), 'shape': (32, 8, 8, 1)}
  changes |= {'learning_rate': {'student': LearningRate(0.01, 12)}}
  return dataclasses.replace(stage, recipe=stage.recipe.replace(method=method, **changes))


def small_params(seed):
  return Small().init(jax.random.key(seed), (8, 8, 1))


def small_state(stage):
  return sharding.replicate(stage.recipe.create_state(small_params(0)))


@pytest.mark.parametrize('backend', ['cpu', 'gpu'])
@pytest.mark.parametrize('place', [0, 1], ids=['base', 'round'])
def test_gradients_do_not_depend_on_the_number_of_micro_batches(place, backend, monkeypatch):
  """Over 8 devices, with labels and stratified time; without dropout, which alone depends on it.

  With the loop unrolled, as on a CPU, and left as it is, as elsewhere.
  """
  assert jax.device_count() == 8
  monkeypatch.setattr(jax, 'default_backend', lambda: backend)
  frozen = sharding.replicate({'teacher': small_params(1)} if place else {})
  images = IMAGES.images.batch(np.arange(32))
  outcomes = []
  for micro_batches in (1, 2, 4):
    recipe = small(place, micro_batches=micro_batches).recipe
    examples = {'x': recipe.space.encode(images['image']), 'cond': images['cond']}
    examples |= recipe.method.draw(jax.random.key(2), recipe.shape)
    networks, batch = {'student': small_params(0)}, sharding.put(examples)
    key, number = jax.random.key(3), jnp.int32(0)
    compiled = jax.jit(lambda *arguments: update.gradients(*arguments))
    outcomes.append(compiled(recipe, networks, frozen, batch, key, number))
  loss, metrics, grads = outcomes[0]
  assert float(loss) > 0 and float(metrics['eps_of_label']) != 0
  assert np.abs(grads['student']['classes']).max() > 1e-3
  for other in outcomes[1:]:
    assert_close(other, outcomes[0], rtol=1e-5)


@pytest.mark.parametrize('place', [0, 1], ids=['base', 'round'])
def test_updates_do_not_depend_on_the_number_of_micro_batches(step, place):
  """The whole step, with its flips. Adam's epsilon is above the rounding of gradients, which it divides by their size."""
  teacher = sharding.replicate(small_params(1)) if place else None
  outcomes = []
  for micro_batches in (1, 4):
    stage = small(place, micro_batches=micro_batches, optimizer=Adam(eps=1e-5))
    outcomes.append(advance(step, stage, small_state(stage), 3, teacher=teacher))
  (state, metrics), (other, other_metrics) = outcomes
  assert_close(other_metrics, metrics, rtol=1e-5)
  assert_close(other.params, state.params, rtol=1e-5)
  assert_close(other.ema_params, state.ema_params, rtol=1e-5)
  assert_close(other.opt_state, state.opt_state, rtol=1e-5)
  assert int(other.step) == 3 and digest(state.params) != digest(small_state(stage).params)


def test_every_average_is_the_decayed_sum_of_all_parameters_so_far(step):
  """d^k p_0 + (1 - d) sum_j d^(k - j) p_j, of the parameters as they were recorded, in float64."""
  decays = (0.9, 0.99, 0.0)
  stage = small(0, ema_decay=decays)
  state = small_state(stage)
  recorded = [sharding.to_host(state.params['student'])]
  for _ in range(6):
    state, _ = advance(step, stage, state, 1)
    recorded.append(sharding.to_host(state.params['student']))
  assert np.abs(recorded[6]['classes'] - recorded[0]['classes']).max() > 0.03
  for decay, average in zip(decays, state.ema_params, strict=True):
    shares = [decay**6, *((1 - decay) * decay ** (6 - j) for j in range(1, 7))]
    expected = jax.tree.map(lambda *p, w=shares: np.tensordot(w, np.float64(p), 1), *recorded)
    assert_close(average, expected, rtol=1e-6)


def test_a_ramp_keeps_the_half_life_of_the_averages_below_its_share_of_the_updates(step):
  """Half-lives of 0.5 (k + 1) updates until that of the decay is reached; in float64, from the recorded parameters."""
  stage = small(0, ema_decay=(0.6, 0.1, 0.0), ema_ramp=0.5)
  state = small_state(stage)
  expected = [sharding.to_host(state.params['student'])] * 3
  for k in range(4):
    state, _ = advance(step, stage, state, 1)
    params = sharding.to_host(state.params['student'])
    half_life = 0.5 * (k + 1)
    for j, decay in enumerate((0.6, 0.1, 0.0)):
      d = min(decay, 2 ** (-1 / half_life))
      expected[j] = jax.tree.map(lambda a, p, d=d: d * np.float64(a) + (1 - d) * p, expected[j], params)
  for average, wanted in zip(state.ema_params, expected, strict=True):
    assert_close(average, wanted, rtol=1e-6)


def test_further_averages_change_neither_the_parameters_nor_the_first_one(step):
  def after_six(*decays):
    stage = small(0, ema_decay=decays)
    return sharding.to_host(advance(step, stage, small_state(stage), 6)[0])

  one, three = after_six(0.9), after_six(0.9, 0.99, 0.0)
  assert (len(one.ema_params), len(three.ema_params)) == (1, 3)
  assert_same(three.replace(ema_params=three.ema_params[:1]), one)


@pytest.mark.slow
@pytest.mark.parametrize('weights', ['ema', 'last'])
def test_a_round_is_taught_by_and_starts_from_the_weights_that_are_named(
  step, tmp_path, monkeypatch, weights
):
  """A whole run, but for forecast and evaluation."""
  changes = {'train__num_updates': 3, 'distill__num_updates': (2,), 'distill__from_weights': weights}
  changes |= {'train__ema_decay': (0.9,), 'distill__ema_decay': (0.5,)}
  config, (planned, images) = tiny.config(**changes), tiny.plan(**changes)
  starts = []

  def watching(recipe, state, frozen, batch):
    if int(state.step) == 0 and frozen:
      starts.append(sharding.to_host((state.params['student'], frozen['teacher'])))
    return step(recipe, state, frozen, batch)

  monkeypatch.setattr(workdirs, 'plan_for', lambda *_: (planned, images))
  monkeypatch.setattr(sharding, 'compile_step', lambda _: watching)
  monkeypatch.setattr('diffusion_distillation.run.forecast.show', lambda *_: None)
  monkeypatch.setattr('diffusion_distillation.run.forecast.show_times', lambda *_: None)
  monkeypatch.setattr('diffusion_distillation.evaluation.measure.evaluate', lambda *_, **__: None)
  run.run(config, tmp_path)

  assert len(starts) == 2
  for parent, child, (start, teacher) in zip(planned, planned[1:], starts, strict=False):
    model = provenance.load_model(tmp_path, parent, config, parent.weights)
    assert digest(model.all['ema']) != digest(model.all['last'])
    assert_same(start, model.all[weights])
    assert_same(teacher, model.all[weights])
    found = json.loads((tmp_path / child.name / 'stage.json').read_text())
    expected = {'stage': parent.name, 'weights': weights, 'digest': digest(model.all[weights])}
    assert found['parent'] == found['start'] == expected


def test_a_model_has_all_the_weights_of_its_stage_by_name():
  stage = small(0, ema_decay=(0.9, 0.99))
  state = small_state(stage)
  averages = tuple(small_params(seed) for seed in (1, 2))
  model = trained.to_model(stage, state.replace(ema_params=averages), 0.0)
  named = {'ema': averages[0], 'ema_0.99': averages[1], 'last': state.params['student']}
  assert list(model.all) == list(named) == list(stage.weights)
  assert model.weights == 'ema' and model.digest == digest(averages[0])
  for name, params in named.items():
    used = model.use(name)
    assert_same(used.params, params)
    assert (used.weights, used.digest) == (name, digest(params))
  with pytest.raises(UserError) as error:
    model.use('ema_0.9')
  assert "--weights='ema_0.9' is not one of ['ema', 'ema_0.99', 'last']" in str(error.value)


@pytest.mark.parametrize('section', ['train', 'distill', *STUDENTS])
def test_batches_have_to_divide_by_micro_batches_and_devices(section):
  methods = (section,) if section in STUDENTS else ('progressive',)
  changes = {'methods': methods, f'{section}__batch_size': 16}
  run.check_batches(tiny.config(**changes, **{f'{section}__micro_batches': 2}))
  too_many = {f'{section}__micro_batches': 4}
  with pytest.raises(UserError) as error:
    run.check_batches(tiny.config(**changes, **too_many))
  for words in (f'{section}.batch_size=16', f'{section}.micro_batches=4', '8 devices', 'of 32'):
    assert words in str(error.value)
  if section in STUDENTS:  # nor does it matter where it is not asked for
    run.check_batches(tiny.config(**too_many))


@pytest.mark.parametrize('name', ['base', 'progressive_0001', *STUDENTS])
def test_no_key_is_drawn_from_twice(name):
  """By jax's own check of the traced update, with all that draws switched on; nothing is compiled."""
  changes = {'dataset__random_flip': True, 'dataset__dequantize': True, 'dataset__label_dropout': 0.1}
  changes |= {'model__conditional': True, 'model__dropout': 0.1, 'distill__start_steps': 2}
  stages, _ = tiny.plan(methods=('progressive', *STUDENTS), **changes)
  stage = next(stage for stage in stages if stage.name == name)
  recipe = stage.recipe.at(stage.recipe.method.period - 1)

  def advance(rng, batch):
    teacher = stage.init_teacher(rng)
    state = recipe.create_state(stage.init_params(rng), teacher)
    return update.train_step(recipe, state, stage.frozen(teacher, None), batch)

  with jax.debug_key_reuse(True):
    jax.eval_shape(advance, jax.random.key(0), shapes(stage, stage.batch_size))


def test_flips_have_a_key_of_their_own(monkeypatch):
  """They are not drawn with the key that dequantization's is folded from, which jax's own check would let pass."""
  seen = []
  monkeypatch.setattr(update.augment, 'flip', lambda rng, x: seen.append(rng) or x)
  stages, images = tiny.plan(dataset__random_flip=True, dataset__dequantize=True)
  key = jax.random.key(3)
  update.make_examples(stages[0].recipe, {'cond': None, **images.images.batch(range(16))}, key, key)
  assert [bool(jnp.all(jax.random.key_data(rng) == jax.random.key_data(key))) for rng in seen] == [False]
