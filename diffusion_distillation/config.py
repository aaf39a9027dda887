"""What a config must be like, whatever is made of it: its keys, and the range of each number."""

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict as Config

from diffusion_distillation.errors import UserError


def flatten(config: Mapping[str, Any], prefix: str = '') -> Iterator[tuple[str, Any]]:
  """('train.batch_size', 64) and so on, in the config's order; sequences as tuples."""
  for key, value in config.items():
    if isinstance(value, Mapping | Config):
      yield from flatten(value, f'{prefix}{key}.')
    else:
      yield prefix + key, tuple(value) if isinstance(value, list | tuple) else value


def check_keys(config: Mapping[str, Any], default: Mapping[str, Any]) -> None:
  """Raises UserError unless `config` has exactly the keys of `default`, and tuples of the same types.

  A key that is not known is answered with the nearest one. (Types that are not in tuples are checked where the
  flags are read.)
  """
  known = [key for key, _ in flatten(default)]
  given = [key for key, _ in flatten(config)]
  check_known(given, known)
  missing = [key for key in known if key not in given]
  if missing:
    raise UserError(f'config lacks the keys {", ".join(missing)}; start from configs/default.py')
  values = dict(flatten(config))
  for key, example in flatten(default):
    if isinstance(example, tuple):
      wanted = (int, float) if isinstance(example[0], float) else type(example[0])
      if not all(isinstance(e, wanted) and not isinstance(e, bool) for e in values[key]):
        raise UserError(f'{key}={values[key]} must hold values like those of {example}')


def check_known(given: list[str], known: list[str]) -> None:
  """Raises UserError for the first key in `given` that is not known; names the nearest one."""
  for key in given:
    if key not in known:
      raise UserError(f'config has no key {key!r}{nearest(key, known)}')


def nearest(word: str, known: Iterable[str]) -> str:
  """'; did you mean ...?' if something near is known, else ''."""
  close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
  return f'; did you mean {close[0]!r}?' if close else ''


def choose(key: str, value: str, table: Mapping[str, Any]) -> Any:
  """`table[value]`; raises UserError, naming the key and the nearest choice, where there is none."""
  if value not in table:
    raise UserError(f'{key}={value!r} is not one of {list(table)}{nearest(value, table)}')
  return table[value]


def build(key: str, cls: type, **fields: Any) -> Any:
  """`cls` of these fields; a UserError, naming the config's `key`, in place of what it raises."""
  try:
    return cls(**fields)
  except (TypeError, ValueError) as error:
    raise UserError(f'config.{key}: {error}') from error


STUDENTS = ('knowledge', 'consistency', 'dmd', 'dmd2')
MATCHING = ('dmd', 'dmd2')
POSITIVE = [
  'dataset.image_size',
  'model.ch',
  'model.emb_ch',
  'model.ch_mult',
  'model.num_res_blocks',
  'model.num_groups',
  'model.num_heads',
  'model.head_dim',
  'schedule.base_size',
  'optimizer.eps',
  'optimizer.clip_norm',
  'train.num_updates',
  'train.batch_size',
  'train.micro_batches',
  'train.learning_rate',
  'distill.start_steps',
  'distill.end_steps',
  'distill.num_updates',
  'distill.batch_size',
  'distill.micro_batches',
  'distill.learning_rate',
  'max_skipped',
  'time.log_std',
  'pairs.num_pairs',
  'pairs.num_steps',
  'pairs.batch_size',
  'consistency.start_intervals',
  'consistency.end_intervals',
  'consistency.sample_steps',
  *(
    f'{name}.{key}'
    for name in STUDENTS
    for key in ('num_updates', 'batch_size', 'micro_batches', 'learning_rate', 'clip_norm')
  ),
  *(f'{name}.{key}' for name in MATCHING for key in ('num_steps', 'fake_learning_rate', 'fake_updates')),
  'checkpoint.every',
  'log.every',
  'evaluation.num_samples',
  'evaluation.batch_size',
  'evaluation.max_steps',
]
NOT_NEGATIVE = [
  'seed',
  'evaluation.seed',
  'time.num_steps',
  'train.warmup',
  'train.weight_decay',
  'distill.warmup',
  'distill.weight_decay',
  'log.measured_updates',
  'log.health_every',
  *(f'{name}.{key}' for name in STUDENTS for key in ('warmup', 'weight_decay')),
  *(f'{name}.{key}' for name in MATCHING for key in ('regression', 'gan_generator', 'gan_fake')),
  'log.seconds',
  'dataset.in_memory_gb',
  'dataset.workers',
]
FRACTIONS = [
  'dataset.label_dropout',
  'train.ema_decay',
  'distill.ema_decay',
  *(f'{name}.ema_decay' for name in STUDENTS),
  'model.dropout',
  'optimizer.b1',
  'optimizer.b2',
]
DISTINCT = [
  'train.ema_decay',
  'distill.ema_decay',
  *(f'{name}.ema_decay' for name in STUDENTS),
  'evaluation.samplers',
  'methods',
  'consistency.sample_steps',
]
AT_LEAST_TWO = ['distill.factor', 'evaluation.num_samples']


def check_numbers(config: Config) -> None:
  """Raises UserError for numbers that no stage could use; None stands for 'not given'."""
  values = dict(flatten(config))
  for keys, wanted, holds in (
    (POSITIVE, 'positive', lambda v: 0 < v < math.inf),
    (NOT_NEGATIVE, 'zero or more, and below 2^31', lambda v: 0 <= v < 2**31),
    (FRACTIONS, 'in [0, 1)', lambda v: 0 <= v < 1),
    (AT_LEAST_TWO, 'at least 2', lambda v: v >= 2),
  ):
    for key in keys:
      value = values[key]
      numbers = value if isinstance(value, tuple) else (value,)
      if not numbers:
        raise UserError(f'{key}=() must hold a number at least')
      if not all(number is None or holds(number) for number in numbers):
        raise UserError(f'{key}={value} must be {wanted}')
  for key in DISTINCT:
    if len(set(values[key])) < len(values[key]):
      raise UserError(f'{key}={values[key]} names one twice')
