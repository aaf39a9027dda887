"""The workdir: its config, and the lineage of each stage in it.

workdir/config.json         what made it; the workdir alone is enough to sample from it
workdir/<stage>/stage.json  parent and its digest, parameterization, schedule, step count, data range, config
"""

import dataclasses
import fcntl
import json
import pathlib
from typing import Any

import jax

from diffusion_distillation import datasets
from diffusion_distillation.checkpoints import Checkpoints, digest, read_json, write_json
from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.stages import Config, Stage, flatten, plan
from diffusion_distillation.train_state import Params, TrainState

# Keys that may change between two runs in one workdir: they touch no parameter of any stage.
FREE = ('evaluation.', 'log.', 'checkpoint.')


@dataclasses.dataclass(frozen=True)
class Model:
  """A stage's EMA parameters, finished or not, ready to be sampled from or taught by."""

  stage: Stage
  params: Params
  digest: str
  step: int
  seconds: float


def open_workdir(workdir: pathlib.Path, config: Config) -> Any:
  """Makes `workdir` this config's, or checks that it is; returns the lock that keeps others out.

  Raises:
    UserError: it cannot be written, was made with another config, or another run is using it.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = (workdir / '.lock').open('w')
  except OSError as error:
    raise UserError(f'cannot write to --workdir={workdir}: {error.strerror}') from error
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except OSError as error:
    raise UserError(f'another run is using --workdir={workdir}') from error
  path = workdir / 'config.json'
  if path.exists():
    _check_same(workdir, read_json(path), config)
  write_json(path, json.loads(config.to_json()))
  return lock


def _check_same(workdir: pathlib.Path, made_with: dict[str, Any], config: Config) -> None:
  old, new = dict(flatten(made_with)), dict(flatten(json.loads(config.to_json())))
  keys = sorted(key for key in old.keys() | new.keys() if not key.startswith(FREE))
  differing = [
    f'{key} was {old.get(key, "absent")}, is {new.get(key, "absent")}'
    for key in keys
    if old.get(key, 'absent') != new.get(key, 'absent')
  ]
  if differing:
    raise UserError(
      f'--workdir={workdir} was made with another config: {"; ".join(differing)}. '
      'Use that config, or another workdir'
    )


def read_config(workdir: pathlib.Path) -> Config:
  """The config that `workdir` was made with, locked."""
  path = workdir / 'config.json'
  if not path.is_file():
    raise UserError(f'--workdir={workdir} holds no run: there is no {path}')
  config = Config(_tuples(read_json(path)))
  return config.lock()


def _tuples(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _tuples(v) for key, v in value.items()}
  return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def plan_for(config: Config) -> tuple[list[Stage], datasets.ImageSet]:
  """The stages of `config`, and its training images."""
  images = datasets.load(config.dataset.name, 'train')
  return plan(config, images.images.shape[1:], images.num_classes), images


def _lineage(stage: Stage, parent: Model | None, config: Config) -> dict[str, Any]:
  """What has to be known of a stage to use its parameters rightly."""
  network = dataclasses.asdict(stage.denoise.network)
  return {
    'stage': stage.name,
    'method': stage.method,
    'parent': parent and {'stage': parent.stage.name, 'digest': parent.digest},
    'output': stage.denoise.output,
    'network': {key: network[key] for key in network if key not in ('parent', 'name')},
    'schedule': {'name': type(stage.schedule).__name__, **dataclasses.asdict(stage.schedule)},
    'num_steps': stage.num_steps,
    'data_range': [-1.0, 1.0],
    'num_updates': stage.num_updates,
    'config': json.loads(config.to_json()),
  }


def begin_stage(workdir: pathlib.Path, stage: Stage, parent: Model | None, config: Config) -> None:
  """Writes the stage's lineage before its first update, or checks the one that is there.

  Raises:
    UserError: what is there had another parent, or was made to be sampled in another way.
  """
  path = workdir / stage.name / 'stage.json'
  path.parent.mkdir(exist_ok=True)
  expected = _lineage(stage, parent, config)
  if path.exists():
    _check_lineage(path, read_json(path), expected)
  else:
    write_json(path, expected | {'finished': False})


def finish_stage(workdir: pathlib.Path, parent: Model | None, model: Model, config: Config) -> None:
  """Writes the lineage of a finished stage: with the digest of its parameters."""
  outcome = {'finished': True, 'digest': model.digest, 'seconds': model.seconds}
  path = workdir / model.stage.name / 'stage.json'
  write_json(path, _lineage(model.stage, parent, config) | outcome)


def check_digest(workdir: pathlib.Path, model: Model) -> None:
  """Raises DamagedError if a finished model is not the one that its lineage names."""
  path = workdir / model.stage.name / 'stage.json'
  found = read_json(path)
  if found.get('finished') and found.get('digest') != model.digest:
    raise DamagedError(
      f'{path} names parameters with digest {str(found.get("digest"))[:12]}, but its checkpoint holds '
      f'{model.digest[:12]}; one of them was replaced: restore it, or remove {path.parent}'
    )


def _check_lineage(path: pathlib.Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
  expected = json.loads(json.dumps(expected))
  for key in ('parent', 'method', 'output', 'network', 'schedule', 'num_steps', 'data_range'):
    if found.get(key) != expected[key]:
      raise UserError(
        f'{path}: {key} is {found.get(key)}, but this run needs {expected[key]}; '
        f'remove {path.parent} to train this stage again'
      )


def load_model(workdir: pathlib.Path, stage: Stage) -> Model | None:
  """The stage as far as it is trained, checked against its lineage; None if nothing is there.

  Only reads: a damaged checkpoint is named and passed over.

  Raises:
    UserError: its lineage does not fit the config.
    DamagedError: it is finished, but its parameters are not those that its lineage names.
  """
  stage_dir = workdir / stage.name
  if not (stage_dir / 'stage.json').is_file():
    return None
  found = read_json(stage_dir / 'stage.json')
  expected = _lineage(stage, None, read_config(workdir)) | {'parent': found.get('parent')}
  _check_lineage(stage_dir / 'stage.json', found, expected)
  restored = Checkpoints(stage_dir).restore(abstract_state(stage), set_aside=False)
  if restored is None:
    return None
  model = to_model(stage, *restored)
  if model.step == stage.num_updates:
    check_digest(workdir, model)
  return model


def to_model(stage: Stage, state: TrainState, seconds: float) -> Model:
  """A training state, seen as what is sampled from."""
  return Model(stage, state.ema_params, digest(state.ema_params), int(state.step), seconds)


def abstract_state(stage: Stage) -> TrainState:
  """Shapes and types of the stage's training state; nothing is computed."""
  shape = stage.image_shape
  return jax.eval_shape(
    lambda rng: stage.recipe.create_state(stage.denoise.init(rng, shape)), jax.random.key(0)
  )
