"""What a config says of its data set."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from diffusion_distillation.datasets import decoding
from diffusion_distillation.errors import UserError

ROLES = ('train', 'eval')
WITHOUT_FILES = ('digits', 'shapes')
NONE = 'none'  # no images at all, for runs that need none
OURS = (*WITHOUT_FILES, 'folder')  # all other names are tensorflow-datasets'


@dataclasses.dataclass(frozen=True)
class Settings:
  """Which images, and what becomes of them; see configs/default.py."""

  name: str
  path: str
  prepared: str
  split: str
  eval_split: str
  image_size: int
  channels: int | None
  resize: str

  @classmethod
  def of(cls, section: Mapping[str, Any]) -> 'Settings':
    """From the `dataset` section of a config."""
    return cls(**{field.name: section[field.name] for field in dataclasses.fields(cls)})

  def __post_init__(self) -> None:
    if self.channels not in (None, 1, 3):
      raise UserError(f'dataset.channels={self.channels} must be 1 (grey) or 3')
    if self.path and self.name in WITHOUT_FILES:
      raise UserError(
        f'dataset.path={self.path}, but dataset.name={self.name} reads nothing; dataset.name=folder?'
      )
    if '://' in self.prepared:
      raise UserError(
        f'dataset.prepared={self.prepared}: ArrayRecord is read from disks only; name a directory'
      )
    if self.resize not in decoding.RESIZE:
      raise UserError(f'dataset.resize={self.resize!r} is not one of {list(decoding.RESIZE)}')

  @staticmethod
  def key(role: str) -> str:
    """The config's key of the role's split, for messages."""
    return 'dataset.split' if role == 'train' else 'dataset.eval_split'

  def spec(self, role: str, default: tuple[str, str]) -> str:
    """The role's split as given, or the set's own (for training, for evaluation)."""
    given = self.split if role == 'train' else self.eval_split
    return given or default[ROLES.index(role)]

  def decoder(self, channels: int) -> decoding.Decoder:
    """To the config's size; `channels` where the config does not say."""
    return decoding.Decoder(self.image_size, self.channels or channels, self.resize)
