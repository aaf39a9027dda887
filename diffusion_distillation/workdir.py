"""The workdir: its config, and the lineage of each stage in it.

workdir/config.json         what made it; the workdir alone is enough to sample from it
workdir/dataset.json        the images it was made from, and the names of their classes
workdir/<stage>/stage.json  parent and its digest, parameterization, schedule, step count, data range, config
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import IO, Any

import jax
import jax.numpy as jnp

from diffusion_distillation import datasets, files, sharding
from diffusion_distillation.checkpoints import Checkpoints, digest
from diffusion_distillation.configuration import Config, check_known, choose, flatten
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.files import read_json, write_json
from diffusion_distillation.stages import Stage, plan
from diffusion_distillation.train_state import Params, TrainState

# Keys that may change between two runs in one workdir: they touch no parameter of any stage.
FREE = (
  *('evaluation.', 'log.', 'checkpoint.'),
  *('dataset.path', 'dataset.prepared', 'dataset.in_memory_gb', 'dataset.workers'),
)


@dataclasses.dataclass(frozen=True)
class Model:
  """One set of a stage's weights, finished or not, ready to be sampled from or taught by.

  Attributes:
    stage: whose they are.
    weights: the name of the set, one of `stage.weights`.
    params: the set.
    digest: of `params`.
    step: updates done.
    seconds: of training.
    all: every set of the stage, by name.
  """

  stage: Stage
  weights: str
  params: Params
  digest: str
  step: int
  seconds: float
  all: Mapping[str, Params]

  def use(self, weights: str) -> 'Model':
    """The same stage with another set of its weights; raises UserError if it has none of that name."""
    if weights == self.weights:
      return self
    params = choose(f'stage {self.stage.name}: --weights', weights, self.all)
    return dataclasses.replace(self, weights=weights, params=params, digest=digest(params))


def lock_workdir(workdir: pathlib.Path) -> IO[str]:
  """Makes `workdir` if need be; returns the lock, to be closed, that keeps other runs out; see `files.lock`."""
  return files.lock(workdir, '--workdir')


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
  try:
    check_known([key for key, _ in flatten(stored)], known)
  except UserError as error:
    raise UserError(f'{path}: {error}') from error
  config = default.copy_and_resolve_references().unlock()
  config.update(stored)
  return config.lock()


def _tuples(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _tuples(v) for key, v in value.items()}
  return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def open_images(config: Config, role: str) -> Loader:
  """The images to train on ('train') or those held out ('eval'), not yet read; raises UserError without any."""
  section = config.dataset
  images = datasets.open_split(datasets.Settings.of(section), role)
  images.check(datasets.Settings.key(role))
  return Loader(images, section.in_memory_gb, section.workers, sharding.part())


def plan_for(workdir: pathlib.Path, config: Config) -> tuple[list[Stage], Loader]:
  """The stages of a run in `workdir` (which need not be there), and the training images, not yet read.

  Raises:
    UserError: config or images do not fit, or those that the run began with were others.
  """
  loader = open_images(config, 'train')
  open_images(config, 'eval')  # to find its errors now, not after training
  check_images(workdir, loader.images)
  shape, classes = loader.images.image_shape, loader.images.classes
  return cut(workdir, plan(config, shape, len(classes))), loader


def check_images(workdir: pathlib.Path, images: datasets.ImageSet) -> None:
  """Raises UserError unless the run in `workdir`, if there is one, began with these images."""
  path = workdir / 'dataset.json'
  if not path.is_file():
    return
  found = read_json(path)
  if found.get('identity') != images.identity:
    raise UserError(
      f'{path}: this run began with other images: {found.get("num_images")} of {len(found.get("classes", []))} '
      f'classes, now {len(images)} of {len(images.classes)}; restore them, or use another workdir'
    )


def claim_images(workdir: pathlib.Path, images: datasets.ImageSet) -> None:
  """Writes `dataset.json`, the names of the classes by label among it; raises UserError as `check_images` does."""
  check_images(workdir, images)
  described = {key: getattr(images, key) for key in ('name', 'image_shape', 'classes', 'identity')}
  write_json(workdir / 'dataset.json', described | {'num_images': len(images)})


def class_names(workdir: pathlib.Path) -> list[str]:
  """Names of the classes by label, as the run found them; none for an imported model."""
  path = workdir / 'dataset.json'
  return [str(name) for name in read_json(path).get('classes', [])] if path.is_file() else []


def stored_plan(workdir: pathlib.Path, config: Config) -> list[Stage]:
  """The stages of `config` without its data, which need not be at hand to sample from a workdir."""
  path = next(iter(sorted(workdir.glob('*/stage.json'))), None)
  if path is None:
    raise UserError(f'--workdir={workdir} holds no stage yet: there is no stage.json in it')
  found = read_json(path)
  try:
    image_shape, num_classes = tuple(found['image_shape']), int(found['network']['num_classes'])
  except (KeyError, TypeError, ValueError) as error:
    raise DamagedError(f'{path} is damaged ({error!r}); restore it from a copy') from error
  return cut(workdir, plan(config, image_shape, num_classes))


def cut(workdir: pathlib.Path, stages: list[Stage]) -> list[Stage]:
  """The plan as it is for a workdir into which a model was imported: it begins there."""
  for k, stage in reversed(list(enumerate(stages))):
    path = workdir / stage.name / 'stage.json'
    if path.is_file() and read_json(path).get('imported'):
      return [dataclasses.replace(stage, parent=None, parent_weights=''), *stages[k + 1 :]]
  return stages


def describe(stage: Stage) -> dict[str, Any]:
  """What its parameters mean: output, network, schedule and the shape of images."""
  network = dataclasses.asdict(stage.denoise.network)
  return {
    'output': stage.denoise.output,
    'network': {key: network[key] for key in network if key not in ('parent', 'name')},
    'schedule': {'name': type(stage.schedule).__name__, **dataclasses.asdict(stage.schedule)},
    'image_shape': list(stage.image_shape),
  }


def _lineage(stage: Stage, parent: Model | None, config: Config) -> dict[str, Any]:
  """What has to be known of a stage to use its parameters rightly."""
  return {
    'stage': stage.name,
    'method': stage.method,
    'parent': parent
    and {'stage': parent.stage.name, 'weights': parent.weights, 'digest': parent.digest},
    **describe(stage),
    'num_steps': stage.num_steps,
    'data_range': [-1.0, 1.0],
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
  path = workdir / stage.name / 'stage.json'
  return path.is_file() and bool(read_json(path).get('finished'))


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
  """A training state, seen as what is sampled from: its first moving average. On the host."""
  sets = sharding.to_host([*state.ema_params, state.params['student']])
  trees = dict(zip(stage.weights, sets, strict=True))
  params = trees['ema']
  return Model(stage, 'ema', params, digest(params), int(state.step), seconds, trees)


def adopt(
  workdir: pathlib.Path, stage: Stage, params: Params, config: Config, origin: Mapping[str, Any]
) -> Model:
  """Makes parameters from elsewhere a finished stage of `workdir`, in place of all before it."""
  stage_dir = workdir / stage.name
  stage = dataclasses.replace(stage, parent=None, parent_weights='')
  state = dataclasses.replace(
    stage.recipe.create_state(params), step=jnp.array(stage.num_updates, jnp.int32)
  )
  model = to_model(stage, state, 0.0)
  outcome = {'finished': True, 'digest': model.digest, 'seconds': 0.0, 'imported': dict(origin)}
  stage_dir.mkdir()
  write_json(stage_dir / 'stage.json', _lineage(stage, None, config) | outcome)
  with contextlib.closing(Checkpoints(stage_dir)) as checkpoints:
    checkpoints.save(stage.num_updates, state, 0.0)
  return model


def abstract_params(stage: Stage) -> Params:
  """Shapes and types of the stage's parameters; nothing is computed."""
  return jax.eval_shape(lambda rng: stage.denoise.init(rng, stage.image_shape), jax.random.key(0))


def abstract_state(stage: Stage) -> TrainState:
  """Shapes and types of the stage's training state; nothing is computed."""
  shape = stage.image_shape
  return jax.eval_shape(
    lambda rng: stage.recipe.create_state(stage.denoise.init(rng, shape)), jax.random.key(0)
  )
