"""The `dataset` section of a config."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffusion_distillation import config
from diffusion_distillation.datasets import decoding
from diffusion_distillation.errors import UserError

ROLES = ('train', 'eval')
ENCODED_DTYPES = ('float32', 'float16')
WITHOUT_FILES = ('digits', 'shapes', 'captioned_shapes')
NONE = 'none'  # no images, for runs that need none
PROMPTS = 'prompts'  # texts without images, for models that draw what a text says
FROM_PATH = ('folder', 'captions')  # read all files at dataset.path
OURS = (*WITHOUT_FILES, *FROM_PATH)  # suggested for unknown names


@dataclasses.dataclass(frozen=True)
class Settings:
  """Which images to read, and how to decode them: the keys that the datasets themselves use."""

  name: str = config.key(
    'digits',
    'Dataset: `digits`, `shapes`, `captioned_shapes`, `folder`, `captions` (images with captions), or the name of a dataset '
    'of tensorflow-datasets, such as `cifar10`; `prompts`: texts without images; `none`: no images.',
  )
  path: str = config.key(
    '',
    'Location of the images: a directory, .zip or URL for `folder` and `captions`, for which it may also be a .tar; '
    '`data_dir` for tensorflow-datasets, whose default is used if this is empty; a .txt, .csv or .jsonl file for `prompts`.',
    path='any',
  )
  prepared: str = config.key(
    '',
    'Directory of the decoded copy of the dataset that `--mode=prepare` writes and all other modes read; if empty, the '
    'dataset itself is read. For a model that draws what a text says: the directory of the encoded texts and images, which '
    'several runs may share; if empty, they are in the workdir.',
    path='disk',
  )
  split: str = config.key(
    '', "Split to train on, such as `train[:90%]`; if empty, the dataset's own training split."
  )
  eval_split: str = config.key(
    '', "Split held out for evaluation; if empty, the dataset's own held-out split."
  )
  image_size: int = config.key(
    8,
    'Height and width, in pixels, to which the central square of each image is resized.',
    config.POSITIVE,
  )
  channels: int | None = config.key(
    None,
    "Number of channels, 1 (grey) or 3 (color); if `None`, the dataset's own (3 for `folder`).",
  )
  resize: str = config.key(
    'area', 'How images are resized; every choice is antialiased.', choices=decoding.RESIZE
  )

  @classmethod
  def of(cls, section: Mapping[str, Any]) -> 'Settings':
    """Takes the settings from the `dataset` section of a config."""
    return cls(**{field.name: section[field.name] for field in dataclasses.fields(cls)})

  def __post_init__(self) -> None:
    if self.channels not in (None, 1, 3):
      raise UserError(f'dataset.channels={self.channels} must be 1 (grey) or 3')
    if self.path and self.name in WITHOUT_FILES:
      raise UserError(
        f'dataset.path={self.path}, but dataset.name={self.name} reads no files; did you mean dataset.name=folder?'
      )
    if '://' in self.prepared:
      raise UserError(
        f'dataset.prepared={self.prepared}: ArrayRecord files can only be read from disk; name a directory'
      )
    if self.resize not in decoding.RESIZE:
      raise UserError(f'dataset.resize={self.resize!r} is not one of {list(decoding.RESIZE)}')

  @staticmethod
  def key(role: str) -> str:
    """Returns the config's key for the role's split, for messages."""
    return 'dataset.split' if role == 'train' else 'dataset.eval_split'

  def spec(self, role: str, default: tuple[str, str]) -> str:
    """Returns the role's split in the config, or else in `default`, the dataset's own (training, evaluation) splits."""
    given = self.split if role == 'train' else self.eval_split
    return given or default[ROLES.index(role)]

  def decoder(self, channels: int) -> decoding.Decoder:
    """Returns the decoder for these settings; `channels` is used if the config does not set it."""
    return decoding.Decoder(self.image_size, self.channels or channels, self.resize)


@dataclasses.dataclass(frozen=True)
class DatasetSection(Settings):
  """The dataset, and how it is read and augmented."""

  random_flip: bool = config.key(False, 'Whether training images are mirrored left to right at random.')
  dequantize: bool = config.key(
    False,
    'Whether pixels are dequantized: uniform noise is added that does not change their rounded values.',
  )
  label_dropout: float = config.key(
    0.0,
    'Probability that the class label or the caption is dropped in training, so that a conditional network can also sample '
    'without one.',
    config.FRACTION,
  )
  in_memory_gb: float = config.key(
    4.0,
    'Largest size in gigabytes, after decoding, of a dataset that is decoded once and kept in memory.',
    config.NOT_NEGATIVE,
  )
  encoded_dtype: str = config.key(
    'float32',
    'Type in which the embeddings of texts and the latents of images are stored; `float16` halves their size on disk.',
    choices=ENCODED_DTYPES,
  )
  workers: int = config.key(
    4,
    'Number of processes that read a dataset that is not kept in memory; 0 for threads.',
    config.NOT_NEGATIVE,
  )
