"""The summary of a dataset in a plan: images and classes per split, and the files that are left out."""

import concurrent.futures
import os
import time
from collections.abc import Iterator

import numpy as np

from diffusion_distillation.datasets import open_split, tfds
from diffusion_distillation.datasets.folder import Folder
from diffusion_distillation.datasets.image_set import BrokenImage, ImageSet
from diffusion_distillation.datasets.left_out import LeftOut, shown
from diffusion_distillation.datasets.prepared import Copy
from diffusion_distillation.datasets.settings import ROLES, Settings

SECONDS = 2.0  # maximum time to check the images of a split
_AT_ONCE = 64
_CAPTIONS = {'train': 'to train on', 'eval': 'held out'}


def lines(settings: Settings) -> Iterator[str]:
  """Yields lines for a plan: the number of images and classes of each split, and the files left out, by reason.

  Image files are decoded for at most SECONDS per split, which is enough to find every broken file of a small dataset.

  Raises:
    UserError: see `datasets.open_split`.
  """
  known = settings.name in tfds.KNOWN and not settings.prepared
  if known and tfds.find(settings.name, settings.path) is None:
    yield f'images of {settings.name}: not prepared on this machine'
    return
  sets = {role: open_split(settings, role) for role in ROLES}
  size = 'x'.join(map(str, sets['train'].image_shape))
  yield f'images of {sets["train"].name}, {size}'
  for role, images in sets.items():
    yield f'  {_CAPTIONS[role]:<18} {len(images):>8,} image{"s" * (len(images) != 1)} {_kinds(images)}'
    broken, looked = look(images, SECONDS)
    for line in broken.lines():
      yield f'  {"  of them":<18} {line}'
    if looked < len(images):
      yield f'  {"  checked":<18} {looked:,}; the others are checked when they are read'
  for line in sets['train'].beside().lines():
    yield f'  {"left out":<18} {line}'


def _kinds(images: ImageSet) -> str:
  return 'with captions' if images.caption(0) is not None else _classes(images)


def _classes(images: ImageSet) -> str:
  """Describes the classes: 'of 3 classes, 10 (cat) to 12 (dog) each', or 'without classes'."""
  labels, names = images.known_labels(), images.classes
  if not names:
    return 'without classes'
  total = f'{len(names)} class' + 'es' * (len(names) > 1)
  if labels is None:
    return f'of {total}'
  counts = np.bincount(labels, minlength=len(names))
  if missing := int((counts == 0).sum()):
    total = f'{len(names) - missing} of {total}'
  least, most = (int(k) for k in (counts.argmin(), counts.argmax()))
  if counts[least] == counts[most]:
    return f'of {total}, {counts[least]:,} each'
  spread = f'{counts[least]:,} ({shown(names[least])}) to {counts[most]:,} ({shown(names[most])})'
  return f'of {total}, {spread} each'


def look(images: ImageSet, seconds: float) -> tuple[LeftOut, int]:
  """Checks images in order; returns those that cannot be used, by reason, and the number of checked images."""
  found = LeftOut()
  if isinstance(images, Copy):
    for reason in images.broken.values():
      found.add(_kind(reason), reason)
    return found, len(images)
  if not isinstance(images, Folder | tfds.Examples):
    return found, len(images)  # images in memory or drawn here are never broken
  deadline, looked = time.monotonic() + seconds, 0
  with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
    while looked < len(images) and time.monotonic() < deadline:
      some = range(looked, min(looked + _AT_ONCE, len(images)))
      for reason in threads.map(lambda k: _problem(images, k), some):
        if reason:
          found.add(_kind(reason), reason)
      looked = some.stop
  return found, looked


def _problem(images: ImageSet, k: int) -> str:
  try:
    images.read(k)
  except BrokenImage as error:
    return str(error)
  return ''


def _kind(reason: str) -> str:
  marks = {
    'too small': ', smaller than dataset.image_size=',
    'too large': ', larger than ',
    'empty': ' is empty',
  }
  return next((kind for kind, mark in marks.items() if mark in reason), 'broken')
