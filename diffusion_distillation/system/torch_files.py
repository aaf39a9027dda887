"""Reads the tensors that torch.save wrote, by name, without torch and without executing anything in the file.

A file has one of two forms. Since torch 1.6, it is a zip whose members are a pickle, NAME/data.pkl, and the raw numbers of
each storage, NAME/data/KEY. Before, it was a sequence of pickles, followed by the numbers of each storage. In both, the pickle
builds tensors as views of storages; `pickles.Machine` reads it.
"""

import io
import pathlib
import struct
import zipfile
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from diffusion_distillation.errors import UserError
from diffusion_distillation.system import pickles
from diffusion_distillation.system.pickles import STORAGES, Calls, Machine, Name

Arrays = dict[str, np.ndarray]

_MOST_BYTES = 2  # maximum bytes of all tensors for each byte of the file
_HEAD = 64  # bytes by which the two forms are recognized
_MOST_PICKLE = 2**26  # maximum bytes of the pickle that describes the tensors
_INSTEAD = 'save its state_dict() with torch.save or safetensors.torch.save_file'
_NAMES = (
  'collections.OrderedDict',
  'torch._utils._rebuild_tensor_v2',
  'torch._utils._rebuild_parameter',
)
_CALLS: Calls = {name: pickles.TENSORS[name] for name in _NAMES} | dict(pickles.STORAGE_NAMES)


def read(path: pathlib.Path, source: str) -> Arrays:
  """Reads a state dict: the tensors of a dict by name, as views of the storages in the file's types.

  Args:
    path: the file.
    source: the flag or config key with the path, for messages: 'evaluation.inception=weights.pth'.

  Raises:
    UserError: the file does not exist, is damaged, is not a state dict, or calls a function that is not needed to build
      tensors, which is named.
  """
  try:
    size = path.stat().st_size
    with path.open('rb') as file:
      head = file.read(_HEAD)
    found = _read_zip(path, size) if head.startswith(b'PK') else _read_legacy(path, head)
    arrays = _tensors(found)
    if sum(array.nbytes for array in arrays.values()) > _MOST_BYTES * size:
      raise ValueError('its tensors share storages and have far more numbers than the file')
    return arrays
  except OSError as error:
    raise UserError(f'{source} cannot be read: {error.strerror or error}') from error
  except UserError as error:
    raise UserError(f'{source} {error}') from error
  except Exception as error:  # unpickling unknown content may raise anything
    reason = ' '.join(str(error).split())[:300]
    raise UserError(
      f'{source} is not a state dict that torch.save wrote, or is damaged ({type(error).__name__}: {reason}); '
      f'{_INSTEAD}, or copy the file again'
    ) from error


def _tensors(found: Any) -> Arrays:
  """Returns the tensors of the object in a file, which may be in the dict `state_dict` of a training checkpoint."""
  if isinstance(found, dict) and isinstance(found.get('state_dict'), dict):
    found = found['state_dict']
  if not isinstance(found, dict) or not found:
    raise UserError(f'holds no state dict; {_INSTEAD}')
  other = next(
    (n for n, v in found.items() if not isinstance(n, str) or not isinstance(v, np.ndarray)), 0
  )
  if other != 0:
    raise UserError(f'holds something else than tensors by name ({str(other)[:80]!r}); {_INSTEAD}')
  return found


def _numbers(kind: Any, name: Any, key: Any, count: Any) -> tuple[str, np.dtype, int]:
  """Checks the description of a storage; returns its key, its type and its number of numbers."""
  if kind != 'storage' or not isinstance(name, Name) or not isinstance(key, str):
    raise ValueError('the pickle refers to something that is not a storage')
  if not isinstance(count, int) or not 0 <= count < 2**48:
    raise ValueError('the size of a storage is not a number')
  return key, np.dtype(STORAGES[name.name.removesuffix('Storage')]).newbyteorder('<'), count


# Since torch 1.6: a zip.


def _read_zip(path: pathlib.Path, size: int) -> Any:
  with zipfile.ZipFile(path) as archive:
    members = {info.filename: info for info in archive.infolist()}
    folder = _folder(members)
    left = size  # overlapping members could otherwise be larger than the file together

    def content(name: str, most: int = size) -> bytes:
      nonlocal left
      info = members.get(f'{folder}/{name}')
      if info is None:
        raise ValueError(f'{folder}/{name} is missing')
      if info.compress_type != zipfile.ZIP_STORED:
        raise ValueError(f'{info.filename} is compressed, as torch never writes it')
      left -= info.file_size
      if info.file_size > most or left < 0:
        raise ValueError(f'{info.filename} is {info.file_size} bytes, more than it can be')
      return archive.read(info)

    if f'{folder}/byteorder' in members and content('byteorder', 16) != b'little':
      raise UserError('has big-endian numbers; save it on a little-endian machine')
    read: dict[str, tuple[np.dtype, np.ndarray]] = {}

    def storage(reference: Any) -> np.ndarray:
      kind, name, key, _, count = reference
      key, dtype, count = _numbers(kind, name, key, count)
      if key not in read:
        numbers = content(f'data/{key}')
        if len(numbers) != count * dtype.itemsize:
          raise ValueError(f'{folder}/data/{key} has {len(numbers)} bytes instead of {count} {dtype}')
        read[key] = dtype, np.frombuffer(numbers, dtype)
      if read[key][0] != dtype:
        raise ValueError(f'the storage {key} has two types')
      return read[key][1]

    return Machine(_CALLS, storage).run(io.BytesIO(content('data.pkl', _MOST_PICKLE)))


def _folder(members: Mapping[str, zipfile.ZipInfo]) -> str:
  """Returns the folder of the zip that holds data.pkl; raises UserError for TorchScript, and ValueError for other zips."""
  inside = [name.split('/') for name in members]
  if any(parts[1:] == ['constants.pkl'] or parts[1:2] == ['code'] for parts in inside):
    raise UserError(
      'is a TorchScript program, which is not executed; name the .pth file of a state dict instead, or save '
      'torch.jit.load(FILE).state_dict() with torch.save'
    )
  folders = {parts[0] for parts in inside if parts[1:] == ['data.pkl']}
  if len(folders) != 1:
    raise ValueError('the zip has no data.pkl' if not folders else 'the zip has several data.pkl')
  return folders.pop()


# Before torch 1.6: pickles, and numbers behind them.


def _read_legacy(path: pathlib.Path, head: bytes) -> Any:
  try:
    magic = Machine({}).run(io.BytesIO(head))
  except Exception:
    magic = None
  if magic != pickles.MAGIC:  # known before a file is read that may be anything
    raise UserError(f'is not a file that torch.save wrote; {_INSTEAD}')
  content = path.read_bytes()
  stream = io.BytesIO(content)
  Machine({}).run(stream)
  for _ in range(2):  # the protocol, and a description of the machine
    Machine({}).run(stream)
  begin = stream.tell()
  declared = _declared(stream)
  storages: dict[str, np.ndarray] = {}
  for key in Machine({}).run(stream):
    dtype, count = declared[key]
    (stored,) = struct.unpack('<q', stream.read(8))
    if stored != count or key in storages:
      raise ValueError(f'the storage {key} is not what it is declared to be')
    storages[key] = np.frombuffer(content, dtype, count, stream.tell())
    stream.seek(count * dtype.itemsize, io.SEEK_CUR)
  stream.seek(begin)
  return Machine(_CALLS, lambda reference: storages[reference[2]]).run(stream)


def _declared(stream: io.BytesIO) -> dict[str, tuple[np.dtype, int]]:
  """Returns type and size of each storage that a pickle refers to, and leaves the stream at the end of the pickle."""
  found: dict[str, tuple[np.dtype, int]] = {}

  def storage(reference: Any) -> None:
    kind, name, key, _, count, view = reference
    key, dtype, count = _numbers(kind, name, key, count)
    if view is not None or found.setdefault(key, (dtype, count)) != (dtype, count):
      raise ValueError(f'the storage {key} is a view of another or has two descriptions')

  def nothing(*_: Any) -> None:
    return None

  without: dict[str, Callable[..., Any]] = dict.fromkeys(_CALLS, nothing)
  without['collections.OrderedDict'] = _CALLS['collections.OrderedDict']
  Machine(without, storage).run(stream)
  return found
