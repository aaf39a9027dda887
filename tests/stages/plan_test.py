"""The plan of a run: rounds from any start to any end, and what each stage gets of the config."""

import itertools
import math

import jax
import pytest

from configs import default, digits
from diffusion_distillation import config as configuration
from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.schedules import Karras, LinearBeta, ShiftedCosine
from diffusion_distillation.errors import UserError
from diffusion_distillation.methods import METHODS, Denoising, Progressive
from diffusion_distillation.stages import plan as stages
from diffusion_distillation.stages import workdir
from tests import tiny


def plan(**overrides):
  return stages.plan(tiny.config(**overrides), (8, 8, 1), 10)


def test_rounds_halve_down_to_the_end():
  assert stages.rounds(32, 1) == [(16, 2), (8, 2), (4, 2), (2, 2), (1, 2)]
  assert stages.rounds(24, 3) == [(12, 2), (6, 2), (3, 2)]
  assert stages.rounds(8, 8) == []


@pytest.mark.parametrize('end', [1, 3, 10])
@pytest.mark.parametrize('factor', [(2,), (4,), (4, 2, 2), (2, 4), (5, 3)])
def test_rounds_lead_by_their_factors_from_any_start_to_any_end(factor, end):
  """The last factors are the last rounds'; the first one serves all rounds before."""
  for count in range(7):
    factors = [*[factor[0]] * (count - len(factor)), *factor[max(0, len(factor) - count) :]]
    start = end * math.prod(factors)
    found = stages.rounds(start, end, factor)
    assert [f for _, f in found] == factors
    steps = [start, *(n for n, _ in found)]
    assert all(t == f * s for f, (t, s) in zip(factors, itertools.pairwise(steps), strict=True))
    assert steps[-1] == end


@pytest.mark.parametrize(
  ('start', 'end', 'factor', 'nearest'),
  [
    (24, 1, (2,), 32),
    (32, 3, (2,), 48),
    (4, 8, (2,), 8),
    (12, 2, (2,), 16),
    (8, 1, (4,), 16),
    (8, 1, (4, 2, 2), 16),
    (5, 4, (3, 2), 8),
  ],
)
def test_steps_that_the_factors_do_not_reach_are_refused(start, end, factor, nearest):
  message = rf'start_steps={start} .*end_steps={end} by distill\.factor=\({factor[0]},.* {nearest}$'
  with pytest.raises(UserError, match=message):
    stages.rounds(start, end, factor)
  with pytest.raises(UserError, match=message):
    plan(distill__start_steps=start, distill__end_steps=end, distill__factor=factor)


def test_the_plan_is_base_then_rounds_each_taught_by_the_one_before():
  planned = plan(distill__start_steps=8)
  names = ['base', 'progressive_0004', 'progressive_0002', 'progressive_0001']
  assert [stage.name for stage in planned] == names
  assert [stage.parent for stage in planned] == [None, *names[:-1]]
  assert [stage.num_steps for stage in planned] == [8, 4, 2, 1]
  assert isinstance(planned[0].recipe.method, Denoising) and planned[0].method == 'denoising'
  for stage in planned[1:]:
    assert isinstance(stage.recipe.method, Progressive) and stage.method == 'progressive'
    assert stage.recipe.method.num_steps == stage.num_steps


def test_updates_and_learning_rates_of_the_rounds_are_aligned_to_the_last():
  numbers = {'distill__num_updates': (30, 50, 70), 'distill__learning_rate': (4e-4, 1e-4)}
  planned = plan(distill__start_steps=16, distill__decay='cosine', **numbers)
  assert [stage.num_updates for stage in planned] == [12, 30, 30, 50, 70]
  rates = [stage.recipe.learning_rate['student'] for stage in planned]
  assert [rate.peak for rate in rates] == [1e-3, 4e-4, 4e-4, 4e-4, 1e-4]
  assert [rate.num_updates for rate in rates] == [12, 30, 30, 50, 70]
  assert [(rate.decay, rate.warmup) for rate in rates] == [('none', 100), *[('cosine', 0)] * 4]


def test_entries_beyond_the_rounds_there_are_count_from_the_last():
  planned = plan(distill__start_steps=2, distill__num_updates=(30, 50, 70))
  assert [stage.num_updates for stage in planned] == [12, 70]


def test_every_stage_has_its_factor_and_the_name_of_its_steps():
  planned = plan(distill__start_steps=64, distill__factor=(4, 2, 2))
  assert [stage.num_steps for stage in planned] == [64, 16, 4, 2, 1]
  assert [stage.recipe.method.factor for stage in planned[1:]] == [4, 4, 2, 2]
  assert [stage.recipe.method.calls for stage in planned] == [1, 1 + 4, 1 + 4, 1 + 2, 1 + 2]
  assert [stage.name for stage in planned[1:3]] == ['progressive_0016', 'progressive_0004']


@pytest.mark.parametrize('weights', ['ema', 'last'])
def test_the_weights_that_teach_are_named(weights):
  planned = plan(distill__from_weights=weights)
  assert [stage.parent_weights for stage in planned] == ['', weights, weights]
  with pytest.raises(UserError, match=r"distill\.from_weights='first' is not one of"):
    plan(distill__from_weights='first')


def test_a_stage_keeps_an_average_for_each_decay_and_its_last_parameters():
  base, student, _ = plan(train__ema_decay=(0.999, 0.99, 0.5), distill__ema_decay=(0.9,))
  assert base.weights == ('ema', 'ema_0.99', 'ema_0.5', 'last')
  assert base.recipe.ema_decay == (0.999, 0.99, 0.5)
  assert student.weights == ('ema', 'last') and student.recipe.ema_decay == (0.9,)


def test_the_law_of_time_is_everyones_and_discrete_time_the_bases():
  base, student, _ = plan(time__num_steps=7, time__stratified=True)
  assert base.recipe.method.num_steps == 7 and student.recipe.method.num_steps == 2
  assert base.recipe.method.law == student.recipe.method.law == times.Uniform(stratified=True)
  assert plan()[0].recipe.method.num_steps == 0


def test_micro_batches_are_each_sections_own():
  planned = plan(train__micro_batches=2, distill__micro_batches=4)
  assert [stage.recipe.micro_batches for stage in planned] == [2, 4, 4]


def test_the_schedule_is_made_of_the_keys_that_it_knows():
  def scheduled(**fields):
    planned = plan(**{f'schedule__{key}': value for key, value in fields.items()})
    assert len({stage.schedule for stage in planned}) == 1
    assert all(stage.recipe.method.schedule == stage.schedule for stage in planned)
    return planned[0].schedule

  shifted = scheduled(name='shifted_cosine', base_size=4, logsnr_min=-15.0)
  assert shifted == ShiftedCosine(image_size=8, base_size=4, logsnr_min=-15.0, logsnr_max=20.0)
  assert scheduled(name='linear_beta', beta_max=10.0) == LinearBeta(0.1, 10.0, 20.0)
  assert scheduled(name='karras', s_max=10.0, rho=5.0) == Karras(0.002, 10.0, 5.0)
  with pytest.raises(UserError, match=r"schedule\.name='cosin' .* did you mean 'cosine'"):
    scheduled(name='cosin')
  with pytest.raises(UserError, match=r'config\.schedule: beta_min \(-1\.0\)'):
    scheduled(name='linear_beta', beta_min=-1.0)


def test_dropout_is_the_bases_alone():
  base, *rounds = plan()
  assert base.recipe.student.network.dropout == 0.1 and base.denoise.network.dropout == 0.0
  assert all(stage.recipe.student == stage.denoise == base.denoise for stage in rounds)
  assert all(stage.recipe.networks['teacher'] == stage.teacher == base.denoise for stage in rounds)


def test_rounds_differ_only_in_the_arguments_of_one_compiled_step():
  numbers = {'distill__num_updates': (8, 9), 'distill__learning_rate': (1e-3, 1e-4)}
  rounds = plan(distill__start_steps=64, distill__factor=(4, 2, 2), **numbers)[1:]
  trees = [jax.tree.structure(stage.recipe) for stage in rounds]
  assert trees[0] == trees[1] != trees[2] == trees[3]


def test_every_stage_has_noise_of_its_own():
  seeds = [stage.recipe.seed for s in (0, 1) for stage in plan(seed=s)]
  assert len(set(seeds)) == len(seeds)


def test_conditional_networks_know_the_classes():
  assert plan(model__conditional=True)[0].denoise.network.num_classes == 10
  assert plan()[0].denoise.network.num_classes == 0
  with pytest.raises(UserError, match='has no labels'):
    stages.plan(tiny.config(model__conditional=True), (8, 8, 1), 0)
  of_one_folder = {'dataset__name': 'folder', 'dataset__path': 'x', 'model__conditional': True}
  with pytest.raises(UserError, match=r'two classes or more, .*all its images are in one folder'):
    stages.plan(tiny.config(**of_one_folder), (8, 8, 1), 0)


def test_every_key_of_the_default_config_is_read(monkeypatch):
  """Planning reads the keys of images, model and training; the loops name theirs in full."""
  config = digits.get_config()
  config.methods = tuple(name for name in METHODS if name != 'denoising')
  config.model.conditional, config.dataset.label_dropout = True, 0.1  # for 'guided'
  config.dmd2.regression, config.time.law = 0.25, 'lognormal'  # which have keys of their own
  config.dmd.gan_generator = config.dmd.gan_fake = 0.1  # and so has a GAN
  sections = {id(config): '', **{id(v): f'{k}.' for k, v in config.items() if hasattr(v, 'items')}}
  read = set()
  original = type(config).__getitem__

  def recording(self, key):
    read.add(sections.get(id(self), '?') + key)
    return original(self, key)

  monkeypatch.setattr(stages, 'check_numbers', lambda *_: None)
  monkeypatch.setattr(type(config), '__getitem__', recording)
  workdir.plan_for(tiny.ROOT / 'nowhere', config)
  monkeypatch.undo()
  source = '\n'.join(path.read_text() for path in (tiny.ROOT / 'diffusion_distillation').rglob('*.py'))
  for key, _ in configuration.flatten(default.get_config()):
    section = key.split('.')[0]
    assert key in read or f'config.{key}' in source or f'**config.{section}' in source, key
