"""A model is a folder with `weights.safetensors` and with `model.json`, which describes how to use the weights.

A model that works on latents or is conditioned on text also has the networks in `companions.py`.

The folder is self-contained: it needs neither the config nor the training state, and can be moved to another machine.
Nothing in it is executed: networks, spaces and schedules are looked up by name in this package's tables.
"""

import dataclasses
import importlib.metadata
import json
import os
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any

import jax
import safetensors
import safetensors.numpy
from flax import traverse_util

from diffusion_distillation.config import choose
from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.process import OUTPUTS
from diffusion_distillation.diffusion.samplers import SAMPLERS
from diffusion_distillation.diffusion.schedules import SCHEDULES, Schedule
from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.networks import NETWORKS
from diffusion_distillation.networks.denoiser import Denoiser
from diffusion_distillation.networks.lora import Adapters
from diffusion_distillation.networks.spaces import SPACES, Latents, Space
from diffusion_distillation.stages import adapters as of_lora
from diffusion_distillation.stages import companions
from diffusion_distillation.stages.texts import TextEncoder
from diffusion_distillation.system import files
from diffusion_distillation.system.checkpoints import digest
from diffusion_distillation.training.state import Params

DESCRIPTION, WEIGHTS = 'model.json', 'weights.safetensors'
FORMAT = 1
_FIELDS = (
  *('format', 'network', 'output', 'space', 'schedule', 'sampler', 'num_steps', 'times', 'clip_x'),
  *('image_shape', 'conditioning', 'cond_dropout', 'digest', 'provenance', 'metrics'),
)
_TEXT = 'text'  # a further field, of models that have a text encoder
# Fields of a network that only affect how it is computed, or that are stored elsewhere in the description.
NOT_ARGUMENTS = ('parent', 'name', 'dtype', 'remat', 'attention', 'schedule')


@dataclasses.dataclass(frozen=True)
class StoredModel:
  """The contents of a model's folder.

  Attributes:
    denoise: the network as a denoiser, without dropout.
    params: its parameters, on the host.
    schedule: maps t to logsnr.
    space: the space of x.
    image_shape: (H, W, C).
    sampler: the sampler that the model is made for, a name in SAMPLERS.
    num_steps: the number of sampling steps that the model is made for.
    times: the spacing of the sampling steps, a name in `times.GRIDS`.
    clip_x: whether x is clipped while sampling.
    cond_dropout: the fraction of training examples whose conditions were dropped; if it is above 0, the model can also
      be sampled without conditions.
    class_names: names of the classes by label; empty if there are no classes or they have no names.
    label_counts: training images of each class, by label; empty if there are no classes or the counts are unknown.
    provenance: how the model was made: method, step count, parents and their digests, versions.
    metrics: rows of measurements; empty until the model is measured.
    digest: the digest of `params`, if it is known.
    text: the text encoder, if the model is conditioned on text.
    adapters: the low-rank adapters that are part of `params`, to be written beside them; not read again with the model.
  """

  denoise: Denoiser
  params: Params
  schedule: Schedule
  space: Space
  image_shape: tuple[int, ...]
  sampler: str
  num_steps: int
  times: str = 'uniform'
  clip_x: bool = True
  cond_dropout: float = 0.0
  class_names: tuple[str, ...] = ()
  label_counts: tuple[int, ...] = ()
  provenance: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  metrics: tuple[Mapping[str, Any], ...] = ()
  digest: str | None = None
  text: TextEncoder | None = None
  adapters: Adapters | None = None


def name_in(table: Mapping[str, type], thing: Any) -> str:
  """Returns the name of an object's class in a table; raises ValueError if the table lacks it."""
  for name, cls in table.items():
    if type(thing) is cls:
      return name
  raise ValueError(f'{type(thing).__name__} is not in the table of {", ".join(table)}')


def network_arguments(network: Any) -> dict[str, Any]:
  """Returns the arguments of a network that determine its parameters."""
  fields = [field.name for field in dataclasses.fields(network) if field.name not in NOT_ARGUMENTS]
  found = {name: getattr(network, name) for name in fields}
  if not found.get(
    'guidance', True
  ):  # stages of older versions, whose networks have no such argument, stay as they are
    del found['guidance']
  return found


def describe(model: StoredModel) -> dict[str, Any]:
  """Returns the contents of a model's `model.json`."""
  network = model.denoise.network
  of_classes = {'names': list(model.class_names), 'counts': list(model.label_counts)}
  label = {key: values for key, values in of_classes.items() if values}
  return {
    'format': FORMAT,
    'network': {'name': name_in(NETWORKS, network), 'arguments': network_arguments(network)},
    'output': model.denoise.output,
    'space': {
      'name': name_in(SPACES, model.space),
      'arguments': companions.describe_space(model.space),
    },
    'schedule': {
      'name': name_in(SCHEDULES, model.schedule),
      'arguments': dataclasses.asdict(model.schedule),
    },
    'sampler': model.sampler,
    'num_steps': model.num_steps,
    'times': model.times,
    'clip_x': model.clip_x,
    'image_shape': list(model.image_shape),
    'conditioning': {
      key: dataclasses.asdict(condition) | (label if key == 'label' else {})  # type: ignore[call-overload]
      for key, condition in model.denoise.conditioning.items()
    },
    'cond_dropout': model.cond_dropout,
    'digest': model.digest or digest(model.params),
    'provenance': dict(model.provenance),
    'metrics': list(model.metrics),
  } | ({} if model.text is None else {_TEXT: companions.describe_text(model.text)})


def versions() -> dict[str, str]:
  """Returns the installed versions of the packages that compute a model."""
  names = ('jax', 'flax', 'optax')
  return {name: importlib.metadata.version(name) for name in names}


def write(directory: pathlib.Path, model: StoredModel, anew: bool = False) -> None:
  """Writes a model's folder atomically.

  If the folder already holds the same weights, only the settings of sampling are updated; the weights, their provenance and
  their metrics stay. With `anew`, the folder is always replaced.
  """
  if not files.writes():
    return
  description = json.loads(json.dumps(describe(model)))
  if not anew and (directory / DESCRIPTION).is_file():
    found = files.read_json(directory / DESCRIPTION)
    if found.get('digest') == description['digest'] and (directory / WEIGHTS).is_file():
      kept = description | {key: found[key] for key in ('provenance', 'metrics') if key in found}
      if kept != found:
        files.write_json(directory / DESCRIPTION, kept)
      return
  temporary = directory.with_name(directory.name + '.tmp')
  shutil.rmtree(temporary, ignore_errors=True)
  temporary.mkdir(parents=True)
  flat = traverse_util.flatten_dict(model.params, sep='/')
  safetensors.numpy.save_file(flat, temporary / WEIGHTS, {'digest': description['digest']})
  companions.write(temporary, model.space, model.text)
  if model.adapters is not None:
    of_lora.write(temporary, model.adapters, model.params, model.provenance['start']['digest'])
  files.write_json(temporary / DESCRIPTION, description)
  shutil.rmtree(directory, ignore_errors=True)
  os.replace(temporary, directory)


def with_history(directory: pathlib.Path, model: StoredModel) -> StoredModel:
  """Returns the model with the provenance, metrics and classes of an existing folder, if that can be read."""
  try:
    found = read(directory, weights=False)
  except UserError:
    return model
  return dataclasses.replace(
    model,
    class_names=found.class_names or model.class_names,
    label_counts=found.label_counts or model.label_counts,
    provenance=found.provenance,
    metrics=found.metrics,
  )


def add_metrics(directory: pathlib.Path, rows: list[dict[str, Any]]) -> None:
  """Records the measurements of a model in its folder, in place of earlier ones."""
  path = directory / DESCRIPTION
  if path.is_file() and files.writes():
    found = files.read_json(path)
    if found.get('metrics') != rows:
      files.write_json(path, found | {'metrics': rows})


def read(directory: pathlib.Path, weights: bool = True) -> StoredModel:
  """Reads the model in a folder; without `weights`, its `params` are None.

  Raises:
    UserError: there is no model, or its description has fields or values that this version does not know.
    DamagedError: the description or the weights were changed after they were written.
  """
  path = directory / DESCRIPTION
  if not path.is_file():
    raise UserError(f'{directory} holds no model: there is no {DESCRIPTION} in it')
  found = files.read_json(path)
  unknown, missing = (
    sorted(set(found) - {*_FIELDS, _TEXT}),
    [key for key in _FIELDS if key not in found],
  )
  if unknown or found.get('format') != FORMAT:
    what = f'field {unknown[0]!r}' if unknown else f'format {found.get("format")}'
    raise UserError(f'{path}: {what} is not known to this version; it was written by a newer one')
  if missing:
    raise DamagedError(f'{path} is damaged (no {missing[0]!r} in it); restore it from a copy')
  try:
    schedule = _build(path, 'schedule', SCHEDULES, found['schedule'])
    network = _build(path, 'network', NETWORKS, found['network'], schedule=schedule)
    space = _read_space(path, found['space'])
    text = companions.read_text(directory, found[_TEXT]) if _TEXT in found else None
    choose(f'{path}: output', found['output'], OUTPUTS)
    choose(f'{path}: sampler', found['sampler'], SAMPLERS)
    choose(f'{path}: times', found['times'], dict.fromkeys(times.GRIDS))
    image_shape = tuple(map(int, found['image_shape']))
    num_steps, clip_x = int(found['num_steps']), bool(found['clip_x'])
    cond_dropout = float(found['cond_dropout'])
    label = found['conditioning'].get('label', {})
    names, counts = tuple(map(str, label.get('names', ()))), tuple(map(int, label.get('counts', ())))
    metrics, provenance = tuple(map(dict, found['metrics'])), dict(found['provenance'])
    if num_steps < 1 or min(image_shape) < 1:
      raise ValueError(f'num_steps={num_steps}, image_shape={image_shape}')
    denoise = Denoiser(network, found['output'])
    shape = space.shape(image_shape)
    network.check(shape)
    params = _read_weights(directory, denoise, shape, found['digest']) if weights else None
  except UserError:
    raise
  except Exception as error:  # with damaged arguments, a network may raise anything
    raise DamagedError(f'{path} is damaged ({error!r}); restore it from a copy') from error
  return StoredModel(
    denoise=denoise,
    params=params,
    schedule=schedule,
    space=space,
    image_shape=image_shape,
    sampler=found['sampler'],
    num_steps=num_steps,
    times=found['times'],
    clip_x=clip_x,
    cond_dropout=cond_dropout,
    class_names=names,
    label_counts=counts,
    provenance=provenance,
    metrics=metrics,
    digest=found['digest'],
    text=text,
  )


def _read_space(path: pathlib.Path, entry: Mapping[str, Any]) -> Space:
  if SPACES.get(entry['name']) is Latents:
    return companions.read_latents(path.parent, entry['arguments'])
  space: Space = _build(path, 'space', SPACES, entry)
  return space


def _build(
  path: pathlib.Path, key: str, table: Mapping[str, type], entry: Mapping[str, Any], **given: Any
) -> Any:
  """Builds an object from the name and arguments in `entry`, and from those arguments in `given` that its class accepts."""
  cls = choose(f'{path}: {key}', entry['name'], table)
  known = {field.name for field in dataclasses.fields(cls)}
  arguments = {k: tuple(v) if isinstance(v, list) else v for k, v in entry['arguments'].items()}
  if unknown := sorted(set(arguments) - known):
    raise UserError(f'{path}: {key} {entry["name"]!r} has no argument {unknown[0]!r} in this version')
  try:
    return cls(**arguments, **{k: v for k, v in given.items() if k in known})
  except (TypeError, ValueError) as error:
    raise UserError(f'{path}: {key}: {error}') from error


def _read_weights(
  directory: pathlib.Path, denoise: Denoiser, shape: tuple[int, ...], expected: str
) -> Params:
  path = directory / WEIGHTS
  if not path.is_file():
    raise DamagedError(f'{path} is missing; restore it from a copy')
  try:
    flat = safetensors.numpy.load_file(path)
  except safetensors.SafetensorError as error:
    raise DamagedError(f'{path} is damaged ({error}); restore it from a copy') from error
  wanted = traverse_util.flatten_dict(
    jax.eval_shape(lambda rng: denoise.init(rng, shape), jax.random.key(0)), sep='/'
  )
  for name in sorted(wanted.keys() | flat.keys()):
    if name not in flat:
      raise DamagedError(f'{path}: weight {name!r} is missing; restore it from a copy')
    if name not in wanted:
      raise DamagedError(f'{path}: weight {name!r} does not belong to the network in {DESCRIPTION}')
    if flat[name].shape != wanted[name].shape:
      raise DamagedError(
        f'{path}: weight {name!r} has shape {flat[name].shape}, its network needs {wanted[name].shape}'
      )
  params: Params = traverse_util.unflatten_dict(flat, sep='/')
  if digest(params) != expected:
    raise DamagedError(
      f'{path} does not match {DESCRIPTION} (its digest differs); restore it from a copy'
    )
  return params
