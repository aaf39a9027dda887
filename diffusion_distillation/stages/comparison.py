"""Checks that the config of a run agrees with the configs that its workdir was made with.

Each stage is compared with the config in its own stage.json. A stage is refused only if a key that affects its parameters has
changed; keys that only affect evaluation, logging or device layout may always change. Configs of older versions are converted.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from diffusion_distillation.config import Config, flatten
from diffusion_distillation.diffusion.weightings import AS_BASE
from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.methods import METHODS, Student
from diffusion_distillation.stages.plan import PER_ROUND, of_round, rounds

# Prefixes of the keys that may change between two runs in one workdir, because they affect the parameters of no stage.
FREE = (
  *('evaluation.', 'log.', 'gate.', 'checkpoint.', 'consistency.sample_steps'),
  *('dataset.path', 'dataset.prepared', 'dataset.in_memory_gb', 'dataset.workers'),
  *('methods', 'pairs.', 'student.', 'distill.end_steps', 'max_skipped'),
  *('mesh.', 'compute.'),
)

# Keys that only affect how students are trained, so that they may change after the base.
_OF_STUDENTS = ('dataset.encoded_dtype', 'lora.')


# Sections of the networks beside the base, whose other keys are unused while their number of updates is 0.
_BESIDE = ('autoencoder', 'text_encoder')


def _is_free(key: str, stage: str) -> bool:
  """Returns whether a key may differ from the config that `stage` was made with or, for '', from the workdir's config.

  Keys in FREE may differ, and so may the sections of other stages, which are compared with their own stage.json.
  """
  if key == 'distill.start_steps':  # also the base model's number of sampling steps
    return False
  if (key.startswith(_OF_STUDENTS) and stage in ('', 'base')) or (
    key.startswith('early_stop.') and not stage
  ):
    return True
  of_students = {name for name, cls in METHODS.items() if issubclass(cls, Student)} | {'distill'}
  others = of_students - {'distill' if _is_round(stage) else stage}
  return key.startswith(FREE) or key.partition('.')[0] in others


def _is_round(stage: str) -> bool:
  return stage.startswith('progressive_')


def of_this_version(values: Mapping[str, Any]) -> dict[str, Any]:
  """Converts a stored config to the keys of this version.

  Older versions had `consistency.target`: `ema`, the first moving average, or `last`.
  """
  section = values.get('consistency')
  if not isinstance(section, Mapping) or 'target' not in section:
    return dict(values)
  kept = {key: value for key, value in section.items() if key != 'target'}
  averages = kept.get('ema_decay') or (0.0,)
  decay = averages[0] if section['target'] == 'ema' else 0.0
  return {**values, 'consistency': {**kept, 'target_decay': decay}}


def implied(values: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the values that an older version trained with, for keys that its flat config lacks.

  Keys whose default is that value are left out, so they may change; the weights of guidance are the exception.
  """
  found: dict[str, Any] = {
    'distill.weighting': AS_BASE,
    'distill.guidance': 0.0,
    'pairs.labels': 'balanced',
    'lora.rank': 0,
    **{f'{name}.num_updates': 0 for name in _BESIDE},
  }
  if 'evaluation.clip_x' in values:
    found['pairs.clip_x'] = values['evaluation.clip_x']
  for name in ('dmd', 'dmd2'):
    found |= {f'{name}.fake_law': AS_BASE, f'{name}.fake_weighting': AS_BASE}
    found |= {f'{name}.gan_head': 'pooled', f'{name}.joint_clip': False, f'{name}.guidance': 0.0}
    if values.get(f'{name}.gan_fake'):
      between = {f'{name}.gan_{key}': f'{name}.{key}' for key in ('first_t', 'last_t')}
      found |= {key: values[of_scores] for key, of_scores in between.items() if of_scores in values}
    if values.get(f'{name}.num_steps', 1) > 1 and 'pairs.clip_x' in found:
      found[f'{name}.clip_x'] = found['pairs.clip_x']
  return {key: value for key, value in found.items() if key not in values}


# Keys that may be 'base', each with the key of base training that 'base' refers to.
_FOLLOWS = {'distill.weighting': 'weighting'} | {
  f'{name}.{key}': of_base
  for name in ('dmd', 'dmd2')
  for key, of_base in (('fake_law', 'time.law'), ('fake_weighting', 'weighting'))
}


def _as_made(stage: str, values: dict[str, Any]) -> dict[str, Any]:
  """Normalizes a flat config for comparison.

  'base' is replaced by the value that it refers to; keys of LoRA and of networks beside the base that the stage does not use are
  left out; for a round of progressive distillation, each tuple of PER_ROUND is replaced by the round's entry.
  """
  follows = {key: of_base for key, of_base in _FOLLOWS.items() if values.get(key) == AS_BASE}
  values = values | {key: values[of_base] for key, of_base in follows.items() if of_base in values}
  unused = {key for key in values if key.startswith('lora.')} - {'lora.rank'}
  if values.get('lora.rank'):
    unused = set() if getattr(METHODS.get(stage), 'from_teacher', ()) else {'lora.fake_score'}
  for name in _BESIDE:
    if not values.get(f'{name}.num_updates'):
      unused |= {key for key in values if key.startswith(f'{name}.')} - {f'{name}.num_updates'}
  values = {key: value for key, value in values.items() if key not in unused}
  if not _is_round(stage):
    return values
  try:
    steps = rounds(*(values[f'distill.{key}'] for key in ('start_steps', 'end_steps', 'factor')))
  except (KeyError, UserError):
    return values
  names = [f'progressive_{num_steps:04d}' for num_steps, _ in steps]
  if stage not in names:
    return values
  from_the_end = len(names) - 1 - names.index(stage)
  own = {key: values[key] for key in map('distill.{}'.format, PER_ROUND) if key in values}
  return values | {key: of_round(entries, from_the_end) for key, entries in own.items()}


def _shown(key: str, values: Mapping[str, Any], made: Any) -> Any:
  """Formats a key's value for an error message; 'base' is followed by the value that it refers to."""
  return f'{AS_BASE} ({made})' if key in _FOLLOWS and values.get(key) == AS_BASE else made


def _updates_key(stage: str) -> str:
  """Returns the key that sets a stage's number of updates; '', the whole workdir, uses the key of the base."""
  sections = {'': 'train', 'base': 'train'}
  return f'{"distill" if _is_round(stage) else sections.get(stage, stage)}.num_updates'


def _is_raised(key: str, stage: str, old: Any, new: Any) -> bool:
  """Returns whether `key` is the stage's number of updates and has grown, which is allowed."""
  numbers = all(isinstance(value, int) for value in (old, new))
  return key == _updates_key(stage) and numbers and new > old


def raised_updates(stage: str, made_with: Mapping[str, Any], config: Config) -> tuple[int, int] | None:
  """Returns a stage's number of updates in its own config and in `config`, if the latter is larger; else None."""
  if not isinstance(made_with, Mapping):
    return None
  key, given = _updates_key(stage), dict(flatten(json.loads(config.to_json())))
  stored = dict(flatten(of_this_version(made_with)))
  old, new = _as_made(stage, stored).get(key), _as_made(stage, given).get(key)
  if old is None or new is None or not _is_raised(key, stage, old, new):
    return None
  return int(old), int(new)


def check_config(
  path: pathlib.Path, made_with: Mapping[str, Any], config: Config, stage: str = ''
) -> None:
  """Raises UserError, listing the differing keys, if the stage or workdir of `path` was made with another config.

  Keys for which `_is_free` is true may differ. If nothing else differs, the stage's number of updates may grow. Keys that an
  older version did not have are not compared.
  """
  if not isinstance(made_with, Mapping):
    raise DamagedError(f'{path} is damaged (no config in it); restore it from a copy')
  stored = dict(flatten(of_this_version(made_with)))
  given = dict(flatten(json.loads(config.to_json())))
  stored |= implied(stored)
  old, new = _as_made(stage, stored), _as_made(stage, given)
  changed = [
    key
    for key, value in sorted(old.items())
    if not _is_free(key, stage) and value != new.get(key, 'absent')
  ]
  if any(not _is_raised(key, stage, old[key], new.get(key)) for key in changed):
    differing = [
      f'{key} was {_shown(key, stored, old[key])}, is {_shown(key, given, new.get(key, "absent"))}'
      for key in changed
    ]
    remedy = f'remove {path.parent} to train this stage again' if stage else 'use another workdir'
    if any(key.startswith(f'distill.{name} ') for key in differing for name in PER_ROUND):
      remedy += '; the last entry of a tuple is that of the last round, so that a further round needs an entry of its own'
    raise UserError(
      f'{path}: made with another config: {"; ".join(differing)}. Use that config, or {remedy}'
    )


PARENTS = ('parent', 'start', 'pairs', 'distance')
_CHECKED = (
  *PARENTS,
  *('method', 'output', 'network_name', 'network', 'space', 'schedule', 'sampler', 'num_steps'),
  'image_shape',
)
_BEFORE = {'network_name': 'unet', 'space': 'pixels'}  # what older versions used
# Entries of dicts that older versions did not record, with what they used; they count where this run has the entry.
_BEFORE_IN: dict[str, dict[str, Any]] = {
  'network': {'time_embedding_type': 'positional', 'num_train_timesteps': None},
  'schedule': {'trained_betas': []},
}


def check_lineage(
  path: pathlib.Path, found: dict[str, Any], expected: dict[str, Any], config: Config
) -> None:
  """Raises UserError if the lineage `found` belongs to another config, or differs from the `expected` lineage."""
  made_with = found.get('config') or {}
  if found.get('finished') and not found.get('early_stop') and isinstance(made_with, Mapping):
    made_with = {
      key: value for key, value in made_with.items() if key != 'early_stop'
    }  # it had no effect
  check_config(path, made_with, config, path.parent.name)
  expected = json.loads(json.dumps(expected))
  if expected['method'] == 'dmd2' and found.get('method') == 'dmd':  # older versions recorded 'dmd'
    found = {**found, 'method': 'dmd2'}
  for key in _CHECKED:
    lacked = {name: value for name, value in _BEFORE_IN.get(key, {}).items() if name in expected[key]}
    made = found.get(key, _BEFORE.get(key))
    if lacked and isinstance(made, Mapping):
      made = {**lacked, **made}
    if made != expected[key]:
      raise UserError(
        f'{path}: {key} is {made}, but this run needs {expected[key]}; '
        f'remove {path.parent} to train this stage again'
      )
