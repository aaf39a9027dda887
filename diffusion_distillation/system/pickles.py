"""Reads pickles without executing anything in them.

A pickle is a program for a stack machine that can call any function by name. This module reimplements the machine on top of
the standard library's disassembler: it only builds plain containers, and for the name of a function or a class, it calls a
function that the caller has given for this name. Any other name is refused, and nothing is ever imported.
"""

import io
import math
import pickletools
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np


class Name(NamedTuple):
  """The name of a function or class in the file, which is not imported."""

  module: str
  name: str

  def __str__(self) -> str:
    return f'{self.module}.{self.name}'


class Inert:
  """A stand-in for an object whose class is not imported.

  Attributes:
    name: name of the class.
    state: attributes of the object by name, as the file gives them.
  """

  def __init__(self, name: str, state: Mapping[str, Any] | None = None):
    self.name = name
    self.state: dict[str, Any] = dict(state or {})


Calls = Mapping[str, Callable[..., Any]]

_MARK = object()
_SKIPPED = {'PROTO', 'FRAME'}
_CONSTANTS: dict[str, Callable[[], Any]] = {
  'NONE': lambda: None,
  'NEWTRUE': lambda: True,
  'NEWFALSE': lambda: False,
  'EMPTY_TUPLE': tuple,
  'EMPTY_LIST': list,
  'EMPTY_DICT': dict,
  'EMPTY_SET': set,
  'MARK': lambda: _MARK,
}
_VALUES = (
  *('INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4', 'FLOAT', 'BINFLOAT'),
  *('STRING', 'BINSTRING', 'SHORT_BINSTRING', 'BINBYTES', 'SHORT_BINBYTES', 'BINBYTES8', 'BYTEARRAY8'),
  *('UNICODE', 'BINUNICODE', 'SHORT_BINUNICODE', 'BINUNICODE8'),
)


class Machine:
  """The stack machine.

  Args:
    calls: the function to call for each allowed name, 'module.name'; all other names are refused.
    persistent: resolves references to objects outside of the pickle; without it, such references are refused.
  """

  def __init__(self, calls: Calls, persistent: Callable[[Any], Any] | None = None):
    self._calls, self._persistent = calls, persistent
    self._stack: list[Any] = []
    self._memo: dict[int, Any] = {}
    self._copied, self._most = 0, 0  # number of items passed to functions so far, and its limit

  def run(self, stream: io.BytesIO) -> Any:
    """Reads the object of the pickle at the stream's position, and leaves the stream at the pickle's end.

    Raises:
      ValueError: the pickle names something that is not in `calls`, or has an unsupported opcode.
      Exception: the stream is not a valid pickle; any exception is possible.
    """
    here = stream.tell()
    self._most = 2 * stream.seek(0, io.SEEK_END)
    stream.seek(here)
    for opcode, argument, _ in pickletools.genops(stream):
      name = opcode.name
      if name == 'STOP':
        return self._stack.pop()
      if name in _CONSTANTS:
        self._stack.append(_CONSTANTS[name]())
      elif name in _VALUES:
        self._stack.append(argument)
      elif name not in _SKIPPED:
        step = getattr(self, f'_{name.lower()}', None)
        if step is None:
          raise ValueError(f'the opcode {name} is refused')
        step(argument)
    raise ValueError('the pickle is cut off')

  def _marked(self) -> list[Any]:
    """Removes the last mark and all items above it, and returns these items."""
    at = next(i for i in reversed(range(len(self._stack))) if self._stack[i] is _MARK)
    items = self._stack[at + 1 :]
    del self._stack[at:]
    return items

  def _push(self, value: Any) -> None:
    self._stack.append(value)

  def _pop(self, _: None) -> None:
    self._stack.pop()

  def _pop_mark(self, _: None) -> None:
    self._marked()

  def _dup(self, _: None) -> None:
    self._push(self._stack[-1])

  # Containers.

  def _tuple(self, _: None) -> None:
    self._push(tuple(self._marked()))

  def _tuple1(self, _: None) -> None:
    self._last(1)

  def _tuple2(self, _: None) -> None:
    self._last(2)

  def _tuple3(self, _: None) -> None:
    self._last(3)

  def _last(self, count: int) -> None:
    items = tuple(self._stack[-count:])
    del self._stack[-count:]
    self._push(items)

  def _list(self, _: None) -> None:
    self._push(self._marked())

  def _append(self, _: None) -> None:
    self._extend([self._stack.pop()])

  def _appends(self, _: None) -> None:
    self._extend(self._marked())

  def _extend(self, items: list[Any]) -> None:
    if not isinstance(self._stack[-1], list):
      raise ValueError('the pickle appends an item to something that is not a list')
    self._stack[-1].extend(items)

  def _dict(self, _: None) -> None:
    items = self._marked()
    self._push(mapping(zip(items[::2], items[1::2], strict=True)))

  def _setitem(self, _: None) -> None:
    value, key = self._stack.pop(), self._stack.pop()
    self._update([key, value])

  def _setitems(self, _: None) -> None:
    self._update(self._marked())

  def _update(self, items: list[Any]) -> None:
    if not isinstance(self._stack[-1], dict):
      raise ValueError('the pickle sets items of something that is not a dict')
    self._stack[-1].update(mapping(zip(items[::2], items[1::2], strict=True)))

  def _additems(self, _: None) -> None:
    items = self._marked()
    if not isinstance(self._stack[-1], set):
      raise ValueError('the pickle adds an item to something that is not a set')
    self._stack[-1].update(map(_key, items))

  def _frozenset(self, _: None) -> None:
    self._push(frozenset(map(_key, self._marked())))

  # The memo.

  def _memoize(self, _: None) -> None:
    self._put(len(self._memo))

  def _put(self, index: int) -> None:
    self._memo[index] = self._stack[-1]

  def _get(self, index: int) -> None:
    self._push(self._memo[index])

  _binput = _long_binput = _put
  _binget = _long_binget = _get

  # Names and calls.

  def _global(self, argument: str) -> None:
    self._name(*argument.split(' ', 1))

  def _stack_global(self, _: None) -> None:
    name, module = self._stack.pop(), self._stack.pop()
    self._name(module, name)

  def _name(self, module: str, name: str) -> None:
    if not isinstance(module, str) or not isinstance(name, str):
      raise ValueError('the name of a function is not a string')
    found = Name(module[:80], name[:80])
    if str(found) not in self._calls:
      raise ValueError(f'the pickle names {str(found)[:80]!r}, which is refused')
    self._push(found)

  def _reduce(self, _: None) -> None:
    arguments, found = self._stack.pop(), self._stack.pop()
    if not isinstance(found, Name) or not isinstance(arguments, tuple):
      raise ValueError('the pickle calls something that is not a named function')
    self._copied += sum(len(a) for a in arguments if isinstance(a, str | list | tuple | dict | set))
    if self._copied > self._most:
      raise ValueError('the pickle copies its own content too many times')
    self._push(self._calls[str(found)](*arguments))

  _newobj = _reduce

  def _build(self, _: None) -> None:
    state, made = self._stack.pop(), self._stack[-1]
    if isinstance(made, Inert) and isinstance(state, dict):
      made.state.update(state)
    elif not isinstance(made, np.dtype | dict):  # of which only the byte order and metadata are lost
      raise ValueError('the pickle sets the state of something that has none')

  def _binpersid(self, _: None) -> None:
    if self._persistent is None:
      raise ValueError('the pickle refers to an object outside the file')
    self._push(self._persistent(self._stack.pop()))


def _key(value: Any) -> Any:
  """Returns a key or a member of a set; raises ValueError for values that may take long to hash, such as containers."""
  if not isinstance(value, str | bytes | int | float | None):
    raise ValueError('a key of a dict or a member of a set is a container')
  if isinstance(value, int) and value.bit_length() > 64:
    raise ValueError('a key of a dict or a member of a set is a huge number')
  return value


def mapping(items: Any = ()) -> dict[Any, Any]:
  """Returns a dict from a dict or from pairs."""
  return {_key(k): value for k, value in (items.items() if isinstance(items, dict) else items)}


# Tensors in torch's pickles.

MAGIC = 0x1950A86A20F9469CFC6C  # the first object of a file in torch's legacy format
STORAGES: dict[str, Any] = {
  'Float': np.float32,
  'Double': np.float64,
  'Half': np.float16,
  'BFloat16': jnp.bfloat16,
  'Long': np.int64,
  'Int': np.int32,
  'Short': np.int16,
  'Char': np.int8,
  'Byte': np.uint8,
  'Bool': np.bool_,
}


def _no_call(*arguments: Any) -> Any:
  raise ValueError('the pickle calls the type of a storage as a function')


STORAGE_NAMES: Calls = {f'torch.{name}Storage': _no_call for name in STORAGES}


def storage(content: bytes) -> np.ndarray:
  """Reads the numbers of a storage in torch's legacy format: three pickles, an object, and raw data."""
  stream = io.BytesIO(content)
  if Machine({}).run(stream) != MAGIC:
    raise ValueError('a tensor is not in the legacy format of torch')
  for _ in range(2):  # the protocol, and a description of the machine
    Machine({}).run(stream)
  declared: list[tuple[Any, ...]] = []

  def persistent(reference: Any) -> Any:
    declared.append(reference)
    return reference

  Machine(STORAGE_NAMES, persistent).run(stream)
  keys = Machine({}).run(stream)
  ((kind, name, key, _, count, *_),) = declared
  (stored,) = struct.unpack('<q', stream.read(8))
  if not isinstance(name, Name) or not isinstance(key, str):
    raise ValueError('a storage has no type or no key')
  if kind != 'storage' or keys != [key] or stored != count or stored < 0:
    raise ValueError('a storage is not what it is declared to be')
  dtype = np.dtype(STORAGES[name.name.removesuffix('Storage')]).newbyteorder('<')
  return np.frombuffer(content, dtype, count, stream.tell())


def tensor(
  numbers: np.ndarray, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> np.ndarray:
  """Returns a view of a storage, with offset and strides in numbers; raises ValueError if it exceeds the storage."""
  sizes = (offset, *shape, *strides)
  if len(sizes) > 17 or not all(isinstance(size, int) and 0 <= size < 2**48 for size in sizes):
    raise ValueError('a tensor is not a view of a storage')
  if not isinstance(numbers, np.ndarray):
    raise ValueError('a tensor is not a view of a storage')
  last = offset + sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
  if math.prod(shape) and (last >= numbers.size or math.prod(shape) > numbers.size):
    raise ValueError(f'a tensor of shape {shape} is larger than its storage of {numbers.size} numbers')
  steps = [stride * numbers.itemsize for stride in strides]
  return np.lib.stride_tricks.as_strided(numbers[offset:], shape, steps, writeable=False)


def scalar(dtype: np.dtype, content: bytes) -> Any:
  """Returns a NumPy scalar as a Python number."""
  return np.frombuffer(content, dtype, 1)[0].item()


def dtype(name: str, *_: Any) -> np.dtype:
  """Returns a numerical NumPy dtype."""
  if not isinstance(name, str) or len(name) > 8:
    raise ValueError('the name of a type of numbers is not a short string')
  found = np.dtype(name)
  if found.kind not in 'fiub':
    raise ValueError(f'a storage has the type {name!r}, which is refused')
  return found


def octets(text: str, encoding: str) -> bytes:
  """Returns bytes as pickle protocols before 3 encode them."""
  if not isinstance(text, str) or encoding != 'latin1':
    raise ValueError('bytes are not encoded as latin1')
  return text.encode('latin1')


TENSORS: Calls = {
  'collections.OrderedDict': lambda items=(): mapping(items),
  'builtins.set': lambda items=(): set(map(_key, items)),
  '__builtin__.set': lambda items=(): set(map(_key, items)),
  '_codecs.encode': octets,
  'torch._utils._rebuild_tensor_v2': tensor,
  'torch._utils._rebuild_parameter': lambda data, *_: data,
  'torch.storage._load_from_bytes': storage,
  'numpy.dtype': dtype,
  'numpy.core.multiarray.scalar': scalar,
  'numpy._core.multiarray.scalar': scalar,
}
