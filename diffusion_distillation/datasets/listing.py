"""Lists the images in a directory, a zip or any place that fsspec reads, and counts all other files by reason."""

import dataclasses
import lzma
import os
import pathlib
import re
import stat
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping

import fsspec

from diffusion_distillation.datasets import decoding
from diffusion_distillation.datasets.left_out import LeftOut, shown
from diffusion_distillation.errors import UserError

_CLUTTER = (
  '__macosx',
  'thumbs.db',
  'ehthumbs.db',
  'desktop.ini',
  '@eadir',
  '$recycle.bin',
  'lost+found',
)
_TEXTS = (
  '.txt',
  '.json',
  '.jsonl',
  '.csv',
  '.tsv',
  '.xml',
  '.html',
  '.htm',
  '.md',
  '.yaml',
  '.yml',
  '.py',
)
_ARCHIVES = (
  '.tar',
  '.tgz',
  '.tbz2',
  '.txz',
  '.tar.gz',
  '.tar.bz2',
  '.tar.xz',
  '.tar.zst',
  '.7z',
  '.rar',
  '.gz',
)
_UNPACKED = (0, 8, 12, 14, getattr(zipfile, 'ZIP_ZSTANDARD', 0))  # supported compressions of zip members
_UNPACKING = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, EOFError)
_AT_ONCE = 1000  # number of files whose first bytes are read in one request

Entry = tuple[str, str, int]  # name below the root with slashes, path in the file system, size in bytes


@dataclasses.dataclass(frozen=True, eq=False)
class Listing:
  """The files at a path.

  Attributes:
    system: the file system that reads the files.
    found: path and size of each image, by its name below the root.
    left_out: all other files.
    others: path and size of each file that is no image and has one of the suffixes that were asked for.
  """

  system: fsspec.AbstractFileSystem
  found: Mapping[str, tuple[str, int]]
  left_out: LeftOut
  others: Mapping[str, tuple[str, int]] = dataclasses.field(default_factory=dict)


def list_images(
  path: str, max_bytes: int, key: str = 'dataset.path', suffixes: tuple[str, ...] = ()
) -> Listing:
  """Lists the images at an absolute path or URL.

  An image is a file with one of `decoding.SUFFIXES`, in upper or lower case, or a file whose first bytes are those of an
  image.

  Args:
    path: a directory, a zip, or a URL of either.
    max_bytes: maximum size of a file; larger files are left out.
    key: the config key or flag that the path comes from, for messages.
    suffixes: lower-case suffixes of other files that are listed, too, of any size.

  Raises:
    UserError: the path cannot be listed, or is an unsupported archive, or a zip with paths outside of it.
  """
  left_out = LeftOut()
  try:
    if os.path.isdir(path):
      system, entries = fsspec.filesystem('file'), _walk(path, left_out)
    elif is_zip(path):
      system = fsspec.filesystem('zip', fo=path)
      entries = _members(f'{key}={path}', system.zip.infolist(), left_out)
    else:
      system, root = fsspec.core.url_to_fs(path)
      entries = _remote(system, root)
    found, others = _sort(system, entries, left_out, max_bytes, suffixes)
  except UserError:
    raise
  except (
    Exception
  ) as error:  # from any file system: no such bucket, not a zip, not allowed, not installed
    raise UserError(f'{key}={path} cannot be listed: {error}') from error
  return Listing(system, found, left_out, others)


def is_zip(path: str) -> bool:
  """Whether a path is read as a zip, judged by its suffix or its contents.

  A zip is found from its end, so another archive that holds one also looks like a zip; the first bytes tell them apart.
  """
  if path.lower().endswith('.zip'):
    return True
  if not os.path.isfile(path) or not zipfile.is_zipfile(path):
    return False
  with open(path, 'rb') as file:
    return file.read(2) == b'PK'


def is_damage(error: Exception) -> bool:
  """Whether an error means that a member of a zip is damaged; bz2 raises a plain OSError for that."""
  return isinstance(error, _UNPACKING) or (
    type(error) is OSError and str(error) == 'Invalid data stream'
  )


def check_kind(path: str, key: str = 'dataset.path') -> None:
  """Raises UserError, naming the config key or flag, for a file or archive that is not a zip."""
  if is_zip(path) or os.path.isdir(path):
    return
  if path.lower().endswith(_ARCHIVES) or (os.path.isfile(path) and tarfile.is_tarfile(path)):
    raise UserError(
      f'{key}={path} is an archive of an unsupported kind; unpack it and name the directory, or repack it as '
      '.zip'
    )
  if os.path.isfile(path):
    raise UserError(
      f'{key}={path} is a single file that is not a .zip; name the directory that holds the images'
    )


def _walk(root: str, left_out: LeftOut) -> Iterator[Entry]:
  """Yields the files below a local directory; follows links, but each directory once. A hidden directory counts as one file."""
  seen: set[str] = set()

  def refuse(error: OSError) -> None:
    raise error  # otherwise a class could be missing without notice

  for directory, below, files in os.walk(root, followlinks=True, onerror=refuse):
    below.sort()
    inside = os.path.relpath(directory, root)
    inside = '' if inside == '.' else f'{inside}/'
    real = os.path.realpath(directory)
    if real in seen:
      left_out.add('linked directories that are already listed', inside)
      below.clear()
      continue
    seen.add(real)
    for name in list(below):
      if reason := clutter(name):
        below.remove(name)
        left_out.add(reason, f'{inside}{name}/')
    for file in files:
      path = os.path.join(directory, file)
      size, reason = _size(path)
      if reason:
        left_out.add(reason, inside + file)
      else:
        yield inside + file, path, size


def _size(path: str) -> tuple[int, str]:
  """Returns the size of a regular file, or 0 and the reason why a file is not used."""
  try:
    found = os.stat(path)
  except FileNotFoundError:
    return 0, 'links that lead nowhere'
  except OSError as error:
    return 0, f'that cannot be opened ({error.strerror})'
  return found.st_size, '' if stat.S_ISREG(found.st_mode) else 'not regular files'


def _remote(system: fsspec.AbstractFileSystem, root: str) -> Iterator[Entry]:
  for path, info in system.find(root, detail=True).items():
    yield path[len(root) :].lstrip('/'), path, int(info['size'])


def _members(source: str, infos: Iterable[zipfile.ZipInfo], left_out: LeftOut) -> Iterator[Entry]:
  """Yields the files of a zip, with normalized names; raises UserError if a file is unsafe to read or not readable."""
  seen: dict[str, str] = {}
  for info in infos:
    if info.is_dir() or info.filename.endswith('\\'):
      continue
    name, problem = normalized(info.filename), ''
    if name is None:
      problem = f'holds {info.filename!r}, a path outside the archive; repack it'
    elif name in seen:
      problem = f'holds {name!r} twice; repack it'
    elif info.flag_bits & 1:
      problem = f'is encrypted ({name}); unpack it and name the directory'
    elif info.compress_type not in _UNPACKED:
      problem = f'uses an unsupported compression ({name}); unpack it and name the directory'
    if problem or name is None:
      raise UserError(f'{source} {shown(problem)}')
    seen[name] = info.filename
    if stat.S_ISLNK(info.external_attr >> 16):
      left_out.add('links in a zip', name)
    else:
      yield name, info.filename, info.file_size


def normalized(name: str) -> str | None:
  """Normalizes a name in an archive: with slashes, without '.' and '..'; returns None if it is outside the archive."""
  name = name.replace('\\', '/')
  if name.startswith('/') or re.match('[A-Za-z]:/', name):
    return None
  parts: list[str] = []
  for part in name.split('/'):
    if part == '..':
      if not parts:
        return None
      parts.pop()
    elif part not in ('', '.'):
      parts.append(part)
  return '/'.join(parts) or None


def _sort(
  system: fsspec.AbstractFileSystem,
  entries: Iterable[Entry],
  left_out: LeftOut,
  max_bytes: int,
  suffixes: tuple[str, ...],
) -> tuple[dict[str, tuple[str, int]], dict[str, tuple[str, int]]]:
  """Returns the images among the entries and the other files with these suffixes, and counts the rest."""
  found, others, unknown = {}, {}, []
  for name, path, size in entries:
    reason = clutter(name)
    if not reason and name.lower().endswith(suffixes):
      others[name] = (path, size)
      continue
    if not reason and size > max_bytes:
      reason = f'larger than {max_bytes / 2**20:.0f} MiB'
    if reason:
      left_out.add(reason, name)
    elif name.lower().endswith(decoding.SUFFIXES):
      found[name] = (path, size)
    elif size == 0:
      left_out.add('empty', name)
    elif name.lower().endswith(_TEXTS):
      left_out.add(unsupported(name), name)
    else:
      unknown.append((name, path, size))
  for start in range(0, len(unknown), _AT_ONCE):
    for (name, path, size), head in _heads(system, unknown[start : start + _AT_ONCE]):
      if isinstance(head, bytes) and decoding.is_image(head):
        found[name] = (path, size)
      else:
        left_out.add(
          unsupported(name) if isinstance(head, bytes) else f'that cannot be opened ({head})', name
        )
  return found, others


def clutter(name: str) -> str:
  """Returns the reason why a file is left out because of its name, or ''."""
  parts = name.lower().split('/')
  if any(part in _CLUTTER or part.startswith('._') or part == '.ds_store' for part in parts):
    return 'of the operating system'
  return 'hidden' if any(part.startswith('.') for part in parts) else ''


def unsupported(name: str) -> str:
  """Returns the reason why a file that is no image is left out."""
  suffix = pathlib.PurePosixPath(name).suffix.lower()
  if name.lower().endswith(('.zip', *_ARCHIVES)):
    return f'archives ({suffix}), which are not opened inside a dataset: unpack them'
  return f'in an unsupported format ({suffix or "no suffix"})'


def _heads(
  system: fsspec.AbstractFileSystem, entries: list[Entry]
) -> Iterator[tuple[Entry, bytes | Exception]]:
  """Yields the first bytes of each file, or the error when it was opened; uses one request if the file system allows it."""
  paths = [path for _, path, _ in entries]
  ends = [min(size, decoding.HEAD) for _, _, size in entries]
  heads = system.cat_ranges(paths, [0] * len(paths), ends, on_error='return')
  for entry, head in zip(entries, heads, strict=True):
    if isinstance(head, Exception) and not (is_damage(head) or isinstance(head, PermissionError)):
      raise head
    yield entry, head
