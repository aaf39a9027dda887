"""The config's keys: each is declared once, with its meaning and range, and listed in docs/configuration.md."""

import contextlib
import dataclasses
import importlib
import math
import typing

import pytest

from configs import default, digits
from diffusion_distillation import cli, config, datasets
from diffusion_distillation.errors import UserError
from diffusion_distillation.methods import METHODS
from diffusion_distillation.stages import plan
from tests import tiny

DEFAULTS = dict(config.flatten(default.get_config()))  # which also fills config.SECTIONS
KEYS = config.all_keys()
STUDENTS = tuple(name for name in METHODS if name != 'denoising')
CONFIGS = [path.stem for path in sorted((tiny.ROOT / 'configs').glob('*.py'))]

# Numbers that have no range of their own: the code that reads them compares them with others.
CHECKED_ELSEWHERE = {
  *('dataset.channels', 'model.attn_resolutions', 'student.attn_resolutions', 'time.log_mean'),
  *(f'schedule.{key}' for key in ('logsnr_min', 'logsnr_max', 'beta_min', 'beta_max')),
  *(f'schedule.{key}' for key in ('s_min', 's_max', 'rho')),
  *(f'{method}.{key}' for method in ('dmd', 'dmd2') for key in ('first_t', 'last_t')),
  *('evaluation.guidance_interval', 'mesh.data', 'mesh.fsdp'),
}


def example(name):
  """A key's default; of the students' network, which has none, the default of the model."""
  return DEFAULTS[name.replace('student.', 'model.')]


def entries(value):
  return value if isinstance(value, tuple) else (value,)


def is_number(value):
  return not isinstance(value, bool | str)


def test_every_key_of_the_default_config_is_declared_with_a_meaning():
  assert set(KEYS) == set(DEFAULTS)
  for name, key in KEYS.items():
    assert key.meaning.endswith('.') and len(key.meaning) > 15 and '|' not in key.meaning, name
    assert key.meaning[0].isupper() or key.meaning[0] == '`', name


def test_the_default_config_is_locked_and_has_the_declared_types():
  c = default.get_config()
  with pytest.raises(AttributeError, match='bach_size'):
    c.train.bach_size = 8
  with pytest.raises(TypeError):
    c.train.batch_size = 'many'
  assert c.model.num_heads is None
  c.model.num_heads = 4
  with pytest.raises(TypeError):
    c.model.num_heads = 'four'


@pytest.mark.parametrize('name', [name for name in CONFIGS if name not in ('__init__', 'paper')])
def test_every_config_has_the_default_keys_and_values_in_their_ranges(name):
  made = importlib.import_module(f'configs.{name}').get_config()
  config.check_keys(made, default.get_config())
  config.check_numbers(made)
  for key, value in config.flatten(made):
    assert not KEYS[key].choices or set(entries(value)) <= {*KEYS[key].choices, DEFAULTS[key]}, key


def test_the_students_network_has_the_keys_of_the_model_and_none_need_be_given():
  sections = [
    {k.split('.')[1]: KEYS[k] for k in KEYS if k.startswith(s)} for s in ('student.', 'model.')
  ]
  assert sections[0] == sections[1]
  assert {value for key, value in DEFAULTS.items() if key.startswith('student.')} == {None}


def test_every_number_has_a_range_or_is_checked_elsewhere():
  numbers = {name for name in DEFAULTS if all(map(is_number, entries(example(name))))}
  assert {name for name in numbers if KEYS[name].valid is None} == CHECKED_ELSEWHERE


@pytest.mark.parametrize('name', [name for name, key in KEYS.items() if key.valid])
def test_ranges_are_enforced(name):
  made, first = default.get_config(), entries(example(name))[0]
  bad = -1 if first is None else type(first)(-1)
  bad = (bad,) if isinstance(example(name), tuple) else bad
  made.update_from_flattened_dict({name: bad})
  with pytest.raises(UserError) as error:
    config.check_numbers(made)
  assert str(error.value) == f'{name}={bad} must be {KEYS[name].valid.says}'


@pytest.mark.parametrize(
  ('key', 'value', 'says'),
  [
    ('distill.end_steps', 0, 'must be positive'),
    ('distill.start_steps', -4, 'must be positive'),
    ('distill.factor', (1,), 'must be at least 2'),
    ('distill.factor', (2, 0), 'must be at least 2'),
    ('distill.factor', (), 'must not be empty'),
    ('distill.num_updates', (8, 0), 'must be positive'),
    ('distill.learning_rate', (math.inf,), 'must be positive'),
    ('distill.learning_rate', (math.nan,), 'must be positive'),
    ('train.ema_decay', (0.9, 1.0), 'must be in [0, 1)'),
    ('train.ema_decay', (0.9, 0.9), 'lists 0.9 twice'),
    ('distill.ema_decay', (), 'must not be empty'),
    ('dmd2.ema_decay', (0.9, 0.9), 'lists 0.9 twice'),
    ('methods', ('dmd', 'dmd'), "lists 'dmd' twice"),
    ('evaluation.samplers', ('heun', 'heun'), "lists 'heun' twice"),
    ('consistency.sample_steps', (1, 2, 1), 'lists 1 twice'),
    ('train.micro_batches', 0, 'must be positive'),
    ('model.head_dim', 0, 'must be positive'),
    ('time.num_steps', -1, 'must be zero or more, and below 2^31'),
    ('time.log_std', 0.0, 'must be positive'),
    ('log.measured_updates', -1, 'must be zero or more, and below 2^31'),
    ('log.health_every', -1, 'must be zero or more, and below 2^31'),
    ('seed', 2**31, 'must be zero or more, and below 2^31'),
    ('evaluation.num_samples', 1, 'must be at least 2'),
    ('text_encoder.length', 2, 'must be at least 3'),
    ('compute.updates_per_dispatch', 0, 'must be positive'),
  ],
)
def test_numbers_that_no_stage_could_use_are_refused(key, value, says):
  with pytest.raises(UserError) as error:
    config.check_numbers(tiny.config(**{key.replace('.', '__'): value}))
  assert str(error.value) == f'{key}={value} {says}'


def use(**overrides):
  """The plan of all methods; the dataset's settings are made on the way."""
  # Students may predict eps, and `guided` needs classes that are dropped.
  moderate = {'schedule__logsnr_min': -13.0, 'model__conditional': True, 'dataset__label_dropout': 0.1}
  made = tiny.config(**{'methods': STUDENTS} | moderate | overrides)
  datasets.Settings.of(made.dataset)
  return plan.plan(made, (8, 8, 1), 10)


# Choices that this plan cannot have, with what the message says.
ELSEWHERE = {
  ('compute.attention', 'cudnn'): 'needs',
  ('evaluation.grid', 'leading'): 'discrete time',
  ('pairs.grid', 'leading'): 'discrete time',
  ('evaluation.grid', 'leading_to_first'): 'discrete time',
  ('pairs.grid', 'leading_to_first'): 'discrete time',
  ('model.space', 'latents'): 'only for imported models',
  ('student.space', 'latents'): 'must use the space of its teacher',
}


@pytest.mark.parametrize('name', [name for name, key in KEYS.items() if key.choices])
def test_the_choices_that_are_listed_are_those_that_are_accepted(name):
  tupled = typing.get_origin(config.types()[name]) is tuple

  def choose(value):
    changes = {name.replace('.', '__'): (value,) if tupled else value}
    return use(**changes)

  for choice in KEYS[name].choices:
    refused = ELSEWHERE.get((name, choice))
    with pytest.raises(UserError, match=refused) if refused else contextlib.nullcontext():
      choose(choice)
  with pytest.raises(UserError) as error:
    choose('none of these')
  for choice in KEYS[name].choices:
    assert repr(choice) in str(error.value)
  assert str(error.value).count("'") == 2 * len(KEYS[name].choices) + 2, error.value


def test_docs_list_every_key_as_the_program_prints_them(capsys):
  cli.MODES['keys'](cli.Options('keys', config=None, default=default.get_config(), workdir=None))
  printed = capsys.readouterr().out
  assert printed == (tiny.ROOT / 'docs' / 'configuration.md').read_text(), (
    'main.py --mode=keys > docs/configuration.md'
  )
  for name, key in KEYS.items():
    assert f'| `{name}` | {key.meaning} | `{DEFAULTS[name]!r}` | ' in printed


@dataclasses.dataclass(frozen=True)
class Mine:
  """Of this test alone."""

  weight: float = config.key(0.5, 'Weight of something.', config.FRACTION)
  width: int | None = config.key(None, 'Width of something.', config.POSITIVE)
  parts: tuple[str, ...] = config.key(('a',), 'Parts.', choices=('a', 'b'), distinct=True)


@dataclasses.dataclass(frozen=True)
class Yours(Mine):
  """The same, with another default."""

  weight: float = 0.25


def test_a_section_of_ones_own_is_made_checked_and_listed(monkeypatch):
  monkeypatch.setitem(config.SECTIONS, 'mine', Mine)
  monkeypatch.setitem(config.SECTIONS, 'yours', Yours)
  made = config.default_config()
  assert made.mine.to_dict() == {'weight': 0.5, 'width': None, 'parts': ('a',)}
  assert made.yours.weight == 0.25 and config.keys(Yours) == config.keys(Mine)
  config.check_numbers(made)
  made.yours.weight = 1.0
  with pytest.raises(UserError, match=r'^yours\.weight=1\.0 must be in \[0, 1\)$'):
    config.check_numbers(made)
  assert config.to_markdown().endswith(
    """
## yours

The same, with another default.

| key | meaning | default | values |
|---|---|---|---|
| `yours.weight` | Weight of something. | `0.25` | number, in [0, 1) |
| `yours.width` | Width of something. | `None` | integer or `None`, positive |
| `yours.parts` | Parts. | `('a',)` | any of `a`, `b`, all different |"""
  )


def test_a_field_without_a_meaning_is_an_error():
  @dataclasses.dataclass(frozen=True)
  class Bare:
    width: int = 3

  with pytest.raises(TypeError, match=r'Bare\.width must be declared with key\(\)'):
    config.keys(Bare)


def test_a_key_that_does_not_exist_names_the_nearest():
  made = digits.get_config().to_dict()
  made['train']['bach_size'] = 1
  with pytest.raises(UserError, match=r"'train\.bach_size'; did you mean 'train\.batch_size'"):
    config.check_keys(made, default.get_config())
  del made['train']['bach_size'], made['train']['batch_size']
  with pytest.raises(UserError, match=r'lacks the keys train\.batch_size'):
    config.check_keys(made, default.get_config())


@pytest.mark.parametrize(
  ('key', 'value', 'words'),
  [
    ('student.ch_mult', (1, 'a'), 'must hold integers'),
    ('student.attn_resolutions', (4.5,), 'must hold integers'),
    ('model.ch_mult', (True,), 'must hold integers'),
    ('train.ema_decay', ('0.9',), 'must hold numbers'),
    ('methods', (1,), 'must hold strings'),
  ],
)
def test_entries_of_tuples_have_their_types(key, value, words):
  """Those of optional keys, too, whose defaults show no entry."""
  made = default.get_config().to_dict()
  section, _, name = key.rpartition('.')
  (made[section] if section else made)[name] = value
  with pytest.raises(UserError, match=rf'{key}=.*{words}'):
    config.check_keys(made, default.get_config())
