"""The workdir: its config, its images, and the plan of its stages.

workdir/config.json   what made it; the workdir alone is enough to sample from it
workdir/dataset.json  the images it was made from, and the names of their classes; for conditional models their sizes, too
"""

import io
import json
import pathlib
from collections.abc import Mapping
from typing import IO, Any

from diffusion_distillation import datasets
from diffusion_distillation.config import Config, check_known, flatten
from diffusion_distillation.datasets import loading
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.diffusion.weightings import AS_BASE
from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.methods import METHODS, Student
from diffusion_distillation.stages import model
from diffusion_distillation.stages.plan import PER_ROUND, Origin, of_round, plan, rounds
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system import cluster, files, sharding
from diffusion_distillation.system.files import read_json, write_json

# Prefixes of the keys that may change between two runs in one workdir: they touch no parameter of any stage.
FREE = (
  *('evaluation.', 'log.', 'checkpoint.', 'consistency.sample_steps'),
  *('dataset.path', 'dataset.prepared', 'dataset.in_memory_gb', 'dataset.workers'),
  *('methods', 'pairs.', 'student.', 'distill.end_steps', 'max_skipped'),
  *('mesh.', 'compute.'),
)


def _is_free(key: str, stage: str) -> bool:
  """Whether a key may differ from the one that `stage` was made with; '': from that of the workdir.

  Keys in FREE may differ, and so may the sections of other stages, which are compared with their own stage.json.
  """
  if key == 'distill.start_steps':  # the base is sampled in as many
    return False
  of_students = {name for name, cls in METHODS.items() if issubclass(cls, Student)} | {'distill'}
  others = of_students - {'distill' if _is_round(stage) else stage}
  return key.startswith(FREE) or key.partition('.')[0] in others


def _is_round(stage: str) -> bool:
  return stage.startswith('progressive_')


def _of_this_version(values: Mapping[str, Any]) -> dict[str, Any]:
  """A stored config in the keys of this version; `consistency.target` was `ema`, the first average, or `last`."""
  section = values.get('consistency')
  if not isinstance(section, Mapping) or 'target' not in section:
    return dict(values)
  kept = {key: value for key, value in section.items() if key != 'target'}
  averages = kept.get('ema_decay') or (0.0,)
  decay = averages[0] if section['target'] == 'ema' else 0.0
  return {**values, 'consistency': {**kept, 'target_decay': decay}}


def _implied(values: Mapping[str, Any]) -> dict[str, Any]:
  """The keys that a flat config of an older version lacks, as it trained without them; only those that make a difference."""
  found: dict[str, Any] = {'distill.weighting': AS_BASE}
  if 'evaluation.clip_x' in values:
    found['pairs.clip_x'] = values['evaluation.clip_x']
  for name in ('dmd', 'dmd2'):
    found |= {f'{name}.fake_law': AS_BASE, f'{name}.fake_weighting': AS_BASE}
    found |= {f'{name}.gan_head': 'pooled', f'{name}.joint_clip': False}
    if values.get(f'{name}.gan_fake'):
      between = {f'{name}.gan_{key}': f'{name}.{key}' for key in ('first_t', 'last_t')}
      found |= {key: values[of_scores] for key, of_scores in between.items() if of_scores in values}
    if values.get(f'{name}.num_steps', 1) > 1 and 'pairs.clip_x' in found:
      found[f'{name}.clip_x'] = found['pairs.clip_x']
  return {key: value for key, value in found.items() if key not in values}


# Keys that may be 'base', each with the key of base training that this stands for.
_FOLLOWS = {'distill.weighting': 'weighting'} | {
  f'{name}.{key}': of_base
  for name in ('dmd', 'dmd2')
  for key, of_base in (('fake_law', 'time.law'), ('fake_weighting', 'weighting'))
}


def _as_made(stage: str, values: dict[str, Any]) -> dict[str, Any]:
  """Returns a flat config as it is compared with others.

  'base' is replaced by what it stands for; for a round of progressive distillation, each tuple of PER_ROUND is replaced
  by the round's entry.
  """
  follows = {key: of_base for key, of_base in _FOLLOWS.items() if values.get(key) == AS_BASE}
  values = values | {key: values[of_base] for key, of_base in follows.items() if of_base in values}
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
  """A key's value in an error message: 'base' with what it stands for."""
  return f'{AS_BASE} ({made})' if key in _FOLLOWS and values.get(key) == AS_BASE else made


def lock_workdir(workdir: pathlib.Path) -> IO[str]:
  """Makes `workdir` if need be; returns the lock, to be closed, that keeps other runs out; see `files.lock`.

  Of several processes the first takes it for all.

  Raises:
    UserError: it cannot be had, or is not the same directory for all processes.
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
    raise UserError(f'--workdir={workdir} must be one directory that all processes see, such as on NFS')
  return held


def check_config(
  path: pathlib.Path, made_with: Mapping[str, Any], config: Config, stage: str = ''
) -> None:
  """Raises UserError, with the differing keys, if what `path` belongs to was made with another config.

  Keys that `_is_free` names may differ; keys that an older version did not have are not compared.
  """
  if not isinstance(made_with, Mapping):
    raise DamagedError(f'{path} is damaged (no config in it); restore it from a copy')
  stored = dict(flatten(_of_this_version(made_with)))
  given = dict(flatten(json.loads(config.to_json())))
  stored |= _implied(stored)
  old, new = _as_made(stage, stored), _as_made(stage, given)
  differing = [
    f'{key} was {_shown(key, stored, value)}, is {_shown(key, given, new.get(key, "absent"))}'
    for key, value in sorted(old.items())
    if not _is_free(key, stage) and value != new.get(key, 'absent')
  ]
  if differing:
    remedy = f'remove {path.parent} to train this stage again' if stage else 'use another workdir'
    if any(key.startswith(f'distill.{name} ') for key in differing for name in PER_ROUND):
      remedy += '; the last entry of a tuple is that of the last round, so that a further round needs an entry of its own'
    raise UserError(
      f'{path}: made with another config: {"; ".join(differing)}. Use that config, or {remedy}'
    )


def claim(workdir: pathlib.Path, config: Config) -> None:
  """Writes `config.json`, or checks the one that is there; raises UserError as `check_config` does."""
  check_made_with(workdir, config)
  write_json(workdir / 'config.json', json.loads(config.to_json()))


def check_made_with(workdir: pathlib.Path, config: Config) -> None:
  """Raises UserError, as `check_config` does, if there is a run in `workdir` that another config made."""
  path = workdir / 'config.json'
  if path.exists():
    check_config(path, read_json(path), config)


def read_config(workdir: pathlib.Path, default: Config) -> Config:
  """The config that `workdir` was made with; keys that are newer than it are as it trained without them.

  Raises:
    UserError: there is no run, or its config has keys that this version does not know.
    DamagedError: its config cannot be read.
  """
  path = workdir / 'config.json'
  if not path.is_file():
    raise UserError(f'--workdir={workdir} holds no run: there is no {path}')
  stored = Config(_tuples(_of_this_version(read_json(path))))
  known = [key for key, _ in flatten(default)]
  try:
    check_known([key for key, _ in flatten(stored)], known)
  except UserError as error:
    raise UserError(f'{path}: {error}') from error
  config = default.copy_and_resolve_references().unlock()
  config.update(stored)
  config.update_from_flattened_dict(_implied(dict(flatten(stored))))
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


def plan_for(workdir: pathlib.Path, config: Config) -> tuple[list[Stage], Loader | None]:
  """The stages of a run in `workdir` (which need not be there), and the training images, not yet read.

  With `dataset.name=none` there are no images: the workdir's first model says what they would be.

  Raises:
    UserError: config or images do not fit, or those that the run began with were others.
  """
  if config.dataset.name == datasets.NONE:
    return stored_plan(workdir, config), None
  loader = open_images(config, 'train')
  open_images(config, 'eval')  # to find its errors now, not after training
  check_images(workdir, loader.images)
  shape, classes = loader.images.image_shape, loader.images.classes
  origin = find_origin(workdir)
  if origin is not None and origin.image_shape != shape:
    raise UserError(
      f'dataset {config.dataset.name!r} has images of shape {shape}, but the imported model in {workdir} draws '
      f'{origin.image_shape}; set dataset.image_size and dataset.channels, or dataset.name=none'
    )
  return cut(workdir, plan(config, shape, len(classes), origin)), loader


def described_plan(workdir: pathlib.Path, config: Config) -> list[Stage]:
  """The stages of a run as `plan_for` has them; known datasets need not be at hand."""
  if config.dataset.name == datasets.NONE:
    return stored_plan(workdir, config)
  described = datasets.describe(datasets.Settings.of(config.dataset))
  return cut(workdir, plan(config, *described, find_origin(workdir)))


def find_origin(workdir: pathlib.Path) -> Origin | None:
  """The base of a workdir, where it was imported as a model's folder; else None."""
  path = workdir / 'base' / 'stage.json'
  if not path.is_file() or not (read_json(path).get('imported') or {}).get('folder'):
    return None
  return origin_of(model.read(workdir / 'base' / 'model', weights=False))


def origin_of(stored: model.StoredModel) -> Origin:
  """A stored model as the first stage of a plan."""
  return Origin(
    denoise=stored.denoise,
    schedule=stored.schedule,
    space=stored.space,
    image_shape=stored.image_shape,
    num_steps=stored.num_steps,
    sampler=stored.sampler,
  )


def check_images(workdir: pathlib.Path, images: datasets.ImageSet) -> None:
  """Raises UserError unless the run in `workdir`, if there is one, began with these images."""
  path = workdir / 'dataset.json'
  if not path.is_file():
    return
  found = read_json(path)
  if not isinstance(found.get('classes'), list):
    raise DamagedError(f'{path} is damaged (no classes in it); restore it from a copy')
  if found.get('identity') != images.identity:
    raise UserError(
      f'{path}: this run began with other images: {found.get("num_images")} of {len(found["classes"])} '
      f'classes, now {len(images)} of {len(images.classes)}; restore them, or use another workdir'
    )


def claim_images(workdir: pathlib.Path, images: datasets.ImageSet) -> None:
  """Writes `dataset.json`, the names of the classes by label among it; raises UserError as `check_images` does."""
  check_images(workdir, images)
  path = workdir / 'dataset.json'
  kept = {k: v for k, v in (read_json(path) if path.is_file() else {}).items() if k == 'label_counts'}
  described = {key: getattr(images, key) for key in ('name', 'image_shape', 'classes', 'identity')}
  write_json(path, described | {'num_images': len(images)} | kept)


def class_names(workdir: pathlib.Path) -> list[str]:
  """Names of the classes by label, as the run found them, or as an imported model has them."""
  path = workdir / 'dataset.json'
  if path.is_file():
    return [str(name) for name in read_json(path).get('classes', [])]
  folder = workdir / 'base' / 'model'
  return list(model.read(folder, weights=False).class_names) if folder.is_dir() else []


def label_counts(workdir: pathlib.Path) -> tuple[int, ...]:
  """Training images of each class, as the run counted them, or as an imported model has them; () if that is not known."""
  path = workdir / 'dataset.json'
  if path.is_file():
    counts = read_json(path).get('label_counts', [])
    if not isinstance(counts, list) or not all(isinstance(n, int) and n >= 0 for n in counts):
      raise DamagedError(f'{path} is damaged (label_counts={counts}); restore it from a copy')
    return tuple(counts)
  folder = workdir / 'base' / 'model'
  return model.read(folder, weights=False).label_counts if folder.is_dir() else ()


def count_labels(workdir: pathlib.Path, images: datasets.ImageSet) -> tuple[int, ...]:
  """Training images of each class, counted once and then kept in `dataset.json`, if that is there."""
  path = workdir / 'dataset.json'
  counts = label_counts(workdir) if path.is_file() else ()
  if not cluster.agree(bool(counts)):
    counts = tuple(loading.count_labels(images))
    if path.is_file():
      write_json(path, read_json(path) | {'label_counts': counts})
    cluster.barrier()  # nobody looks for them before the first process has written them
  return counts


def stored_plan(workdir: pathlib.Path, config: Config) -> list[Stage]:
  """The stages of `config` without its data, which need not be at hand to sample from a workdir."""
  path = next(iter(sorted(workdir.glob('*/stage.json'))), None)
  if path is None:
    raise UserError(f'--workdir={workdir} holds no stage yet: there is no stage.json in it')
  found = read_json(path)
  try:
    image_shape = tuple(found['image_shape'])
    num_classes = int(found['network'].get('num_classes', 0))
  except (AttributeError, KeyError, TypeError, ValueError) as error:
    raise DamagedError(f'{path} is damaged ({error!r}); restore it from a copy') from error
  return cut(workdir, plan(config, image_shape, num_classes, find_origin(workdir)))


def cut(workdir: pathlib.Path, stages: list[Stage]) -> list[Stage]:
  """The plan as it is for a workdir into which a model was imported: it begins there."""
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
              'imported; take it out of config.methods, or import its teacher'
            )
      return found
  return stages
