"""Prompts without images: the lines of a text file, or a column of a table.

prompts.txt      one prompt per line
prompts.csv      a header with a column `caption`, `text` or `prompt`
prompts.jsonl    one JSON object per line, with such a key
"""

import csv
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from diffusion_distillation.datasets.settings import Settings
from diffusion_distillation.errors import UserError

KEYS = ('caption', 'text', 'prompt')  # of a column or a JSON object; the first one that exists is read


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
    UserError: the file does not exist, has another suffix, or has no prompts, or a line cannot be read.
  """
  if not settings.path:
    raise UserError(
      'dataset.name=prompts needs dataset.path, a .txt file with one prompt per line, or a .csv or .jsonl'
    )
  path = pathlib.Path(os.path.expanduser(settings.path))
  if '://' in settings.path or not path.is_file():
    raise UserError(f'dataset.path={settings.path}: there is no such file on this machine')
  if path.suffix.lower() not in _READERS:
    raise UserError(
      f'dataset.path={settings.path}: prompts are read from {", ".join(_READERS)}, not from {path.suffix or "such files"}'
    )
  found: list[str] = []
  hashed = hashlib.sha256()
  try:
    for text in _READERS[path.suffix.lower()](path):
      if text := text.strip():
        found.append(text)
        hashed.update(text.encode() + b'\0')
  except UnicodeDecodeError as error:
    raise UserError(f'{path} is not a text file in UTF-8; convert it') from error
  except (OSError, csv.Error) as error:
    raise UserError(f'{path} cannot be read: {error}') from error
  if not found:
    raise UserError(f'{path} holds no prompts')
  return Prompts(path.stem, found, hashed.hexdigest())


def _lines(path: pathlib.Path) -> Iterator[str]:
  with path.open(encoding='utf-8-sig') as file:
    yield from file


def _rows(path: pathlib.Path) -> Iterator[str]:
  with path.open(encoding='utf-8-sig', newline='') as file:
    rows = csv.DictReader(file)
    key = next((name for name in KEYS if name in (rows.fieldnames or ())), None)
    if key is None:
      columns = ', '.join(rows.fieldnames or ()) or 'none'
      raise UserError(
        f"{path}: the first line must name a column 'caption' (or text, prompt); its columns are {columns[:200]}"
      )
    for row in rows:
      yield row[key] or ''


def _objects(path: pathlib.Path) -> Iterator[str]:
  for number, line in enumerate(_lines(path), 1):
    if not line.strip():
      continue
    try:
      found: Any = json.loads(line)
    except ValueError as error:
      raise UserError(f'{path}, line {number}: not JSON ({error})') from error
    values = found if isinstance(found, Mapping) else {}
    text = next((values[name] for name in KEYS if name in values), None)
    if not isinstance(text, str):
      raise UserError(f"{path}, line {number}: a JSON object with a text as 'caption' is expected")
    yield text


_READERS: dict[str, Callable[[pathlib.Path], Iterator[str]]] = {
  '.txt': _lines,
  '.csv': _rows,
  '.jsonl': _objects,
}
