"""Small sets of pictures of every kind that can be read, written here, with what must come out of them."""

import contextlib
import dataclasses
import io
import os
import pathlib
import subprocess
import sys
import textwrap
import time
import types
import zipfile

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image

from diffusion_distillation import datasets
from diffusion_distillation.datasets.image_set import BrokenImage, ImageSet

SIZE = 8


def settings(name, **given):
  """Settings for images of SIZE pixels, all else left to the set."""
  empty = dict.fromkeys(('path', 'prepared', 'split', 'eval_split'), '')
  values = empty | {'image_size': SIZE, 'channels': None, 'resize': 'area'} | given
  return datasets.Settings(name=name, **{key: _text(value) for key, value in values.items()})


def _text(value):
  return value if isinstance(value, int | str | None) else str(value)


def pixels(k, shape=(SIZE, SIZE, 3)):
  """Those of picture k: noise, so that no two are equal."""
  return np.random.default_rng(k).integers(0, 256, shape, np.uint8)


def encoded(image, kind='png'):
  """The bytes of its file."""
  file = io.BytesIO()
  Image.fromarray(image.squeeze()).save(file, kind)
  return file.getvalue()


def png(k, shape=(SIZE, SIZE, 3)):
  """The file of picture k."""
  return encoded(pixels(k, shape))


def write_folder(root, count, broken=(), classes=('blue', 'green', 'red')):
  """`count` pictures by class: PNG of the size, PNG and JPEG that are larger, and broken ones."""
  for k in range(count):
    directory = root / classes[k % len(classes)]
    directory.mkdir(parents=True, exist_ok=True)
    if k in broken:
      (directory / f'{k}.png').write_bytes(png(k)[:-30])
    elif k % 4 == 3:
      (directory / f'{k}.jpg').write_bytes(encoded(pixels(k, (SIZE + 5, 2 * SIZE, 3)), 'jpeg'))
    else:
      larger = k % 4
      (directory / f'{k}.png').write_bytes(png(k, (SIZE + larger, SIZE + 2 * larger, 3)))
  return root


def write_zip(path, folder):
  """A zip of a folder."""
  with zipfile.ZipFile(path, 'w') as archive:
    for file in sorted(folder.rglob('*.*')):
      archive.write(file, file.relative_to(folder))
  return path


def flat(batch):
  """The arrays of a loader's batch of labelled images."""
  assert batch.keys() == {'image', 'cond', 'mask'} and batch['cond'].keys() == {'label'}
  return {'image': batch['image'], **batch['cond'], 'mask': batch['mask']}


FEATURES = {
  'image': tfds.features.Image(shape=(None, None, 3)),
  'label': tfds.features.ClassLabel(names=['blue', 'green', 'red']),
}


def example(k):
  """An example of FEATURES."""
  return {'image': io.BytesIO(png(k)), 'label': k % 3}


def builder(data_dir, splits, features=None, name='TinyPictures', version='1.0.0', config=None):
  """A builder of a set of tensorflow-datasets; `splits` are lists of examples by name."""

  def info(self):
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features or FEATURES))

  members = {
    'VERSION': tfds.core.Version(version),
    'BUILDER_CONFIGS': [tfds.core.BuilderConfig(name=config)] if config else [],
    '_info': info,
    '_split_generators': lambda self, _: {
      split: self._generate_examples(examples) for split, examples in splits.items()
    },
    '_generate_examples': lambda self, examples: enumerate(examples),
    '__module__': __name__,
  }
  bases = (tfds.core.GeneratorBasedBuilder,)
  with tfds.core.registered.skip_registration():
    made = types.new_class(name, bases, {}, lambda namespace: namespace.update(members))
  return made(data_dir=data_dir, file_format='array_record', config=config)


def prepare(data_dir, splits, **given):
  """Prepares such a set, and returns the directory of its version."""
  made = builder(data_dir, splits, **given)
  made.download_and_prepare()
  return made.data_path


def prepare_one(data_dir, features):
  """Prepares a set of one example with these features, of which each is made of its name's length."""

  def value(key, feature):
    if isinstance(feature, tfds.features.ClassLabel):
      return len(key) % feature.num_classes
    if isinstance(feature, tfds.features.Image):
      return io.BytesIO(png(len(key), (SIZE + 1, SIZE, feature.shape[-1] or 3)))
    return key

  made = {key: value(key, feature) for key, feature in features.items()}
  return prepare(data_dir, {'train': [made]}, features=features)


def sources(root, count, broken=()):
  """Settings of a small set of every kind; `broken` are pictures of the folder, and of the zip made of it."""
  folder = write_folder(root / 'folder', count, broken)
  archive = write_zip(root / 'pictures.zip', folder)
  prepare(root / 'tfds', {'train': [example(k) for k in range(count)]})
  whole = {'split': 'train', 'eval_split': 'train[:2]'}
  part = {'split': f'train[:{count}]', 'eval_split': 'test[:2]'}
  return {
    'digits': settings('digits', **part),
    'shapes': settings('shapes', **part),
    'folder': settings('folder', path=folder, **whole),
    'zip': settings('folder', path=archive, **whole),
    'tfds': settings('tiny_pictures', path=root / 'tfds', **whole),
  }


@dataclasses.dataclass(frozen=True, eq=False)
class Numbers(ImageSet):
  """Image k is one pixel, k; its label says whether the process that reads it has imported jax.

  Attributes:
    size: how many there are.
    broken: those that cannot be read.
    reads: which were read, in this process.
    stuck: a directory; reading an image from the fifth on leaves a file there, and takes forever.
  """

  size: int
  broken: frozenset = frozenset()
  reads: list = dataclasses.field(default_factory=list)
  stuck: str = ''

  def __len__(self):
    return self.size

  def read(self, k):
    self.reads.append(k)
    if self.stuck and k > 3:
      pathlib.Path(self.stuck, str(k)).touch()
      time.sleep(3600)
    if k in self.broken:
      raise BrokenImage(f'number {k} is odd')
    return np.full(self.image_shape, k % 256, np.uint8), int('jax' in sys.modules)


class Unreadable(Numbers):
  """Fails in its own way."""

  def batch(self, indices):
    raise OSError('the disk is gone')


class TwoPartError(Exception):
  """An error that is pickled, but cannot be read again: it needs two arguments, and keeps one."""

  def __init__(self, path, reason):
    super().__init__(f'{path}: {reason}')


class Peculiar(Numbers):
  """Fails in a way that does not arrive as it is."""

  def batch(self, indices):
    raise TwoPartError('x.png', 'the disk is gone')


def numbers(size, broken=(), classes=('without', 'with'), **given):
  """A set of numbers."""
  return Numbers('numbers', (1, 1, 1), classes, 'numbers', size, frozenset(broken), **given)


def examples(images):
  """Every image with its label, or why it is broken."""
  found = []
  for k in range(len(images)):
    try:
      image, label = images.read(k)
      found.append((image.tobytes(), image.shape, image.dtype, label))
    except BrokenImage as error:
      found.append(str(error))
  return found


def by_pixels(ks):
  """Labels of `example`s by their pixels: tensorflow-datasets shuffles them."""
  return {pixels(k).tobytes(): k % 3 for k in ks}


def found(images):
  """The same of a set, as read."""
  read = dict((image.tobytes(), label) for image, label in map(images.read, range(len(images))))
  assert len(read) == len(images)
  return read


def workers():
  """The processes of this one that read images."""
  found = set()
  for path in pathlib.Path('/proc').glob('[0-9]*'):
    with contextlib.suppress(OSError):
      command, parent = (
        (path / 'cmdline').read_text(),
        (path / 'stat').read_text().rpartition(')')[2].split()[1],
      )
      if 'diffusion_distillation.datasets.reader' in command and int(parent) == os.getpid():
        found.add(int(path.name))
  return found


def run_script(path, body, *args):
  """Runs `body` as the main process; returns when its workers have ended too, for they hold the pipes."""
  imports = 'import os, pathlib, signal, sys, time'
  ours = 'from diffusion_distillation.datasets.loading import Loader; from tests import tiny_pictures'
  path.write_text(f"{imports}\n{ours}\nif __name__ == '__main__':\n{textwrap.indent(body, '  ')}")
  environment = os.environ | {'PYTHONPATH': str(pathlib.Path(__file__).parent.parent)}
  command = [sys.executable, path, *args]
  return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
