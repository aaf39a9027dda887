"""Prompts without images: the lines of a text file, or a column of a table; see `caption_files.read_prompts`."""

import dataclasses
import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import Protocol

from diffusion_distillation.datasets import caption_files
from diffusion_distillation.datasets.settings import Settings
from diffusion_distillation.errors import UserError


class Captions(Protocol):
  """Texts by index, with or without images: prompts, or a dataset of images with captions."""

  @property
  def name(self) -> str:
    """The name of the dataset for reports."""
    ...

  @property
  def identity(self) -> str:
    """The sha256 of the contents."""
    ...

  def __len__(self) -> int: ...

  def caption(self, k: int) -> str:
    """Returns the text at index k."""
    ...


@dataclasses.dataclass(frozen=True, eq=False)
class Prompts:
  """The prompts of a file, without empty ones.

  Attributes:
    name: the name of the file.
    texts: the prompts.
    identity: sha256 of the prompts in their order.
  """

  name: str
  texts: Sequence[str]
  identity: str

  def __len__(self) -> int:
    return len(self.texts)

  def caption(self, k: int) -> str:
    """See `Captions.caption`."""
    return self.texts[k]


def read(settings: Settings) -> Prompts:
  """Reads the prompts in the file `settings.path`.

  Raises:
    UserError: no file is named, or there is no such file; see also `caption_files.read_prompts`.
  """
  if not settings.path:
    raise UserError(
      'dataset.name=prompts needs dataset.path, a .txt file with one prompt per line, or a .csv or .jsonl'
    )
  path = pathlib.Path(os.path.expanduser(settings.path))
  if '://' in settings.path or not path.is_file():
    raise UserError(f'dataset.path={settings.path}: there is no such file on this machine')
  found = caption_files.read_prompts(path, 'dataset.path')
  hashed = hashlib.sha256()
  for text in found:
    hashed.update(text.encode() + b'\0')
  return Prompts(path.stem, found, hashed.hexdigest())
