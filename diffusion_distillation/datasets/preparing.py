"""Writes a decoded, resized copy of a dataset (see `prepared.py`), so that a large dataset is decoded only once."""

import contextlib
import dataclasses
import itertools
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_distillation.datasets import open_original, prepared
from diffusion_distillation.datasets.image_set import ImageSet
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.datasets.settings import ROLES, Settings
from diffusion_distillation.errors import UserError
from diffusion_distillation.system import files, interrupts
from diffusion_distillation.system.progress import Progress

SHARD_BYTES = 2**28
_BATCH = 256


def prepare(settings: Settings, workers: int, shard_bytes: int = SHARD_BYTES) -> dict[str, int]:
  """Copies both splits to `settings.prepared`; keeps files that already exist.

  Files are written atomically; after an interruption, only the missing files are written.

  Args:
    settings: the dataset to copy, and the directory of the copy.
    workers: number of processes that decode images.
    shard_bytes: approximate size of a file; an interruption can lose the progress on one file.

  Returns:
    The number of broken images in each split.

  Raises:
    UserError: the directory contains other files, or its disk is too small, or the dataset cannot be read.
    Preempted: a signal was received; running the same command again continues.
  """
  if not settings.prepared:
    raise UserError('--mode=prepare needs dataset.prepared, the directory to write to')
  directory = prepared.directory_of(settings)
  names = {path.name for path in directory.iterdir()} - {files.LOCK} if directory.is_dir() else set()
  if names and prepared.INFO not in names:
    raise UserError(
      f'dataset.prepared={settings.prepared} is not empty, and holds no copy; name another directory'
    )
  with files.lock(directory, 'dataset.prepared'):
    return _prepare(settings, directory, workers, shard_bytes)


def _prepare(
  settings: Settings, directory: pathlib.Path, workers: int, shard_bytes: int
) -> dict[str, int]:
  sets = {role: open_original(settings, role) for role in ROLES}
  shape = sets['train'].image_shape
  info: dict[str, Any] = {
    'dataset': prepared.fields(settings),
    'name': sets['train'].name,
    'image_shape': shape,
    'classes': sets['train'].classes,
    'finished': False,
    'left_out': dataclasses.asdict(sets['train'].beside()),
    'splits': {
      role: {
        'identity': images.identity,
        'num_images': len(images),
        'images_per_file': max(1, shard_bytes // math.prod(shape)),
        'bytes': {},
        'broken': {},
        'captions': images.caption(0) is not None,
      }
      for role, images in sets.items()
    },
  }
  _go_on(directory, settings, info)
  for role, images in sets.items():
    if (captions := images.all_captions()) is not None:
      files.write_json(directory / prepared.captions_file(role), {'captions': captions})
  if not all(
    prepared.is_whole(path, info['splits'][role])
    for role in ROLES
    for path in prepared.shard_paths(directory, role, prepared.shard_count(info['splits'][role]))
  ):
    _write(directory, sets, info, workers)
  files.write_json(directory / prepared.INFO, info | {'finished': True})
  return {role: len(info['splits'][role]['broken']) for role in ROLES}


def _write(
  directory: pathlib.Path, sets: Mapping[str, ImageSet], info: dict[str, Any], workers: int
) -> None:
  """Writes the missing files of both splits."""
  for role, images in sets.items():
    images.check(Settings.key(role))
  files.write_json(directory / prepared.INFO, info)
  for role, images in sets.items():
    with contextlib.closing(Loader(images, workers=workers)) as loader:
      _write_split(loader, directory, role, info)


def _go_on(directory: pathlib.Path, settings: Settings, info: dict[str, Any]) -> None:
  """Copies the sizes and broken images of existing files to `info`; raises UserError if they were made from other images."""
  found = prepared.read_info(directory)
  if found is None:
    size = math.prod(info['image_shape']) + 4
    needed = size * sum(split['num_images'] for split in info['splits'].values())
    free = shutil.disk_usage(directory).free
    if needed > free:
      raise UserError(f'{directory} needs {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free')
    return
  prepared.check_fields(directory, found, settings)
  for role in ROLES:
    begun, split = found['splits'][role], info['splits'][role]
    differing = [
      f'{key} was {begun[key]}, is {split[key]}'
      for key in ('num_images', 'images_per_file', 'identity')
      if begun[key] != split[key]
    ]
    if differing:
      raise UserError(
        f'{directory} was begun with other images ({role}: {", ".join(differing)}); remove it, or name another directory'
      )
    split |= {'bytes': begun['bytes'], 'broken': begun.get('broken', {})}


def _write_split(loader: Loader, directory: pathlib.Path, role: str, info: dict[str, Any]) -> None:
  """Writes the missing files of a split; records sizes and broken images in `info` and `info.json`."""
  split, size = info['splits'][role], len(loader)
  per_shard = split['images_per_file']
  paths = prepared.shard_paths(directory, role, prepared.shard_count(split))
  ranges = {
    path: range(k * per_shard, min((k + 1) * per_shard, size))
    for k, path in enumerate(paths)
    if not prepared.is_whole(path, split)
  }
  indices = [k for indices in ranges.values() for k in indices]
  with Progress(f'preparing {role}', size, size - len(indices)) as progress:
    records = _records(loader, indices)
    for path, inside in ranges.items():
      temporary = write_shard(path, itertools.islice(records, len(inside)), progress)
      split['bytes'][path.name] = temporary.stat().st_size
      split['broken'] |= {str(k): reason for k, reason in loader.skipped.items() if k in inside}
      files.write_json(directory / prepared.INFO, info)
      os.replace(temporary, path)


def _records(loader: Loader, indices: Sequence[int]) -> Iterator[bytes]:
  """Yields the records of the images at `indices`, in order."""
  if not indices:
    return
  with contextlib.closing(loader.in_order(_BATCH, indices)) as batches:
    for start, batch in zip(range(0, len(indices), _BATCH), batches, strict=True):
      interrupts.check()
      labels = np.zeros(_BATCH, int) if batch['cond'] is None else batch['cond']['label']
      for k, image, label, whole in zip(
        indices[start : start + _BATCH], batch['image'], labels, batch['mask'], strict=False
      ):
        yield prepared.pack(image, label) if whole else prepared.pack_broken(loader.skipped[k])


def write_shard(path: pathlib.Path, records: Iterator[bytes], progress: Progress) -> pathlib.Path:
  """Writes records to a temporary file next to `path`, and returns its path."""
  from array_record.python import array_record_module

  temporary = path.with_suffix('.tmp')
  writer = array_record_module.ArrayRecordWriter(str(temporary), 'group_size:1,uncompressed')
  with contextlib.ExitStack() as stack:
    stack.callback(_written, path, writer.close)
    for record in records:
      _written(path, writer.write, record)
      progress.advance()
  return temporary


def _written(path: pathlib.Path, write: Callable, *args: bytes) -> None:
  try:
    write(*args)
  except RuntimeError as error:
    raise UserError(
      f'{path} cannot be written: {str(error).splitlines()[0]}; free up space, and run the same command to continue'
    ) from error
