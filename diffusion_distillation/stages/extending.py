"""Training a stage for longer than it was: its config has a larger num_updates than its stage.json.

Training goes on from the stage's last checkpoint, as that of an interrupted run does. What was made from the shorter stage is
stale: it is named, and never removed here.
"""

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
  """Updates that a finished stage's lineage `found` counts; those of `stage` for an import, whose own may not be known."""
  recorded = found.get('num_updates')
  return stage.num_updates if found.get('imported') or recorded is None else int(recorded)


def is_trained(found: Mapping[str, Any], stage: Stage) -> bool:
  """Whether the lineage `found` says that the stage was trained for all updates that `stage` has now."""
  return bool(found.get('finished')) and updates_of(found, stage) >= stage.num_updates


def history(found: Mapping[str, Any]) -> dict[str, list[int]]:
  """Numbers of updates at which the stage was finished and then extended; empty if it never was."""
  return {key: list(found[key]) for key in ('extended_from',) if key in found}


def begun(found: Mapping[str, Any], expected: Mapping[str, Any]) -> dict[str, Any]:
  """The lineage of a stage whose num_updates is raised from that of `found` to that of `expected`, before its next update."""
  lineage = dict(expected) | history(found) | {'finished': False}
  if found.get('finished'):
    lineage['extended_from'] = [*found.get('extended_from', []), found.get('num_updates')]
  _log.warning(
    'stage %s: its number of updates is raised from %s to %s; what depends on that number, such as the decay of the '
    'learning rate, follows the new one from here on',
    *(expected['stage'], found.get('num_updates'), expected['num_updates']),
  )
  return lineage


def check_configs(workdir: pathlib.Path, stages: Sequence[Stage], config: Config) -> None:
  """Checks all stages of a plan that are there against the config; only reads.

  Raises:
    UserError: one was made with another config, see `check_config`; or it is to be trained for longer, but was imported, has
      no checkpoint to go on from, or other stages were made from it.
  """
  paths = {stage.name: workdir / stage.name / 'stage.json' for stage in stages}
  made = {name: read_json(path) for name, path in paths.items() if path.is_file()}
  configs = {name: found.get('config') or {} for name, found in made.items()}
  raised = {name: raised_updates(name, made_with, config) for name, made_with in configs.items()}
  extended = {name: updates for name, updates in raised.items() if updates is not None}
  for name in extended:  # before anybody is told to remove what was made from it
    check_config(paths[name], configs[name], config, name)
  for name, updates in extended.items():
    _check_extension(workdir, name, made[name], *updates)
  for name, made_with in configs.items():
    check_config(paths[name], made_with, config, name)


def _check_extension(
  workdir: pathlib.Path, name: str, found: Mapping[str, Any], old: int, new: int
) -> None:
  """Raises UserError if the stage cannot go on from `old` to `new` updates."""
  begin = f'stage {name} cannot be extended from {old} to {new} updates: '
  if found.get('imported'):
    raise UserError(
      f'{begin}it was imported, without an optimizer state; set its number of updates back to {old}'
    )
  if found.get('finished') and not Checkpoints(workdir / name).steps():
    raise UserError(
      f'{begin}no checkpoint is left, and its model has no optimizer state; restore one, or set its number of '
      f'updates back to {old}'
    )
  if stale := list(_made_from(workdir, name)):
    raise UserError(
      f'{begin}{", ".join(path.name for path in stale)} would be stale, as made from the model of {old} updates; '
      f'remove {" and ".join(map(str, stale))} to have them made again, or set its number of updates back to {old}'
    )


def _made_from(workdir: pathlib.Path, name: str) -> Iterator[pathlib.Path]:
  """Folders of all that was made from a stage, directly or through others: stages, and stored pairs."""
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
