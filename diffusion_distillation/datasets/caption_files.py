"""Reads captions from tables (CSV, or one JSON object per line) and from text files beside the images."""

import csv
import io
import json
import pathlib
import posixpath
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import fsspec

from diffusion_distillation.datasets import listing
from diffusion_distillation.datasets.left_out import shown
from diffusion_distillation.errors import UserError

FILE_NAME, COLUMNS = 'file_name', ('text', 'caption', 'prompt')
_TABLES = ('metadata', 'captions')
_AT_ONCE = 1000  # number of files that are read in one request


def is_table(name: str) -> bool:
  """Whether a file is a table of captions: metadata or captions, .csv or .jsonl."""
  stem, suffix = posixpath.splitext(posixpath.basename(name).lower())
  return stem in _TABLES and suffix in ('.csv', '.jsonl')


def of_tables(
  system: fsspec.AbstractFileSystem, files: Mapping[str, tuple[str, int]], source: str
) -> dict[str, str]:
  """Returns the captions in tables by the names of the images below the root.

  Args:
    system: reads the tables.
    files: path and size of each table by its name below the root.
    source: the root as messages name it.

  Raises:
    UserError: a table cannot be read, lacks a column, or leads out of the folder, or an image has two rows.
  """
  captions: dict[str, str] = {}
  for table, text in _read(system, files, source):
    where = f'{source}: {shown(table)}'
    for line, row in _rows(table, text, where):
      at = f'{where}, line {line}'
      file_name = row.get(FILE_NAME)
      if not isinstance(file_name, str) or not file_name:
        raise UserError(f'{at} has no {FILE_NAME}')
      inside = listing.normalized(file_name)
      name = inside and listing.normalized(f'{posixpath.dirname(table)}/{inside}'.lstrip('/'))
      if not name:
        raise UserError(f'{at} names {shown(file_name)}, a path outside the folder of the table')
      if name in captions:
        raise UserError(f'{at} names {shown(name)}, which already has a caption; keep one row per image')
      captions[name] = caption_of(row, at)
  return captions


def _rows(table: str, text: str, where: str) -> Iterator[tuple[int, Mapping[str, Any]]]:
  """Yields the number of the line and the values of each row of a table."""
  if table.lower().endswith('.csv'):
    reader = csv.DictReader(io.StringIO(text, newline=''), strict=True)
    try:
      for row in reader:
        yield reader.line_num, row
    except csv.Error as error:
      raise UserError(f'{where} is not valid CSV after line {reader.line_num}: {error}') from error
    return
  for line, content in enumerate(text.split('\n'), 1):
    if content.strip():
      yield line, parsed(content, f'{where}, line {line}')


def read_prompts(path: pathlib.Path, key: str) -> list[str]:
  """Returns the texts in a file: the lines of a .txt, or the captions in a .csv or .jsonl; empty ones are left out.

  Args:
    path: the file.
    key: the config key or flag that the path comes from, for messages.

  Raises:
    UserError: there is no such file, it is of another kind, or it holds no text.
  """
  where = f'{key}={path}'
  if path.suffix.lower() not in ('.txt', '.csv', '.jsonl'):
    raise UserError(f'{where}: prompts are read from .txt, .csv and .jsonl')
  try:
    text = decoded(path.read_bytes(), where)
  except OSError as error:
    raise UserError(f'{where} cannot be read: {error.strerror}') from error
  if path.suffix.lower() == '.txt':
    found = [line.strip() for line in text.split('\n')]
  else:
    rows = _rows(path.name, text, where)
    found = [caption_of(row, f'{where}, line {line}') for line, row in rows]
  if not any(found):
    raise UserError(f'{where} holds no prompt')
  return [line for line in found if line]


def beside(
  system: fsspec.AbstractFileSystem,
  files: Mapping[str, tuple[str, int]],
  images: Iterable[str],
  source: str,
) -> dict[str, str]:
  """Returns the captions in the files NAME.txt by the names of the images, NAME with any suffix; see `of_tables`.

  The caption of a text file without an image is returned by the name of the text file.
  """
  named: dict[str, list[str]] = {}
  for image in images:
    named.setdefault(posixpath.splitext(image)[0], []).append(image)
  captions = {}
  for name, text in _read(system, files, source):
    for image in named.get(posixpath.splitext(name)[0], [name]):
      captions[image] = text.strip()
  return captions


def caption_of(row: Mapping[str, Any], where: str) -> str:
  """Returns the caption in a row of a table or in a JSON object; raises UserError if there is none."""
  for column in COLUMNS:
    if isinstance(caption := row.get(column), str):
      return caption.strip()
  raise UserError(
    f'{where} has no caption: a text called {", ".join(COLUMNS[:-1])} or {COLUMNS[-1]} is needed'
  )


def parsed(content: str, where: str) -> Mapping[str, Any]:
  """Parses a JSON object; raises UserError if it is none."""
  try:
    value = json.loads(content)
  except (ValueError, RecursionError) as error:
    raise UserError(f'{where} is not valid JSON: {error}') from error
  if not isinstance(value, dict):
    raise UserError(f'{where} is not a JSON object')
  return value


def decoded(content: bytes, where: str) -> str:
  """Decodes UTF-8, with or without a byte order mark; raises UserError if it is not valid."""
  try:
    return content.decode('utf-8-sig')
  except UnicodeDecodeError as error:
    raise UserError(f'{where} is not UTF-8 text; convert it') from error


def _read(
  system: fsspec.AbstractFileSystem, files: Mapping[str, tuple[str, int]], source: str
) -> Iterator[tuple[str, str]]:
  """Yields the name and the text of each file; raises UserError if it cannot be read or is not UTF-8."""
  names = sorted(files)
  for start in range(0, len(names), _AT_ONCE):
    some = names[start : start + _AT_ONCE]
    full = [name for name in some if files[name][1]]
    paths, sizes = [files[name][0] for name in full], [files[name][1] for name in full]
    found = system.cat_ranges(paths, [0] * len(full), sizes, on_error='return')
    contents = dict(zip(full, found, strict=True))
    for name in some:
      content = contents.get(name, b'')
      if not isinstance(content, bytes):
        raise UserError(f'{source}: {shown(name)} cannot be read: {content}')
      yield name, decoded(content, f'{source}: {shown(name)}')
