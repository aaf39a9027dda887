"""Extends a stage: trains it further when the config, or the quality gate, asks for more updates than its stage.json records.

Training continues from the stage's last checkpoint, as if the run had been interrupted. Anything that was made from the
shorter stage is stale: an error message lists it, and nothing is removed.
"""

import dataclasses
import logging
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffusion_distillation.config import Config
from diffusion_distillation.errors import UserError
from diffusion_distillation.stages.comparison import check_config, raised_updates
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system.checkpoints import Checkpoints
from diffusion_distillation.system.files import read_json

_log = logging.getLogger(__name__)


def updates_of(found: Mapping[str, Any], stage: Stage) -> int:
  """Returns the updates of a finished stage with lineage `found`; imports, which may lack this number, get those of `stage`."""
  recorded = found.get('num_updates')
  return stage.num_updates if found.get('imported') or recorded is None else int(recorded)


def trained_updates(found: Mapping[str, Any], stage: Stage) -> int:
  """Returns the updates that a finished stage was trained for, which are fewer if it was stopped early."""
  return int((found.get('early_stop') or {}).get('updates', updates_of(found, stage)))


def stopped_at(workdir: pathlib.Path, stage: Stage) -> int | None:
  """Returns the updates after which early stopping ended a finished stage; None if it did not."""
  path = workdir / stage.name / 'stage.json'
  found = read_json(path) if path.is_file() else {}
  return trained_updates(found, stage) if found.get('finished') and found.get('early_stop') else None


def is_trained(found: Mapping[str, Any], stage: Stage) -> bool:
  """Whether the lineage `found` says that all updates of `stage` are done."""
  return bool(found.get('finished')) and updates_of(found, stage) >= stage.num_updates


def as_recorded(workdir: pathlib.Path, stage: Stage) -> Stage:
  """Returns a stage of the plan with the extensions that its stage.json records.

  A stage that the quality gate extended has more updates than its config asks for. The updates up to each earlier end are
  trained, and replayed, as they were in the shorter stage; see `Stage.recipe_at`.
  """
  path = workdir / stage.name / 'stage.json'
  found = read_json(path) if path.is_file() else {}
  if not found or found.get('imported'):
    return stage
  recorded = updates_of(found, stage)
  total, ends = max(stage.num_updates, recorded), list(found.get('extended_from', []))
  if found.get('finished'):
    ends.append(recorded)
  ends = sorted(end for end in set(ends) if isinstance(end, int) and end < total)
  planned = stage.num_updates if stage.num_updates < total else None
  return dataclasses.replace(stage, num_updates=total, earlier_ends=tuple(ends), planned_updates=planned)


def history(found: Mapping[str, Any]) -> dict[str, list[int]]:
  """Returns the part of a lineage with the numbers of updates from which the stage was extended; empty if it never was."""
  return {key: list(found[key]) for key in ('extended_from',) if key in found}


def begun(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
  """Returns the lineage of a stage that is extended from lineage `found` to `expected`; its config is not checked here."""
  lineage = dict(expected) | history(found) | {'finished': False}
  if found.get('finished'):
    lineage['extended_from'] = [*found.get('extended_from', []), found.get('num_updates')]
  _log.warning(
    'stage %s: raising its number of updates from %s to %s; everything that depends on this number, such as the decay '
    'of the learning rate, follows the new number from here on',
    *(expected['stage'], found.get('num_updates'), expected['num_updates']),
  )
  return lineage


def check_configs(workdir: pathlib.Path, stages: Sequence[Stage], config: Config) -> None:
  """Checks all existing stages of a plan against the config; writes nothing.

  Raises:
    UserError: a stage was made with another config (see `check_config`) or has another teacher, or it cannot be extended
      because it was imported, has no checkpoint left, or other stages were made from it.
  """
  paths = {stage.name: workdir / stage.name / 'stage.json' for stage in stages}
  made = {name: read_json(path) for name, path in paths.items() if path.is_file()}
  configs = {name: found.get('config') or {} for name, found in made.items()}
  raised = {name: raised_updates(name, made_with, config) for name, made_with in configs.items()}
  extended = {name: updates for name, updates in raised.items() if updates is not None}
  for name in extended:  # first, so that nobody is asked to remove stages in vain
    check_config(paths[name], configs[name], config, name)
  for name, updates in extended.items():
    _check_extension(workdir, name, made[name], *updates)
  for name, made_with in configs.items():
    check_config(paths[name], made_with, config, name)
  for stage in stages:
    _check_teacher(paths[stage.name], made.get(stage.name, {}), stage)


def _check_teacher(path: pathlib.Path, found: Mapping[str, Any], stage: Stage) -> None:
  """Raises UserError if a stage has another teacher than the plan, which depends on the order of `methods`."""
  teacher = (found.get('parent') or {}).get('stage')
  if teacher not in (None, stage.parent):
    raise UserError(
      f'{path}: its teacher was {teacher}, but with these methods it is {stage.parent}; remove {path.parent} to train this '
      'stage again, or use another workdir'
    )


def _check_extension(
  workdir: pathlib.Path, name: str, found: Mapping[str, Any], old: int, new: int
) -> None:
  """Raises UserError if the stage cannot be extended from `old` to `new` updates."""
  begin = f'stage {name} cannot be extended from {old} to {new} updates: '
  if found.get('imported'):
    raise UserError(
      f'{begin}it was imported and has no optimizer state; set its number of updates back to {old}'
    )
  if stopped := found.get('early_stop'):
    raise UserError(
      f'{begin}early_stop.patience ended it after {stopped.get("updates")} updates with its best weights; set its number of '
      f'updates back to {old}, or remove {workdir / name} to train it again'
    )
  if found.get('finished') and not Checkpoints(workdir / name).steps():
    raise UserError(
      f'{begin}no checkpoint is left, and its model has no optimizer state; restore a checkpoint, or set its number '
      f'of updates back to {old}'
    )
  if stale := list(made_from(workdir, name)):
    raise UserError(
      f'{begin}{", ".join(path.name for path in stale)} would be stale because the model of {old} updates made them; '
      f'remove {" and ".join(map(str, stale))} so that they are made again, or set its number of updates back to {old}'
    )


def made_from(workdir: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
  """Yields the folders of all stages and stored pairs that were made from a stage, directly or indirectly."""
  parents = {
    path.parent: {
      (read_json(path).get(key) or {}).get('stage') for key in ('parent', 'start', 'teacher')
    }
    for path in sorted([*workdir.glob('*/stage.json'), *workdir.glob('pairs/pairs.json')])
  }
  names, reached = {name}, 0
  while reached < len(names):
    reached = len(names)
    names |= {folder.name for folder, of in parents.items() if of & names}
  yield from (folder for folder in parents if folder.name in names - {name})


def updates_in(made: Mapping[str, Any]) -> int | None:
  """Returns the updates in a model's provenance; for an imported model, those of its source."""
  imported = made.get('imported')
  return updates_in(imported.get('provenance') or {}) if imported else made.get('updates')
