"""The provenance of each stage of a workdir: what its parameters mean, and how they were made.

workdir/<stage>/stage.json  parents and their digests, parameterization, schedule, step count, space, config
workdir/<stage>/model/      the finished model; see `stages/model.py`
"""

import contextlib
import dataclasses
import functools
import json
import logging
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from diffusion_distillation.config import Config
from diffusion_distillation.errors import DamagedError
from diffusion_distillation.networks import NETWORKS
from diffusion_distillation.networks.spaces import SPACES
from diffusion_distillation.stages import extending
from diffusion_distillation.stages.comparison import PARENTS, check_lineage, raised_updates
from diffusion_distillation.stages.model import (
  DESCRIPTION,
  StoredModel,
  name_in,
  network_arguments,
  read,
  versions,
  with_history,
  write,
)
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.stages.trained import Model, Stored, base_of, set_on_host, to_model
from diffusion_distillation.stages.workdir import class_names, label_counts
from diffusion_distillation.system import cluster
from diffusion_distillation.system.checkpoints import Checkpoints
from diffusion_distillation.system.files import read_json, write_json
from diffusion_distillation.training.state import Params

_log = logging.getLogger(__name__)


def describe(stage: Stage) -> dict[str, Any]:
  """Describes what a stage's parameters mean: output, network, space, schedule and the shape of images."""
  network = stage.denoise.network
  return {
    'output': stage.denoise.output,
    'network_name': name_in(NETWORKS, network),
    'network': network_arguments(network),
    'space': name_in(SPACES, stage.space),
    'schedule': {'name': type(stage.schedule).__name__, **dataclasses.asdict(stage.schedule)},
    'image_shape': list(stage.image_shape),
  }


@dataclasses.dataclass(frozen=True)
class Parents:
  """The parents of a stage.

  Attributes:
    teacher: the parent's model, or None.
    start: the model that the stage starts from, or None if it starts from new parameters.
    pairs: digest of the stored pairs that the stage is trained on, or None.
    distance: digest of the weights of the stage's distance, or None.
  """

  teacher: Model | None = None
  start: Model | None = None
  pairs: str | None = None
  distance: str | None = None

  def describe(self) -> dict[str, Any]:
    """Returns the parents as stage.json records them."""
    models = {'parent': self.teacher, 'start': self.start}
    found: dict[str, Any] = {
      key: model and {'stage': model.stage.name, 'weights': model.weights, 'digest': model.digest}
      for key, model in models.items()
    }
    return found | {'pairs': self.pairs, 'distance': self.distance}


def _lineage(stage: Stage, parents: Parents, config: Config) -> dict[str, Any]:
  """Returns everything that is needed to use a stage's parameters correctly."""
  return {
    'stage': stage.name,
    'method': stage.method,
    **parents.describe(),
    **describe(stage),
    'sampler': stage.sampler,
    'num_steps': stage.num_steps,
    'num_updates': stage.num_updates,
    'config': json.loads(config.to_json()),
  }


def begin_stage(workdir: pathlib.Path, stage: Stage, parents: Parents, config: Config) -> None:
  """Writes the stage's lineage before its first update, or checks the existing lineage.

  If the config only asks for more updates, or the quality gate does, the lineage is marked as unfinished again; see
  `extending`.

  Raises:
    UserError: the existing stage has another parent or config, or is made for another sampler or number of steps.
    DamagedError: there are checkpoints, but no lineage.
  """
  path = workdir / stage.name / 'stage.json'
  path.parent.mkdir(exist_ok=True)
  expected = _lineage(stage, parents, config)
  if path.exists():
    found = read_json(path)
    check_lineage(path, found, expected, config)
    raised = raised_updates(stage.name, found.get('config') or {}, config)
    if raised or extending.updates_of(found, stage) < stage.num_updates:
      write_json(path, extending.begun(found, expected))
  elif Checkpoints(path.parent).steps():
    raise DamagedError(f'{path} is missing; restore it, or remove {path.parent} to train it again')
  else:
    write_json(path, expected | {'finished': False})


def to_stored(
  workdir: pathlib.Path, model: Model, config: Config, parents: Parents | None = None
) -> StoredModel:
  """Returns a stage's model as it is stored; a base that was trained here takes its sampling settings from `evaluation`."""
  stage = model.stage
  return StoredModel(
    denoise=stage.denoise,
    params=model.params,
    digest=model.digest,
    schedule=stage.schedule,
    space=stage.space,
    image_shape=stage.image_shape,
    sampler=stage.sampler,
    num_steps=stage.num_steps,
    times=stage.times or ('uniform' if stage.parent else config.evaluation.grid),
    clip_x=config.evaluation.clip_x if stage.clip_x is None else stage.clip_x,
    cond_dropout=stage.recipe.cond_dropout,
    text=stage.text,
    class_names=tuple(class_names(workdir)),
    label_counts=label_counts(workdir),
    provenance={
      'stage': stage.name,
      'method': stage.method,
      'updates': updates_done(workdir, model),
      'seconds': model.seconds,
      **(parents or Parents()).describe(),
      **({} if stage.recipe.lora is None else {'lora': stage.recipe.lora.describe()}),
      'versions': versions(),
    },
    adapters=model.adapters,
  )


def updates_done(workdir: pathlib.Path, model: Model) -> int | None:
  """Returns the number of updates that trained the model, also if it was imported; None if that is unknown."""
  path = workdir / model.stage.name / 'stage.json'
  found = read_json(path) if path.is_file() else {}
  return found.get('num_updates') if found.get('imported') else model.step


def finish_stage(
  workdir: pathlib.Path,
  parents: Parents,
  model: Model,
  config: Config,
  anew: bool,
  early_stop: Mapping[str, Any] | None = None,
) -> None:
  """Writes the model of a finished stage and records its digest in the provenance, unless this was done before.

  Args:
    workdir: the directory that contains the stage's directory.
    parents: its parents.
    model: the model.
    config: the config of the run.
    anew: the model's folder is incomplete or was not read, and is replaced.
    early_stop: what stage.json records of how early stopping ended the stage; empty or None without it.
  """
  path, stored = workdir / model.stage.name / 'stage.json', to_stored(workdir, model, config, parents)
  folder = path.parent / 'model'
  found = read_json(path)
  if found.get('imported'):
    stored = with_history(folder, stored)
  cluster.barrier()  # no process reads the folder while the first one replaces it
  write(folder, stored, anew)
  cluster.barrier()
  if found.get('digest') != model.digest:
    outcome = {'finished': True, 'digest': model.digest, 'seconds': model.seconds}
    outcome['digests'] = dict(model.digests)
    lineage = _lineage(model.stage, parents, config) | extending.history(found)
    write_json(path, lineage | outcome | dict(early_stop or {}))


def is_finished(workdir: pathlib.Path, stage: Stage) -> bool:
  """Whether, according to its lineage, the stage is finished with as many updates as it has now."""
  path = workdir / stage.name / 'stage.json'
  return path.is_file() and extending.is_trained(read_json(path), stage)


def was_finished(workdir: pathlib.Path, stage: Stage) -> bool:
  """Whether, according to its lineage, the stage is finished or was finished before it was extended."""
  path = workdir / stage.name / 'stage.json'
  found = read_json(path) if path.is_file() else {}
  return bool(found.get('finished') or extending.history(found))


def check_digest(workdir: pathlib.Path, model: Model) -> None:
  """Raises DamagedError if a finished model does not match the digest in its lineage."""
  path = workdir / model.stage.name / 'stage.json'
  found = read_json(path)
  if found.get('finished') and found.get('digest') != model.digest:
    raise DamagedError(
      f'{path} names parameters with digest {str(found.get("digest"))[:12]}, but its checkpoint holds '
      f'{model.digest[:12]}; one of them was replaced: restore it, or remove {path.parent}'
    )


def load_model(
  workdir: pathlib.Path, stage: Stage, config: Config, weights: Sequence[str] = ('ema',)
) -> Model | None:
  """Loads a stage, finished or not, and checks it against its lineage; returns None if nothing intact is found.

  The average of a finished stage is read from its folder, all other weights from the last checkpoint. Nothing is written:
  a damaged checkpoint is reported and skipped.

  Raises:
    UserError: the lineage does not match the config.
    DamagedError: the stage is finished, but its parameters do not match the digest in its lineage.
  """
  stage_dir = workdir / stage.name
  if not (stage_dir / 'stage.json').is_file():
    return None
  found = read_json(stage_dir / 'stage.json')
  expected = _lineage(stage, Parents(), config) | {key: found.get(key) for key in PARENTS}
  check_lineage(stage_dir / 'stage.json', found, expected, config)
  folder = stage_dir / 'model'
  if tuple(weights) == ('ema',) and found.get('finished') and (folder / DESCRIPTION).is_file():
    model = _from_folder(stage, folder)
    check_digest(workdir, model)
    return model
  restored = Checkpoints(stage_dir).restore(stage.abstract_state, set_aside=False)
  if restored is None:
    return None
  model = to_model(stage, *restored, base_of(workdir, stage))
  if model.step == extending.trained_updates(found, stage):
    check_digest(workdir, model)
  return model


def finished_model(workdir: pathlib.Path, stage: Stage) -> Model | None:
  """Reads a finished stage's model from its folder and keeps its average in memory; returns None if the folder is damaged.

  The parameters are hashed only once.

  Raises:
    DamagedError: the parameters do not match the digest in the lineage.
  """
  folder, model = workdir / stage.name / 'model', None
  if is_finished(workdir, stage) and (folder / DESCRIPTION).is_file():
    try:
      model = _from_folder(stage, folder)
    except DamagedError as error:
      _log.warning('%s; the last checkpoint is used', error)
  if not cluster.agree(model is not None) or model is None:
    return None
  check_digest(workdir, model)
  digests = read_json(workdir / stage.name / 'stage.json').get('digests') or {}
  return dataclasses.replace(release(workdir, model, ('ema',)), digests=digests)


def _from_folder(stage: Stage, folder: pathlib.Path) -> Model:
  """Reads a finished stage's model from its folder; `read` checks its digest."""
  stored, found = read(folder), read_json(folder.parent / 'stage.json')
  seconds, all_ = float(stored.provenance['seconds']), {'ema': stored.params}
  return Model(stage, 'ema', str(stored.digest), extending.trained_updates(found, stage), seconds, all_)


def release(workdir: pathlib.Path, model: Model, keep: Collection[str]) -> Model:
  """Returns the model with only the sets `keep` in memory, if they are held now; all others are read when accessed."""
  held = model.all.held if isinstance(model.all, Stored) else model.all
  kept = {name: params for name, params in held.items() if name in keep}
  read_set = functools.partial(_read_set, workdir, model.stage)
  return dataclasses.replace(model, all=Stored(model.stage.weights, read_set, kept))


def _read_set(workdir: pathlib.Path, stage: Stage, weights: str) -> Params:
  """Reads one set of a stage's weights: a finished stage's first average from its folder, others from the last checkpoint."""
  folder = workdir / stage.name / 'model'
  if weights == 'ema' and is_finished(workdir, stage) and (folder / DESCRIPTION).is_file():
    return read(folder).params
  restored = Checkpoints(folder.parent).restore(stage.abstract_state, set_aside=False)
  if restored is None:
    raise DamagedError(
      f'{folder.parent}: no complete checkpoint is left to read the weights {weights!r} from'
    )
  return set_on_host(workdir, stage, restored[0], weights)


def adopt(
  workdir: pathlib.Path,
  stage: Stage,
  params: Params,
  config: Config,
  origin: Mapping[str, Any],
  class_names: Sequence[str] = (),
  made: Mapping[str, Any] | None = None,
  label_counts: Sequence[int] = (),
) -> Model:
  """Imports parameters as a finished stage of `workdir`; the run then begins with this stage.

  `stage.json` is written last, so an interrupted import leaves no stage.

  Args:
    workdir: the workdir of the new run.
    stage: the stage to create.
    params: the parameters of its network.
    config: the config of the run.
    origin: the source of the parameters, and their digest.
    class_names: names of the classes by label.
    made: the model's own provenance, if it has one.
    label_counts: number of training images of each class, if known.
  """
  stage_dir = workdir / stage.name
  stage = stage.without_parents()
  state = dataclasses.replace(
    stage.recipe.create_state(params), step=jnp.array(stage.num_updates, jnp.int32)
  )
  model = to_model(stage, state, 0.0)
  outcome = {'finished': True, 'digest': model.digest, 'seconds': 0.0, 'imported': dict(origin)}
  stage_dir.mkdir()
  stored = to_stored(workdir, model, config)
  imported = {**origin, 'provenance': dict(made or {})}
  history = {**stored.provenance, 'updates': 0, 'imported': imported}
  stored = dataclasses.replace(
    stored, class_names=tuple(class_names), label_counts=tuple(label_counts), provenance=history
  )
  write(stage_dir / 'model', stored)
  with contextlib.closing(Checkpoints(stage_dir)) as checkpoints:
    checkpoints.save(stage.num_updates, state, 0.0)
    checkpoints.wait()
  lineage = _lineage(stage, Parents(), config) | {'num_updates': extending.updates_in(made or {})}
  write_json(stage_dir / 'stage.json', lineage | outcome)
  return model
