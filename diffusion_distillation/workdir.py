"""The workdir: its config, and the lineage of each stage in it.

workdir/config.json         what made it; the workdir alone is enough to sample from it
workdir/<stage>/stage.json  parent and its digest, parameterization, schedule, step count, data range, config
"""

import dataclasses
import fcntl
import json
import pathlib
from collections.abc import Mapping
from typing import IO, Any

import jax

from diffusion_distillation import datasets
from diffusion_distillation.checkpoints import Checkpoints, digest, read_json, write_json
from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.stages import Config, Stage, check_known, flatten, plan
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


def lock_workdir(workdir: pathlib.Path) -> IO[str]:
  """Makes `workdir` if need be; returns the lock, to be closed, that keeps other runs out.

  Raises:
    UserError: it cannot be written, or another run is using it.
  """
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    lock = (workdir / '.lock').open('w')
  except OSError as error:
    raise UserError(f'cannot write to --workdir={workdir}: {error.strerror}') from error
  try:
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError as error:
    raise UserError(f'another run is using --workdir={workdir}') from error
  return lock


def check_config(path: pathlib.Path, made_with: Mapping[str, Any], config: Config) -> None:
  """Raises UserError, with the differing keys, if what `path` belongs to was made with another config.

  Keys of FREE sections may differ; keys that an older version did not have are not compared.
  """
  old, new = dict(flatten(made_with)), dict(flatten(json.loads(config.to_json())))
  differing = [
    f'{key} was {value}, is {new.get(key, "absent")}'
    for key, value in sorted(old.items())
    if not key.startswith(FREE) and value != new.get(key, 'absent')
  ]
  if differing:
    raise UserError(
      f'{path}: made with another config: {"; ".join(differing)}. Use that config, or another workdir'
    )


def claim(workdir: pathlib.Path, config: Config) -> None:
  """Writes `config.json`, or checks the one that is there; raises UserError as `check_config` does."""
  path = workdir / 'config.json'
  if path.exists():
    check_config(path, read_json(path), config)
  write_json(path, json.loads(config.to_json()))


def read_config(workdir: pathlib.Path, default: Config) -> Config:
  """The config that `workdir` was made with; keys that are newer than it have their defaults.

  Raises:
    UserError: there is no run, or its config has keys that this version does not know.
    DamagedError: its config cannot be read.
  """
  path = workdir / 'config.json'
  if not path.is_file():
    raise UserError(f'--workdir={workdir} holds no run: there is no {path}')
  stored = Config(_tuples(read_json(path)))
  known = [key for key, _ in flatten(default)]
  check_known([key for key, _ in flatten(stored)], known)
  config = default.copy_and_resolve_references().unlock()
  config.update(stored)
  return config.lock()


def _tuples(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _tuples(v) for key, v in value.items()}
  return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def plan_for(config: Config) -> tuple[list[Stage], datasets.ImageSet]:
  """The stages of `config`, and its training images."""
  images = datasets.load(config.dataset.name, 'train')
  return plan(config, images.images.shape[1:], images.num_classes), images


def stored_plan(workdir: pathlib.Path, config: Config) -> list[Stage]:
  """The stages of `config` without its data, which need not be at hand to sample from a workdir."""
  path = workdir / 'base' / 'stage.json'
  if not path.is_file():
    raise UserError(f'--workdir={workdir} holds no stage yet: there is no {path}')
  found = read_json(path)
  try:
    return plan(config, tuple(found['image_shape']), int(found['network']['num_classes']))
  except (KeyError, TypeError, ValueError) as error:
    raise DamagedError(f'{path} is damaged ({error!r}); restore it from a copy') from error


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
    'image_shape': list(stage.image_shape),
    'num_updates': stage.num_updates,
    'config': json.loads(config.to_json()),
  }


def begin_stage(workdir: pathlib.Path, stage: Stage, parent: Model | None, config: Config) -> None:
  """Writes the stage's lineage before its first update, or checks the one that is there.

  Raises:
    UserError: what is there had another parent or config, or was made to be sampled in another way.
    DamagedError: there are checkpoints, but no lineage.
  """
  path = workdir / stage.name / 'stage.json'
  path.parent.mkdir(exist_ok=True)
  expected = _lineage(stage, parent, config)
  if path.exists():
    _check_lineage(path, read_json(path), expected, config)
  elif Checkpoints(path.parent).steps():
    raise DamagedError(f'{path} is missing; restore it, or remove {path.parent} to train it again')
  else:
    write_json(path, expected | {'finished': False})


def finish_stage(workdir: pathlib.Path, parent: Model | None, model: Model, config: Config) -> None:
  """Adds the digest of its parameters to the lineage of a finished stage, unless it is there."""
  path = workdir / model.stage.name / 'stage.json'
  if read_json(path).get('digest') != model.digest:
    outcome = {'finished': True, 'digest': model.digest, 'seconds': model.seconds}
    write_json(path, _lineage(model.stage, parent, config) | outcome)


def is_finished(workdir: pathlib.Path, stage: Stage) -> bool:
  """Whether the lineage says that the stage was trained to its end."""
  return bool(read_json(workdir / stage.name / 'stage.json').get('finished'))


def check_digest(workdir: pathlib.Path, model: Model) -> None:
  """Raises DamagedError if a finished model is not the one that its lineage names."""
  path = workdir / model.stage.name / 'stage.json'
  found = read_json(path)
  if found.get('finished') and found.get('digest') != model.digest:
    raise DamagedError(
      f'{path} names parameters with digest {str(found.get("digest"))[:12]}, but its checkpoint holds '
      f'{model.digest[:12]}; one of them was replaced: restore it, or remove {path.parent}'
    )


def _check_lineage(
  path: pathlib.Path, found: dict[str, Any], expected: dict[str, Any], config: Config
) -> None:
  check_config(path, found.get('config') or {}, config)
  expected = json.loads(json.dumps(expected))
  names = ['parent', 'method', 'output', 'network', 'schedule', 'num_steps', 'data_range', 'image_shape']
  for key in names:
    if found.get(key) != expected[key]:
      raise UserError(
        f'{path}: {key} is {found.get(key)}, but this run needs {expected[key]}; '
        f'remove {path.parent} to train this stage again'
      )


def load_model(workdir: pathlib.Path, stage: Stage, config: Config) -> Model | None:
  """The stage as far as it is trained, checked against its lineage; None if nothing whole is there.

  Only reads: a damaged checkpoint is named and passed over.

  Raises:
    UserError: its lineage does not fit the config.
    DamagedError: it is finished, but its parameters are not those that its lineage names.
  """
  stage_dir = workdir / stage.name
  if not (stage_dir / 'stage.json').is_file():
    return None
  found = read_json(stage_dir / 'stage.json')
  expected = _lineage(stage, None, config) | {'parent': found.get('parent')}
  _check_lineage(stage_dir / 'stage.json', found, expected, config)
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
