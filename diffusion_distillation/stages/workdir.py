"""The workdir: its config, its images, and the plan of its stages.

workdir/config.json   the config of the run; the workdir alone is enough to sample from it
workdir/dataset.json  the identity of the training images, their class names and, for conditional models, the class sizes
"""

import io
import json
import pathlib
from typing import IO, Any, cast

from diffusion_distillation import datasets
from diffusion_distillation.config import Config, check_known, flatten
from diffusion_distillation.datasets import loading, prompts
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.datasets.prompts import Captions
from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.networks import conditioning
from diffusion_distillation.stages import comparison, extending, model, own_companions
from diffusion_distillation.stages.plan import Origin, plan
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system import cluster, files, sharding
from diffusion_distillation.system.files import read_json, write_json


def lock_workdir(workdir: pathlib.Path) -> IO[str]:
  """Creates `workdir` if necessary and locks it against other runs; see `files.lock`. Close the lock to release it.

  In a run of several processes, the first process holds the lock for all of them.

  Raises:
    UserError: the lock is taken, or the processes do not share the directory.
  """
  problem: str | None = None
  held: IO[str] = io.StringIO()
  if files.writes():
    try:
      held = files.lock(workdir, '--workdir')
    except UserError as error:
      problem = str(error)
  if problem := cluster.from_first(problem):
    raise UserError(problem)
  if not cluster.agree((workdir / files.LOCK).exists()):
    raise UserError(
      f'--workdir={workdir} must be a directory that all processes share, for example on NFS'
    )
  return held


def claim(workdir: pathlib.Path, config: Config) -> None:
  """Checks an existing `config.json` against the config, as `check_config` does, and writes the new one."""
  check_made_with(workdir, config)
  write_json(workdir / 'config.json', json.loads(config.to_json()))


def check_made_with(workdir: pathlib.Path, config: Config) -> None:
  """Raises UserError, as `check_config` does, if `workdir` holds a run that was made with another config."""
  path = workdir / 'config.json'
  if path.exists():
    comparison.check_config(path, read_json(path), config)


def read_config(workdir: pathlib.Path, default: Config) -> Config:
  """Returns the config of the run in `workdir`; keys that its version lacked get the values that reproduce its behavior.

  Raises:
    UserError: there is no run, or its config has keys that this version does not know.
    DamagedError: its config cannot be read.
  """
  path = workdir / 'config.json'
  if not path.is_file():
    raise UserError(f'--workdir={workdir} holds no run: there is no {path}')
  stored = Config(_tuples(comparison.of_this_version(read_json(path))))
  known = [key for key, _ in flatten(default)]
  try:
    check_known([key for key, _ in flatten(stored)], known)
  except UserError as error:
    raise UserError(f'{path}: {error}') from error
  config = default.copy_and_resolve_references().unlock()
  config.update(stored)
  config.update_from_flattened_dict(comparison.implied(dict(flatten(stored))))
  return config.lock()


def _tuples(value: Any) -> Any:
  if isinstance(value, dict):
    return {key: _tuples(v) for key, v in value.items()}
  return tuple(_tuples(v) for v in value) if isinstance(value, list) else value


def open_images(config: Config, role: str) -> Loader:
  """Opens the training images ('train') or the held-out images ('eval'); raises UserError if there are none.

  No image is read yet.
  """
  section = config.dataset
  images = datasets.open_split(datasets.Settings.of(section), role)
  images.check(datasets.Settings.key(role))
  return Loader(images, section.in_memory_gb, section.workers, sharding.part())


def plan_for(workdir: pathlib.Path, config: Config) -> tuple[list[Stage], Loader | None]:
  """Returns the stages of a run in `workdir`, which need not exist, and the training images, not yet read.

  With `dataset.name=none` there are no images, and their shape and classes come from the first model in the workdir. If that
  draws what a text says, there are no images either; see `open_captions`.

  Raises:
    UserError: the config or the images are not valid, or the run in `workdir` began with other images.
  """
  if config.dataset.name == datasets.NONE:
    return stored_plan(workdir, config), None
  if (captions := open_captions(workdir, config)) is not None:
    check_images(workdir, captions)
    return _plan_of_texts(workdir, config, captions), None
  loader = open_images(config, 'train')
  open_images(config, 'eval')  # raises its errors now, not after training
  check_images(workdir, loader.images)
  shape, classes = loader.images.image_shape, loader.images.classes
  origin = find_origin(workdir)
  _check_shape(workdir, config, shape, origin)
  return cut(workdir, plan(config, shape, len(classes), origin)), loader


def described_plan(workdir: pathlib.Path, config: Config) -> list[Stage]:
  """Returns the stages of a run like `plan_for`, but does not need the files of known datasets."""
  if config.dataset.name == datasets.NONE:
    return stored_plan(workdir, config)
  if (captions := open_captions(workdir, config)) is not None:
    return _plan_of_texts(workdir, config, captions)
  described = datasets.describe(datasets.Settings.of(config.dataset))
  return cut(workdir, plan(config, *described, find_origin(workdir)))


def _plan_of_texts(workdir: pathlib.Path, config: Config, captions: Captions) -> list[Stage]:
  """Returns the stages of a model of texts: of an imported one, or of one whose companions the run trains itself."""
  if not isinstance(captions, datasets.ImageSet):
    return stored_plan(workdir, config)
  beside = own_companions.find(workdir, config, captions)
  if beside is None:
    return stored_plan(workdir, config)
  return cut(workdir, plan(config, captions.image_shape, 0, companions=beside))


def _check_shape(
  workdir: pathlib.Path, config: Config, shape: tuple[int, ...], origin: Origin | None
) -> None:
  """Raises UserError if the images of a dataset have another shape than those that the imported model draws."""
  if origin is not None and origin.image_shape != shape:
    raise UserError(
      f'dataset {config.dataset.name!r} has images of shape {shape}, but the imported model in {workdir} draws '
      f'{origin.image_shape}; set dataset.image_size and dataset.channels, or dataset.name=none'
    )


def open_captions(workdir: pathlib.Path, config: Config) -> Captions | None:
  """Opens the texts that the model of a workdir is trained with; an `ImageSet` if they are captions of images.

  Returns None if neither the imported model, if there is one, nor the config's takes texts, or with `dataset.name=none`.

  Raises:
    UserError: the dataset has no texts, or there are texts and no model in the workdir that takes them.
  """
  origin, name = find_origin(workdir), config.dataset.name
  if own_companions.are_wanted(config):
    own_companions.check(workdir, config, origin is not None)
    return None if name == datasets.NONE else cast(Captions, _open_captioned_images(config, origin))
  takes_text = origin is not None and conditioning.takes_text(origin.denoise.conditioning)
  if name == datasets.PROMPTS and (origin is None or not takes_text):
    raise UserError(
      f'dataset.name=prompts: {workdir} holds no imported model that draws what a text says; begin with --mode=import '
      '--source=stable_diffusion'
    )
  if origin is None or not takes_text or name == datasets.NONE:
    return None
  if conditioning.classes(origin.denoise.conditioning):
    raise UserError(f'{workdir}: the imported model takes classes beside texts, which no dataset has')
  if name == datasets.PROMPTS:
    return prompts.read(datasets.Settings.of(config.dataset))
  images = _open_captioned_images(config, origin)
  _check_shape(workdir, config, images.image_shape, origin)
  return cast(Captions, images)


def _open_captioned_images(config: Config, origin: Origin | None) -> datasets.ImageSet:
  """Opens the training images, which have captions; raises UserError if they have none."""
  images = datasets.open_original(datasets.Settings.of(config.dataset), 'train')
  if images.caption(0) is None:
    whose = 'the model' if origin is None else 'the imported model'
    remedy = 'captions' if origin is None else 'prompts, or none'
    raise UserError(
      f'dataset.name={config.dataset.name}: {whose} draws what a text says, and this dataset has no captions; set '
      f'dataset.name={remedy}'
    )
  images.check(datasets.Settings.key('train'))
  return images


def with_originals(config: Config) -> Config:
  """Returns the config with which `open_images` opens the images of a run of texts, which are read from their source.

  In such a run, `dataset.prepared` names the directory of encoded images.
  """
  found = config.copy_and_resolve_references().unlock()
  found.dataset.prepared = ''
  return found.lock()


def compared_images(config: Config, images: Loader | None) -> tuple[Config, Loader | None]:
  """Returns the images that samples are compared with, and the config with which the held-out ones are opened.

  Args:
    config: the config of the run.
    images: the training images of `plan_for`; None for a run of texts, whose images stand beside their captions.

  Returns:
    The config, and the training images, not yet read; None for a dataset without images.

  Raises:
    UserError: the images or the held-out images cannot be opened.
  """
  if images is not None or not datasets.has_images(config.dataset.name):
    return config, images
  originals = with_originals(config)
  open_images(originals, 'eval')  # raises its errors now, not after training
  return originals, open_images(originals, 'train')


def find_origin(workdir: pathlib.Path) -> Origin | None:
  """Returns the base of a workdir if it was imported from a model's folder, else None."""
  path = workdir / 'base' / 'stage.json'
  if not path.is_file() or not (read_json(path).get('imported') or {}).get('folder'):
    return None
  return origin_of(model.read(workdir / 'base' / 'model', weights=False))


def origin_of(stored: model.StoredModel) -> Origin:
  """Describes a stored model as the first stage of a plan."""
  return Origin(
    denoise=stored.denoise,
    schedule=stored.schedule,
    space=stored.space,
    image_shape=stored.image_shape,
    num_steps=stored.num_steps,
    sampler=stored.sampler,
    times=stored.times,
    clip_x=stored.clip_x,
    cond_dropout=stored.cond_dropout,
    text=stored.text,
  )


def check_images(workdir: pathlib.Path, images: datasets.ImageSet | Captions) -> None:
  """Raises UserError if there is a run in `workdir` that began with other images or texts."""
  path = workdir / 'dataset.json'
  if not path.is_file():
    return
  found = read_json(path)
  if not isinstance(found.get('classes'), list):
    raise DamagedError(f'{path} is damaged (no classes in it); restore it from a copy')
  if found.get('identity') != images.identity:
    now, of = len(images), len(getattr(images, 'classes', ()))
    raise UserError(
      f'{path}: this run began with other images: {found.get("num_images")} of {len(found["classes"])} '
      f'classes, now {now} of {of}; restore them, or use another workdir'
      if found.get('image_shape')
      else f'{path}: this run began with other prompts: {found.get("num_images")}, now {now}; restore them, or use another '
      'workdir'
    )


def claim_images(workdir: pathlib.Path, images: datasets.ImageSet | Captions) -> None:
  """Writes `dataset.json`, which includes the class names by label; raises UserError as `check_images` does."""
  check_images(workdir, images)
  path = workdir / 'dataset.json'
  kept = {k: v for k, v in (read_json(path) if path.is_file() else {}).items() if k == 'label_counts'}
  described = {key: getattr(images, key, ()) for key in ('name', 'image_shape', 'classes', 'identity')}
  write_json(path, described | {'num_images': len(images)} | kept)


def class_names(workdir: pathlib.Path) -> list[str]:
  """Returns the class names by label, from the run's dataset or else from an imported model."""
  path = workdir / 'dataset.json'
  if path.is_file():
    return [str(name) for name in read_json(path).get('classes', [])]
  folder = workdir / 'base' / 'model'
  return (
    list(model.read(folder, weights=False).class_names) if (folder / model.DESCRIPTION).is_file() else []
  )


def label_counts(workdir: pathlib.Path) -> tuple[int, ...]:
  """Returns the training images per class, from the run's dataset or else from an imported model; () if unknown."""
  path = workdir / 'dataset.json'
  if path.is_file():
    counts = read_json(path).get('label_counts', [])
    if not isinstance(counts, list) or not all(isinstance(n, int) and n >= 0 for n in counts):
      raise DamagedError(f'{path} is damaged (label_counts={counts}); restore it from a copy')
    return tuple(counts)
  folder = workdir / 'base' / 'model'
  return model.read(folder, weights=False).label_counts if (folder / model.DESCRIPTION).is_file() else ()


def count_labels(workdir: pathlib.Path, images: datasets.ImageSet) -> tuple[int, ...]:
  """Returns the training images per class; the counts are cached in `dataset.json`, if that exists."""
  path = workdir / 'dataset.json'
  counts = label_counts(workdir) if path.is_file() else ()
  if not cluster.agree(bool(counts)):
    counts = tuple(loading.count_labels(images))
    if path.is_file():
      write_json(path, read_json(path) | {'label_counts': counts})
    cluster.barrier()  # no process reads the file before the first has written it
  return counts


def stored_plan(workdir: pathlib.Path, config: Config) -> list[Stage]:
  """Returns the stages of `config` without access to its dataset, which sampling from a workdir does not need."""
  path = next(iter(sorted(workdir.glob('*/stage.json'))), None)
  if path is None:
    raise UserError(f'--workdir={workdir} holds no stage yet: there is no stage.json in it')
  found = read_json(path)
  try:
    image_shape = tuple(found['image_shape'])
    num_classes = int(found['network'].get('num_classes', 0))
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise DamagedError(f'{path} is damaged ({error!r}); restore it from a copy') from error
  beside = own_companions.find(workdir, config, None)
  return cut(workdir, plan(config, image_shape, num_classes, find_origin(workdir), beside))


def cut(workdir: pathlib.Path, stages: list[Stage]) -> list[Stage]:
  """Cuts off the stages before the imported model, if the workdir has one; extends stages as their stage.json records."""
  stages = [extending.as_recorded(workdir, stage) for stage in stages]
  for k, stage in reversed(list(enumerate(stages))):
    path = workdir / stage.name / 'stage.json'
    if path.is_file() and read_json(path).get('imported'):
      found = [stage.without_parents(), *stages[k + 1 :]]
      names = {stage.name for stage in found}
      for student in found[1:]:
        for needed in (student.parent, student.start):
          if needed is not None and needed not in names:
            raise UserError(
              f'stage {student.name} comes from stage {needed}, but {workdir} begins with {stage.name}, which was '
              "imported; remove the student's method from config.methods, or import the student's teacher"
            )
      return found
  return stages
