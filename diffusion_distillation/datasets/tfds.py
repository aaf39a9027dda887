"""Datasets of tensorflow-datasets in ArrayRecord format; reading them does not need TensorFlow."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shlex
from typing import Any

from diffusion_distillation.config import nearest
from diffusion_distillation.datasets import decoding, splits
from diffusion_distillation.datasets.image_set import BrokenImage, Example, ImageSet, reading_error
from diffusion_distillation.datasets.settings import OURS, Settings
from diffusion_distillation.errors import DamagedError, UserError


@dataclasses.dataclass(frozen=True)
class Info:
  """What is known about a dataset before it is read.

  Attributes:
    channels: channels of the images.
    num_classes: number of classes; 0 without labels.
    splits: splits for training and for evaluation.
  """

  channels: int
  num_classes: int
  splits: tuple[str, str]


KNOWN = {
  'cifar10': Info(3, 10, ('train', 'test')),
  'celeb_a': Info(3, 0, ('train', 'test')),
  'imagenet2012': Info(3, 1000, ('train', 'validation')),
  'lsun/bedroom': Info(3, 0, ('train', 'validation')),
  'lsun/church_outdoor': Info(3, 0, ('train', 'validation')),
  'mnist': Info(1, 10, ('train', 'test')),
}


@dataclasses.dataclass(frozen=True, eq=False)
class Examples(ImageSet):
  """A split of a prepared dataset.

  Attributes:
    source: random-access reader of the examples, whose images are the bytes of a file.
    image_key, label_key: names of the features; `label_key` is '' without labels.
    decoder: decodes an image's bytes.
  """

  source: Any
  image_key: str
  label_key: str
  decoder: decoding.Decoder

  def __len__(self) -> int:
    return len(self.source)

  def read(self, k: int) -> Example:
    example = self._example(k)
    if not example[self.image_key]:
      raise DamagedError(f'dataset {self.name!r}, example {k} is empty; prepare the dataset again')
    try:
      return self.decoder(example[self.image_key]), int(example[self.label_key]) if self.label_key else 0
    except BrokenImage as error:
      raise BrokenImage(f'example {k} {error}') from error

  def label(self, k: int) -> int:
    return int(self._example(k)[self.label_key]) if self.label_key else 0

  def _example(self, k: int) -> Any:
    try:
      return self.source[k]
    except RuntimeError as error:  # from array_record, for a damaged file
      raise reading_error(
        f'dataset {self.name!r}, example {k},', error, 'prepare the dataset again'
      ) from error


def data_dir(path: str) -> pathlib.Path:
  """Returns the directory of prepared datasets: `path`, or tensorflow-datasets' default; raises UserError for a URL."""
  if '://' in path:
    raise UserError(
      f'dataset.path={path}: ArrayRecord files can only be read from disk; copy the dataset, or mount the bucket'
    )
  chosen = path or os.environ.get('TFDS_DATA_DIR') or '~/tensorflow_datasets'
  return pathlib.Path(os.path.abspath(os.path.expanduser(chosen)))


def find(name: str, path: str) -> pathlib.Path | None:
  """Finds the newest version of a dataset on disk, in any format; returns None if there is none.

  `name` may include a config or a version: 'lsun/bedroom' or 'cifar10/3.0.2'.
  """
  root = data_dir(path) / name
  if (root / 'dataset_info.json').is_file():
    return root
  versions = [
    p.parent for p in root.glob('*/dataset_info.json') if re.fullmatch(r'[\d.]+', p.parent.name)
  ]
  return max(versions, key=lambda p: [int(n) for n in p.name.split('.') if n], default=None)


def _check_name(name: str) -> None:
  """Raises UserError, suggesting the nearest name, unless tensorflow-datasets has a dataset of this name."""
  import tensorflow_datasets as tfds

  known = tfds.list_builders(with_community_datasets=False)
  if name.split('/')[0] not in known:
    raise UserError(
      f'dataset.name={name!r} is not known: use {", ".join(OURS)}, or a dataset of tensorflow-datasets'
      f'{nearest(name.lower(), [*OURS, *KNOWN, *known])}'
    )


def _prepare(name: str, path: str) -> pathlib.Path:
  """Downloads and prepares a dataset as ArrayRecord; without TensorFlow, raises a UserError with the command to do this."""
  where = data_dir(path)
  program = shlex.quote(
    'import tensorflow_datasets as tfds; '
    f'tfds.builder("{name}", data_dir="{where}", file_format="array_record").download_and_prepare()'
  )
  if importlib.util.find_spec('tensorflow') is None:
    _check_name(name)
    raise UserError(
      f'dataset {name!r} is not prepared: there is no {where / name}/VERSION/dataset_info.json. On a machine with '
      f"network access and TensorFlow (pip install -e '.[tf]'), run: python -c {program}"
    )
  _check_name(name)
  import tensorflow_datasets as tfds

  try:
    builder = tfds.builder(name, data_dir=where, file_format='array_record')
    builder.download_and_prepare()
  except Exception as error:  # no network, no disk, a manual download that is missing, ...
    first = next(iter(str(error).strip().splitlines()), repr(error))
    raise UserError(f'dataset {name!r} cannot be prepared in {where}: {first}') from error
  return pathlib.Path(builder.data_path)


def builder_of(name: str, path: str) -> Any:
  """Returns the builder of a prepared dataset; prepares it if necessary and TensorFlow is installed.

  Raises:
    UserError: the dataset is not prepared, or has a format that cannot be read by index; the message contains the command
      that prepares or converts it.
  """
  directory = find(name, path) or _prepare(name, path)
  try:
    form = json.loads((directory / 'dataset_info.json').read_text()).get('fileFormat', 'tfrecord')
    if form == 'array_record':
      json.loads((directory / 'features.json').read_text())
  except (ValueError, AttributeError, OSError) as error:
    raise DamagedError(f'{directory} is damaged ({error}); prepare the dataset again') from error
  if form != 'array_record':
    target = data_dir(path) / 'array_record'
    version = directory.relative_to(data_dir(path))
    raise UserError(
      f'{directory} holds {form}, which cannot be read by index. Convert it, in a separate '
      'environment: pip install tensorflow-datasets tensorflow apache-beam mlcroissant && '
      f'tfds convert_format --dataset_version_dir={shlex.quote(str(directory))} --out_file_format=array_record '
      f'--out_dir={shlex.quote(str(target / version))}; then set dataset.path={target}'
    )
  import tensorflow_datasets as tfds

  return tfds.builder_from_directory(directory)


def _features(name: str, builder: Any) -> tuple[str, str, tuple[str, ...], int]:
  """Returns the key of the image, the key of the label ('' if there is none), the class names, and the channels."""
  import tensorflow_datasets as tfds

  features = builder.info.features
  images = [key for key, f in features.items() if isinstance(f, tfds.features.Image)]
  labels = [key for key, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
  if not images or (len(images) > 1 and 'image' not in images):
    raise UserError(
      f'dataset {name!r} is not a dataset of images: it has the features {", ".join(sorted(features))}'
    )
  image = 'image' if 'image' in images else images[0]
  label = 'label' if 'label' in labels else labels[0] if len(labels) == 1 else ''
  classes = features[label].names if label else ()
  return image, label, tuple(classes), 1 if features[image].shape[-1] == 1 else 3


def open_split(settings: Settings, role: str) -> ImageSet:
  """See `datasets.open_split`."""
  import tensorflow_datasets as tfds

  builder = builder_of(settings.name, settings.path)
  image, label, classes, channels = _features(settings.name, builder)
  names = list(builder.info.splits)
  if settings.name in KNOWN:
    default = KNOWN[settings.name].splits
  else:
    default = ('train', 'test' if 'test' in names or 'validation' not in names else 'validation')
  spec = settings.spec(role, default)
  try:
    source = builder.as_data_source(spec, decoders={image: tfds.decode.SkipDecoding()})
  except (ValueError, NotImplementedError) as error:
    raise splits.bad_spec(settings.key(role), spec, names) from error
  lengths = {name: list(builder.info.splits[name].shard_lengths) for name in names}
  identity = f'{builder.info.full_name} {spec} {lengths}'
  decoder = settings.decoder(channels)
  return Examples(
    name=settings.name,
    image_shape=(settings.image_size, settings.image_size, decoder.channels),
    classes=classes,
    identity=hashlib.sha256(identity.encode()).hexdigest(),
    source=source,
    image_key=image,
    label_key=label,
    decoder=decoder,
  )
