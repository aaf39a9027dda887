"""Students that take the weight of guidance as an input, where the guided denoiser is known in closed form."""

import dataclasses
import types
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from diffusion_distillation.diffusion import schedules, times
from diffusion_distillation.diffusion.guidance import Guidance
from diffusion_distillation.diffusion.process import Prediction, alpha_sigma, diffuse
from diffusion_distillation.diffusion.weightings import Constant, SnrTrunc
from diffusion_distillation.errors import UserError
from diffusion_distillation.methods.dmd import DMD
from diffusion_distillation.methods.guided import GuidedDistillation
from diffusion_distillation.methods.progressive import Progressive
from diffusion_distillation.networks.conditioning import Weights, conditions, withheld
from diffusion_distillation.networks.denoiser import Bound, Denoiser
from diffusion_distillation.networks.guidance import Guided, GuidedByExample
from diffusion_distillation.networks.spaces import Pixels
from diffusion_distillation.networks.unet import UNet
from diffusion_distillation.stages import extending, provenance
from diffusion_distillation.training import step as update
from diffusion_distillation.training.optimizers import Adam, LearningRate
from diffusion_distillation.training.recipe import Recipe
from tests import tiny
from tests.evaluation.guidance_test import LABELS, Exact
from tests.exact import Gaussian

SCHEDULE = schedules.Cosine(logsnr_min=-6.0, logsnr_max=6.0)
MEANS, BETWEEN, STD = (0.5, -0.4), 0.05, 0.3
TEACHER = Exact(tuple(Gaussian(mean, STD) for mean in MEANS), Gaussian(BETWEEN, STD))
RANGE = (0.0, 4.0)


def exact(z, logsnr, label, weight):
  """With one variance for all, guidance moves the mean: m + W (m - m_unconditional); -1 has no class."""
  mean = jnp.array((*MEANS, BETWEEN))[label]
  moved = Gaussian((mean + weight * (mean - BETWEEN))[:, None, None, None], STD)
  return moved(z, logsnr)


@dataclasses.dataclass(frozen=True)
class Linear:
  """x = (p0 z + sigma^2 (b_c + W g_c)) / v, v = alpha^2 STD^2 + sigma^2: the guided denoiser is one of these.

  p0 stands for alpha STD^2; b_c and g_c are what is learned, of two classes and of none.
  """

  conditioning: ClassVar = FrozenDict(conditions(2, RANGE))

  def init(self):
    return {'bias': jnp.zeros(3), 'gain': jnp.zeros(3)}

  def __call__(self, params, z, logsnr, cond, rng=None):
    alpha, sigma = alpha_sigma(logsnr, z)
    label = cond['label']
    mean = (params['bias'][label] + cond['guidance'] * params['gain'][label])[:, None, None, None]
    residual = (z - alpha * mean) / (alpha**2 * STD**2 + sigma**2)
    return Prediction(mean + alpha * STD**2 * residual, sigma * residual)


STUDENT = Linear()
SMALL = {'out_ch': 1, 'ch': 8, 'emb_ch': 32, 'ch_mult': (1,), 'num_res_blocks': 1, 'num_groups': 4}


def recipe(method, student=STUDENT, teacher=TEACHER, **changes):
  given = {
    'networks': FrozenDict(method.networks(student, teacher)),
    'method': method,
    'optimizer': Adam(clip_norm=10.0),
    'learning_rate': {'student': LearningRate(0.05, 400, 0, 'linear')},
    'ema_decay': (0.0,),
    'seed': 0,
    'space': Pixels(),
    'shape': (32, 2, 2, 1),
  }
  return Recipe(**given | changes)


def train(recipe, params, frozen, num_updates=400):
  """Trains with the step of every run, on data of a third class: what is learned must not depend on the data."""
  state = recipe.create_state(params)
  step = jax.jit(update.train_step)
  rng = np.random.default_rng(0)
  for _ in range(num_updates):
    image = rng.integers(0, 256, recipe.shape).astype(np.uint8)
    cond = {'label': rng.integers(-1, 2, recipe.shape[0]).astype(np.int32)}
    state, metrics = step(recipe, state, frozen, {'image': image, 'cond': cond})
  return state.params['student'], metrics


@pytest.fixture(scope='module')
def first_stage():
  method = GuidedDistillation(SCHEDULE, Constant())
  return train(recipe(method), STUDENT.init(), {'teacher': {}})[0]


def errors(params, student=STUDENT):
  """The largest error in x of each label at weights over the whole range and at all noise levels."""
  found = []
  for label in (0, 1, -1):
    weight = jnp.linspace(*RANGE, 33)
    logsnr = jnp.tile(jnp.linspace(-6.0, 6.0, 11), 3)
    z = jax.random.normal(jax.random.key(label + 1), (33, 2, 2, 1))
    told = jnp.full(33, label, jnp.int32)
    guided = student(params, z, logsnr, {'label': told, 'guidance': weight})
    found.append(float(jnp.abs(guided.x - exact(z, logsnr, told, weight).x).max()))
  return found


def test_the_first_stage_reaches_the_guided_denoiser_over_the_whole_range_of_weights(first_stage):
  """Without a class, every weight gives the unconditional denoiser; the teacher at weight 0 is 1.8 away at weight 4."""
  assert max(errors(first_stage)) < 0.01
  assert errors(STUDENT.init())[0] > 1.0


def test_a_round_keeps_the_guided_denoiser(first_stage):
  """Where the teacher is the guided denoiser of all weights, its two steps are one step of the guided law's flow."""
  method = Progressive(4, SCHEDULE, SnrTrunc())
  z, i = jax.random.normal(jax.random.key(1), (5, 2, 2, 1)), jnp.array([1, 2, 3, 4, 4])
  cond = {'label': jnp.array([0, 1, 1, -1, 0]), 'guidance': jnp.array([0.0, 0.5, 1.0, 2.0, 4.0])}
  nets = {name: Bound(net, first_stage) for name, net in method.networks(STUDENT, STUDENT).items()}

  def law(z, logsnr, cond, rng=None):
    return exact(z, logsnr, cond['label'], cond['guidance'])

  found = method.target_x(nets['teacher'], z, i, cond)
  np.testing.assert_allclose(found, method.target_x(law, z, i, cond), atol=0.02)
  one_weight = Guided(TEACHER, Guidance(2.0))
  by_two_calls = method.target_x(Bound(one_weight, {}), z, i, {'label': cond['label']})
  np.testing.assert_allclose(found[3:4], by_two_calls[3:4], atol=0.02)

  # The parameters of the student that is distilled from it: those of its teacher, up to what a step of DDIM bends.
  rates = {'student': LearningRate(0.01, 100, 0, 'linear')}
  after, _ = train(
    recipe(method, teacher=STUDENT, learning_rate=rates), first_stage, {'teacher': first_stage}, 100
  )
  for name in ('bias', 'gain'):
    np.testing.assert_allclose(after[name], first_stage[name], atol=0.05)


def test_dmd_is_at_rest_where_the_generator_has_the_guided_law_of_each_weight():
  """Both scores are told the weight: that of the generator's images is not that of the teacher's at another weight."""
  truth = {'bias': jnp.array((*MEANS, BETWEEN))}
  truth['gain'] = truth['bias'] - BETWEEN
  dmd = DMD(SCHEDULE, SnrTrunc(), regression=0.0)
  nets = {name: Bound(net, truth) for name, net in dmd.networks(STUDENT, STUDENT).items()}
  rngs = jax.random.split(jax.random.key(0), 2)
  eps, noise = (jax.random.normal(rng, (4, 4, 4, 1)) for rng in rngs)
  weight, label = jnp.array([0.0, 1.0, 4.0, 2.0]), jnp.array([0, 1, 1, -1])
  mean = truth['bias'][label] + weight * truth['gain'][label]
  x = mean[:, None, None, None] + STD * noise
  batch = {'t': jnp.array([0.2, 0.5, 0.7, 0.9]), 'eps': eps}
  sizes = {}
  for shift in (0.0, 1.0):
    batch['cond'] = {'label': label, 'guidance': weight}
    fake = {
      **truth,
      'bias': truth['bias'] + shift * truth['gain'],
    }  # as if the generator's weight were larger
    sizes[shift] = dmd.matching_losses(nets | {'fake_score': Bound(STUDENT, fake)}, x, batch)[1]
  assert (sizes[0.0] < 1e-4).all()
  assert (sizes[1.0][:3] > 0.1).all()


def test_the_target_is_the_two_calls_of_each_examples_weight():
  z, logsnr = jax.random.normal(jax.random.key(0), (3, 2, 2, 1)), jnp.array([-3.0, 0.0, 3.0])
  cond = LABELS | {'guidance': jnp.array([0.0, 1.5, 3.0])}
  Exact.calls.clear()
  found = GuidedByExample(TEACHER)({}, z, logsnr, cond)
  assert [list(labels) for labels in Exact.calls] == [[0, 1, -1], [-1, -1, -1]]
  for k, weight in enumerate((0.0, 1.5, 3.0)):
    by_one = (
      Guided(TEACHER, Guidance(weight))({}, z, logsnr, LABELS)
      if weight
      else TEACHER({}, z, logsnr, LABELS)
    )
    for one, other in zip(found, by_one, strict=True):
      np.testing.assert_array_equal(one[k], other[k])


def test_weights_are_drawn_for_each_example_and_never_withheld():
  """A function of (seed, step), uniform over the range; dropping the class leaves the weight."""
  method = GuidedDistillation(SCHEDULE, Constant())
  made = recipe(method, shape=(4096, 1, 1, 1), cond_dropout=0.5)
  batch = {'image': np.zeros(made.shape, np.uint8), 'cond': {'label': np.zeros(4096, np.int32)}}
  keys = jax.random.split(jax.random.key(0), 2)
  cond, other = (update.make_examples(made, batch, key, key)['cond'] for key in keys)
  weight = np.asarray(cond['guidance'])
  assert weight.dtype == np.float32 and (weight != np.asarray(other['guidance'])).mean() > 0.99
  np.testing.assert_allclose(
    np.quantile(weight, (0.0, 0.25, 0.5, 0.75, 1.0)), (0, 1, 2, 3, 4), atol=0.15
  )
  dropped = np.asarray(cond['label']) == -1
  assert 0.4 < dropped.mean() < 0.6 and abs(weight[dropped].mean() - 2.0) < 0.15
  assert (withheld(conditions(2, RANGE), cond)['guidance'] == weight).all()
  assert 'guidance' not in update.make_examples(recipe(method, student=TEACHER), batch, *keys)['cond']


def test_the_weights_of_pairs_fill_the_range_for_each_class():
  known, index = Weights(1.0, 3.0), np.arange(10_000)
  found = known.spread(index)
  for label in range(10):
    own = found[index % 10 == label]
    np.testing.assert_allclose(np.sort(own), np.linspace(1.0, 3.0, 1000), atol=0.01)
  np.testing.assert_array_equal(known.spread(index[70:80]), found[70:80])
  np.testing.assert_array_equal(known.in_turn(index[:3]), 1.0)


@pytest.mark.parametrize('given', [(0.0,), (), (2.0, 1.0), (1.0, 1.0), (0.0, 1.0, 2.0)])
def test_a_range_that_is_none_is_refused(given):
  with pytest.raises(UserError, match=r'^guided.weights=\('):
    tiny.plan(**STAGES | {'guided__weights': given})


STAGES = {
  'methods': ('guided', 'progressive'),
  'model__conditional': True,
  'dataset__label_dropout': 0.1,
}


def test_methods_after_guided_are_its_students_and_those_before_it_the_bases():
  methods = ('dmd', 'guided', 'progressive', 'consistency')
  changes = {'methods': methods, 'pairs__guidance': 1.0, 'dmd__guidance': 1.0}
  base, dmd, guided, first, second, consistency = tiny.plan(**STAGES | changes)[0]
  assert [stage.parent for stage in (dmd, guided)] == ['base', 'base']
  assert dmd.denoise == base.denoise and dmd.start == 'base'
  assert [stage.parent for stage in (first, second, consistency)] == ['guided', first.name, 'guided']
  assert guided.num_steps == base.num_steps and guided.measured_steps == (base.num_steps,)
  for stage in (guided, first, second, consistency):
    assert stage.denoise.network.guidance == (0.0, 4.0)
    assert not stage.starts_anew and stage.adds_input == (stage is guided)
  assert guided.recipe.networks['teacher'] == GuidedByExample(base.denoise)
  assert first.recipe.networks['teacher'] == consistency.recipe.networks['teacher'] == guided.denoise


REFUSED = [
  ({'dataset__label_dropout': 0.0}, r'^guided.weights=4: .*without label dropout'),
  (
    {'dataset__label_dropout': 0.0, 'model__conditional': False},
    r'^guided.weights=4: guidance needs a class-conditional model',
  ),
  (
    {'distill__guidance': 1.0},
    r'^distill.guidance=1: the teacher, guided, takes the weight as an input',
  ),
  ({'methods': ('guided', 'dmd'), 'dmd__guidance': 1.0}, r'^dmd.guidance=1: the teacher, guided, takes'),
  (
    {'methods': ('guided', 'knowledge'), 'pairs__guidance': 1.0},
    r'^pairs.guidance=1: the teacher, guided',
  ),
  (
    {'methods': ('dmd', 'guided', 'knowledge')},
    r'^dmd and knowledge need stored pairs of different teachers, base and',
  ),
]


@pytest.mark.parametrize(('changes', 'message'), REFUSED)
def test_a_plan_that_cannot_be_is_refused_by_the_key(changes, message):
  with pytest.raises(UserError, match=message) as error:
    tiny.plan(**STAGES | changes)
  assert '\n' not in str(error.value)


def test_the_weighted_error_counts_noise_and_classes_alike():
  """The loss of stage one is the error of x at the weight of each example."""
  method = GuidedDistillation(SCHEDULE, Constant())
  batch = {'x': jnp.zeros((3, 2, 2, 1)), 'cond': LABELS | {'guidance': jnp.array([1.0, 2.0, 3.0])}}
  batch |= method.draw(jax.random.key(0), (3, 2, 2, 1))
  params = {'bias': jnp.array([0.1, 0.2, 0.3]), 'gain': jnp.array([0.3, -0.2, 0.1])}
  nets = {name: Bound(net, params) for name, net in method.networks(STUDENT, TEACHER).items()}
  logsnr = SCHEDULE(batch['t'])
  z = diffuse(batch['x'], batch['eps'], logsnr)
  target = exact(z, logsnr, batch['cond']['label'], batch['cond']['guidance']).x
  x = STUDENT(params, z, logsnr, batch['cond']).x
  np.testing.assert_allclose(
    method.losses(nets, batch), jnp.mean((target - x) ** 2, (1, 2, 3)), rtol=1e-4
  )
  assert isinstance(method.law, times.Uniform)


def test_rounds_of_the_base_are_not_taken_for_those_of_the_first_stage(tmp_path):
  """Before anything is trained: `methods` may change in a workdir, and so may who teaches a round."""
  before = STAGES | {'methods': ('progressive',)}
  config, (_, first, _) = tiny.config(**before), tiny.plan(**before)[0]
  teacher = types.SimpleNamespace(stage=types.SimpleNamespace(name='base'), weights='ema', digest='a')
  provenance.begin_stage(tmp_path, first, provenance.Parents(teacher, teacher), config)
  extending.check_configs(tmp_path, tiny.plan(**before)[0], config)
  with pytest.raises(
    UserError, match='its teacher was base, but with these methods it is guided; remove'
  ):
    extending.check_configs(tmp_path, tiny.plan(**STAGES)[0], tiny.config(**STAGES))


@pytest.mark.slow
def test_a_network_learns_the_guided_denoiser_of_all_weights():
  """From new parameters, on noised images: at weight 4, guidance moves x by 1.4."""
  network = UNet(**SMALL, num_classes=2, guidance=RANGE)
  student, rates = Denoiser(network, 'v'), {'student': LearningRate(5e-3, 400, 0, 'linear')}
  method = GuidedDistillation(SCHEDULE, SnrTrunc())
  made = recipe(method, student=student, shape=(64, 4, 4, 1), learning_rate=rates)
  params, _ = train(made, student.init(jax.random.key(0), (4, 4, 1)), {'teacher': {}})
  rngs, logsnr = jax.random.split(jax.random.key(1)), jnp.linspace(-6.0, 6.0, 64)
  x = jax.random.uniform(rngs[0], (64, 4, 4, 1), minval=-1.0)
  z = diffuse(x, jax.random.normal(rngs[1], x.shape), logsnr)
  for label in (0, 1, -1):
    told = jnp.full(64, label, jnp.int32)
    for weight in (0.0, 0.5, 1.0, 2.0, 4.0):
      weights = jnp.full(64, weight)
      found = student(params, z, logsnr, {'label': told, 'guidance': weights}).x
      error = found - exact(z, logsnr, told, weights).x
      assert float(jnp.sqrt(jnp.mean(jnp.square(error)))) < 0.35, (label, weight)
