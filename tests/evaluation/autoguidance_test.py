"""Autoguidance: a weaker model guides in place of the unconditional predictions, against truth and through every door."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation import cli
from diffusion_distillation.diffusion import process, samplers, schedules, times
from diffusion_distillation.diffusion.guidance import NONE, Guidance
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import curves, measure, results, sampling
from diffusion_distillation.evaluation.loading import LoadedModel
from diffusion_distillation.networks import NETWORKS
from diffusion_distillation.networks.conditioning import Classes
from diffusion_distillation.networks.guidance import AutoParams, Guided, GuidingModel
from diffusion_distillation.networks.spaces import Pixels
from diffusion_distillation.run import pairs
from diffusion_distillation.stages import guiding_models, parts
from diffusion_distillation.stages import model as models
from tests import tiny
from tests.evaluation.guided_model_test import DEFAULT
from tests.exact import Gaussian
from tests.networks.denoiser_test import Small
from tests.run import pairs_test
from tests.stages.model_test import stored

SCHEDULE = schedules.Cosine()


@dataclasses.dataclass(frozen=True)
class Exact:
  """The exact denoiser of Gaussian pixels around its parameter, moved by 0.1 for class 1 if it takes classes."""

  std: float = 0.3
  classes: int = 0

  @property
  def conditioning(self):
    return {'label': Classes(self.classes)} if self.classes else {}

  def __call__(self, mean, z, logsnr, cond, rng=None):
    CALLS.append(self.std)
    own = 0.0 if cond is None else 0.1 * process.widen(cond['label'], z)
    return Gaussian(mean + own, self.std)(z, logsnr)


CALLS: list[float] = []


def drawer(guidance, sampler=None, classes=0, weaker=None, mean=0.1):
  guiding = GuidingModel(weaker or Exact(), 'digest', jnp.float32(mean))
  given = (Exact(classes=classes), sampler or samplers.DDIM(), SCHEDULE, Pixels(), (2, 2, 1), 8)
  return sampling.Drawer(*given, clip_x=False, guidance=guidance, guiding=guiding)


def run(draw, grid, z, cond=None, mean=0.3):
  keys = jax.random.split(jax.random.key(0), len(z))
  params = draw.on_devices(jnp.float32(mean))
  return np.asarray(sampling.from_noise(draw, params, jnp.asarray(grid), jnp.asarray(z), keys, cond))


def noise(count=5):
  return np.random.default_rng(0).normal(size=(count, 2, 2, 1)).astype(np.float32)


@pytest.mark.parametrize('weight', [0.5, 2.0])
def test_sampling_follows_the_flow_of_the_law_moved_away_from_the_weaker_model(weight):
  """With one variance for both, guidance moves the mean m of the model: m + W (m - m of the weaker model)."""
  z, grid = noise(), times.uniform(64)
  for label in (0, 1):
    cond = {'label': jnp.full(5, label, jnp.int32)}
    found = run(drawer(Guidance(weight), samplers.Heun(), classes=2), grid, z, cond)
    own = 0.3 + 0.1 * label  # the weaker model is unconditional, and its mean 0.1
    law = Gaussian(own + weight * (own - 0.1), 0.3)
    expected = law.probability_flow(z, float(SCHEDULE(1.0)))
    np.testing.assert_allclose(found, expected, atol=2e-3)


def test_the_guided_score_is_the_models_raised_against_the_weaker_models():
  """eps = -sigma grad log p(z)^(1 + W) / q(z)^W, for Gaussians p and q of different variance."""
  z, logsnr, weight = noise(3), jnp.array([-3.0, 0.3, 4.0]), 1.5
  guided = Guided(Exact(), Guidance(weight), Exact(0.6))
  x, eps = guided(AutoParams(jnp.float32(0.3), jnp.float32(0.1)), z, logsnr, None)
  alpha, sigma = (np.asarray(a, np.float64) for a in process.alpha_sigma(logsnr, z))

  def score(mean, std):
    return -(z - alpha * mean) / ((alpha * std) ** 2 + sigma**2)

  expected = (1 + weight) * score(0.3, 0.3) - weight * score(0.1, 0.6)
  np.testing.assert_allclose(eps, -sigma * expected, atol=2e-5)
  np.testing.assert_allclose(process.diffuse(x, eps, logsnr), z, atol=1e-5)


@pytest.mark.parametrize('name', ['heun', 'dpm_solver_2m', 'multistep_consistency'])
def test_the_weaker_model_is_only_called_in_guided_steps_and_is_counted(name):
  sampler, grid = samplers.SAMPLERS[name](), times.uniform(4)
  for guidance in (Guidance(2.0, 0.9, 3.0), Guidance(2.0)):
    CALLS.clear()
    with jax.disable_jit():
      run(drawer(guidance, sampler, weaker=Exact(0.6)), grid, noise(1))
    assert len(CALLS) == guidance.calls(sampler, grid, SCHEDULE)
    assert CALLS.count(0.3) == sampler.calls(4)


def test_without_weight_a_guiding_model_changes_nothing():
  z, grid = noise(), times.uniform(4)
  plain = dataclasses.replace(drawer(NONE), guiding=None)
  np.testing.assert_array_equal(run(drawer(NONE), grid, z), run(plain, grid, z))


def test_a_compiled_program_holds_no_parameters_and_serves_other_guiding_models():
  near, far = (drawer(Guidance(1.0), mean=mean) for mean in (0.1, -0.1))
  assert near.program.guiding.params is None and near.program == far.program
  images = [draw.draw(jnp.float32(0.2), times.uniform(4), 8, 3) for draw in (near, far)]
  assert (images[1].astype(int) - images[0]).mean() > 5  # it moves further from the farther one


STRONG = stored(Small(1, num_classes=3), num_steps=3)  # without label dropout


@pytest.fixture
def folders(tmp_path, monkeypatch):
  """The folders of a model and of a weaker one, and what else could be named."""
  monkeypatch.setitem(NETWORKS, 'small', Small)
  monkeypatch.setattr('diffusion_distillation.system.interrupts.install', lambda: None)
  weaker = stored(Small(1, num_classes=3), num_steps=5)
  weaker = dataclasses.replace(
    weaker, params=jax.tree.map(lambda p: 0.5 * p, STRONG.params), digest=None
  )
  larger = dataclasses.replace(STRONG, image_shape=(16, 16, 1))
  for name, model in (
    ('strong', STRONG),
    ('weaker', weaker),
    ('larger', larger),
    ('classes', stored(Small(1, num_classes=4))),
    ('plain', stored(Small(1))),
  ):
    models.write(tmp_path / name, model)
  return tmp_path


def expected(folders, name, weight):
  read = models.read(folders / name)
  draw = LoadedModel(STRONG).drawer(
    samplers.DDIM(),
    STRONG.clip_x,
    5,
    Guidance(weight),
    GuidingModel(read.denoise, 'digest', read.params),
  )
  return draw.draw(STRONG.params, times.uniform(3), 5, 7)


def test_a_model_is_sampled_with_a_guiding_model(folders, capsys):
  """In Python and by the command line; neither label dropout nor conditions of the guiding model are needed."""
  model = LoadedModel(STRONG)
  for name in ('weaker', 'plain'):
    found = model.sample(5, seed=7, guidance=2.0, guiding_model=folders / name)
    np.testing.assert_array_equal(found, expected(folders, name, 2.0))
    assert (found != model.sample(5, seed=7)).any()
  given = {'mode': 'sample', 'config': None, 'default': DEFAULT, 'workdir': folders / 'strong'}
  given |= {'num_samples': 5, 'seed': 7, 'guidance': 2.0, 'out': folders / 'x.npz'}
  assert cli.run(cli.Options(**given, guiding_model=folders / 'weaker')) == 0
  assert ' in 3 ddim steps, 6 network calls each' in capsys.readouterr().out
  np.testing.assert_array_equal(np.load(folders / 'x.npz')['images'], expected(folders, 'weaker', 2.0))


@pytest.mark.parametrize(
  ('name', 'guidance', 'message'),
  [
    ('weaker', 0.0, r'^guiding_model=.*weaker only applies to a guidance above 0'),
    ('larger', 1.0, r'^guiding_model=.*larger: this model draws images of shape \(16, 16, 1\)'),
    (
      'classes',
      1.0,
      r"^guiding_model=.*classes: this model takes 4 classes as 'label', and .* takes 3 classes",
    ),
    ('nothing', 1.0, r'^guiding_model=.*nothing: .* holds no model'),
  ],
)
def test_a_guiding_model_that_does_not_fit_is_refused_in_one_line(folders, name, guidance, message):
  with pytest.raises(UserError, match=message):
    LoadedModel(STRONG).sample(1, guidance=guidance, guiding_model=folders / name)


def test_an_unconditional_model_has_no_use_for_a_guiding_model_with_classes(folders):
  plain = models.read(folders / 'plain')
  with pytest.raises(UserError, match="as 'label', and the one that it should guide has no such input"):
    LoadedModel(plain).sample(1, guidance=1.0, guiding_model=folders / 'weaker')


def test_a_model_that_takes_the_weight_is_not_guided_by_another(folders):
  with pytest.raises(UserError, match='takes the weight of guidance as an input'):
    weights = {'guidance': parts.conditioning.Weights(0.0, 2.0)}
    guiding_models.read('k', folders / 'plain', weights, STRONG.space, STRONG.image_shape)


def test_the_base_is_evaluated_and_pairs_are_drawn_with_a_guiding_model(tmp_path):
  """The rows and pairs record it; students are not guided, and plans refuse what does not fit."""
  base = tiny.plan()[0][0]
  network = base.denoise
  params = jax.tree.map(np.asarray, network.init(jax.random.key(0), base.image_shape))
  weaker = stored(Small(1))
  weaker = dataclasses.replace(
    weaker, denoise=network, params=params, image_shape=base.image_shape, digest=None
  )
  models.write(tmp_path / 'weaker', weaker)
  path = str(tmp_path / 'weaker')
  changes = {'evaluation__guidance': (0.0, 1.5), 'evaluation__guiding_model': path}
  changes |= {'pairs__guiding_model': path, 'pairs__guidance': 0.5, 'methods': ('knowledge',)}
  config, stages = tiny.config(**changes), tiny.plan(**changes)[0]
  digest = models.read(tmp_path / 'weaker').digest
  assert stages[1].pairs.guiding.digest == digest and stages[1].pairs.guidance == Guidance(0.5)
  model = types.SimpleNamespace(stage=stages[0], weights='ema', digest='d')
  guiding = parts.guiding_of('evaluation', path, (0.0, 1.5), stages[0])
  setting = measure.Setting(model, 'ddim', 4, 3, Guidance(1.5), guiding)
  row = measure.describe(config, setting)
  assert row['guiding_model'] == digest and row['nfe'] == 8
  draw = measure.drawer(config, stages[0], 'ddim', (), Guidance(1.5), guiding)
  assert draw.guiding == guiding
  without = measure.describe(config, dataclasses.replace(setting, guiding=None))
  assert results.key_of(json.loads(json.dumps(row))) != results.key_of(without)
  before = {key: value for key, value in without.items() if key != 'guiding_model'}
  assert results.key_of(before) == results.key_of(without)
  shown = {**row, 'value': 1.0, 'method': 'denoising'}
  assert list(curves.curves([shown])) == ['Base, DDIM, autoguidance 1.5']
  for wrong, message in (
    ({'evaluation__guidance': (0.0,)}, r'^evaluation.guiding_model=.* only applies to'),
    ({'pairs__guidance': 0.0}, r'^pairs.guiding_model=.* only applies to pairs.guidance above 0'),
    ({'pairs__guiding_model': str(tmp_path)}, r'^pairs.guiding_model=.* holds no model'),
  ):
    with pytest.raises(UserError, match=message):
      tiny.plan(**changes | wrong)


def test_pairs_of_a_guiding_model_follow_the_flow_of_the_law_moved_away_from_it(tmp_path):
  """With one variance for both, guidance moves the mean m of the teacher: m + W (m - m of the weaker model)."""
  guided = dataclasses.replace(
    pairs_test.ONE,
    guidance=Guidance(0.5),
    guiding=GuidingModel(pairs_test.Exact(), 'of the weaker', np.float32(0.1)),
  )
  found = pairs_test.everything(pairs.ensure(tmp_path, guided, pairs_test.teacher()))
  expected = pairs_test.ddim(found['noise'], times.uniform(3), 0.2 + 0.5 * (0.2 - 0.1))
  np.testing.assert_allclose(found['image'], expected, atol=1e-5)
  with pytest.raises(UserError, match='guiding_model was of the weaker, is None'):
    pairs.ensure(tmp_path, dataclasses.replace(guided, guiding=None), pairs_test.teacher())
