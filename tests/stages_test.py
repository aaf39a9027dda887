import jax
import pytest

from configs import default, digits
from diffusion_distillation import stages
from diffusion_distillation.errors import UserError
from diffusion_distillation.methods import Denoising, Progressive
from tests import tiny


def plan(**overrides):
  return stages.plan(tiny.config(**overrides), (8, 8, 1), 10)


def test_rounds_halve_down_to_the_end():
  assert stages.rounds(32, 1) == [16, 8, 4, 2, 1]
  assert stages.rounds(24, 3) == [12, 6, 3]
  assert stages.rounds(8, 8) == []


@pytest.mark.parametrize(('start', 'end'), [(24, 1), (32, 3), (4, 8), (8, 0), (12, 2)])
def test_steps_that_do_not_halve_are_refused(start, end):
  with pytest.raises(UserError, match=f'start_steps={start} .*end_steps={end}'):
    stages.rounds(start, end)


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


def test_the_last_rounds_have_more_updates_and_every_round_its_own_decay():
  numbers = {'distill__num_updates': 30, 'distill__num_updates_last': 70, 'distill__last_steps': 2}
  planned = plan(distill__start_steps=16, **numbers)
  assert [stage.num_updates for stage in planned[1:]] == [30, 30, 70, 70]
  assert [stage.recipe.learning_rate.decay for stage in planned] == [0, 30, 30, 70, 70]


def test_dropout_is_the_bases_alone():
  base, *rounds = plan()
  assert base.recipe.denoise.network.dropout == 0.1 and base.denoise.network.dropout == 0.0
  assert all(stage.recipe.denoise == stage.denoise == base.denoise for stage in rounds)


def test_rounds_differ_only_in_the_arguments_of_one_compiled_step():
  trees = {jax.tree.structure(stage.recipe) for stage in plan(distill__start_steps=16)[1:]}
  assert len(trees) == 1


def test_every_stage_has_noise_of_its_own():
  seeds = [stage.recipe.seed for s in (0, 1) for stage in plan(seed=s)]
  assert len(set(seeds)) == len(seeds)


def test_conditional_networks_know_the_classes():
  assert plan(model__conditional=True)[0].denoise.network.num_classes == 10
  assert plan()[0].denoise.network.num_classes == 0
  with pytest.raises(UserError, match='has no labels'):
    stages.plan(tiny.config(model__conditional=True), (8, 8, 1), 0)


def test_every_key_of_the_default_config_is_read(monkeypatch):
  """Planning reads the keys of the model and its training; the loops name theirs in full."""
  config = digits.get_config()
  sections = {id(config): '', **{id(v): f'{k}.' for k, v in config.items() if hasattr(v, 'items')}}
  read = set()
  original = type(config).__getitem__

  def recording(self, key):
    read.add(sections.get(id(self), '?') + key)
    return original(self, key)

  for name in ('_check_numbers', 'flatten'):
    monkeypatch.setattr(stages, name, lambda *_: None)
  monkeypatch.setattr(type(config), '__getitem__', recording)
  stages.plan(config, (8, 8, 1), 10)
  monkeypatch.undo()
  source = '\n'.join(path.read_text() for path in (tiny.ROOT / 'diffusion_distillation').rglob('*.py'))
  for key, _ in stages.flatten(default.get_config()):
    assert key in read or f'config.{key}' in source, key


def test_digits_has_exactly_the_default_keys():
  stages.check_keys(digits.get_config(), default.get_config())


def test_a_key_that_does_not_exist_names_the_nearest():
  config = digits.get_config().to_dict()
  config['train']['bach_size'] = 1
  with pytest.raises(UserError, match=r"'train\.bach_size'; did you mean 'train\.batch_size'"):
    stages.check_keys(config, default.get_config())
  del config['train']['bach_size'], config['train']['batch_size']
  with pytest.raises(UserError, match=r'lacks the keys train\.batch_size'):
    stages.check_keys(config, default.get_config())
