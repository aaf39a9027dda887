"""Compilation: its options, and compiled programs that are kept on the disk from run to run."""

import dataclasses
import functools
import hashlib
import logging
import os
import pathlib
import platform
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import jax

from diffusion_distillation.config import POSITIVE, key

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class ComputeSection:
  """Precision, memory and compilation."""

  dtype: str = key(
    'float32',
    "Type of the network's activations; `bfloat16` is mixed precision, with float32 parameters.",
    choices=('float32', 'bfloat16'),
  )
  teacher_dtype: str = key(
    'float32',
    "Type in which the frozen teacher's parameters are kept.",
    choices=('float32', 'bfloat16'),
  )
  remat: bool = key(
    False,
    "Whether each block's activations are recomputed in the backward pass instead of being kept, which saves memory.",
  )
  attention: str = key(
    'xla',
    'What computes attention. `cudnn` is a fused kernel for GPUs; it needs `compute.dtype=bfloat16` and heads of at most '
    '128 channels.',
    choices=('xla', 'cudnn'),
  )
  updates_per_dispatch: int = key(
    1,
    'Number of updates per call of the compiled program; more than one pays off for small networks on fast devices. '
    '`log.every`, `log.health_every` and `checkpoint.every` must be multiples of it.',
    POSITIVE,
  )
  fast_cpu: bool = key(
    True,
    'On CPUs: whether programs are compiled with the options that were found to be the fastest, as far as this version of '
    "jaxlib has them: XLA's YNNPACK kernels, and less optimisation of the rest. `$XLA_FLAGS` takes precedence.",
  )
  cache: str = key(
    '',
    "Directory in which compiled programs are kept; if empty, the user's cache directory; `none` for no cache.",
    path='disk',
  )


# Options of the CPU's compiler. The kernels compute matrix products and convolutions on all cores: on several virtual devices
# they would compete with each other for the cores. The second group leaves out optimisation that takes a third of the
# compilation time and makes programs no faster.
_KERNELS = {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_DOT'}
_QUICK = {'xla_backend_optimization_level': '1', 'xla_llvm_disable_expensive_passes': 'True'}
_fast_cpu = True


def use(cache: str = '', fast_cpu: bool = True) -> None:
  """Sets how programs are compiled from now on, and where they are kept.

  Args:
    cache: directory in which jax keeps compiled programs; 'none': nowhere; '': the user's cache directory, unless
      $JAX_COMPILATION_CACHE_DIR names another. Programs for one machine's CPU are not found by another's.
    fast_cpu: whether `options` are used on CPUs.

  A directory that cannot be written is no error: it is told, and programs are not kept.
  """
  global _fast_cpu
  _fast_cpu = fast_cpu
  # The disk is full, or the cache gone: what is not kept is compiled again.
  warnings.filterwarnings('ignore', 'Error (reading|writing) persistent compilation cache')
  if cache == 'none':
    jax.config.update('jax_enable_compilation_cache', False)
  elif cache or not is_cached():
    base = pathlib.Path(cache).absolute() if cache else _of_the_user()
    if base is None or not _can_write(base):
      _tell_of_none(base)
    else:
      jax.config.update('jax_compilation_cache_dir', str(base / _machine()))


@functools.cache
def _tell_of_none(base: pathlib.Path | None) -> None:
  """Once."""
  where = base or "the user's cache directory (there is no $HOME)"
  _log.warning('compiled programs are not kept: %s cannot be written; see compute.cache', where)


def is_cached() -> bool:
  """Whether compiled programs are kept."""
  enabled = getattr(jax.config, 'jax_enable_compilation_cache', True)
  return bool(enabled and getattr(jax.config, 'jax_compilation_cache_dir', None))


def options() -> dict[str, str]:
  """The `compiler_options` of `jax.jit` for programs whose speed matters."""
  if not _fast_cpu or jax.default_backend() != 'cpu':
    return {}
  wanted = _QUICK | (_KERNELS if jax.local_device_count() == 1 else {})
  return {name: value for name, value in wanted.items() if _is_free(name, value)}


@functools.cache
def _is_free(name: str, value: str) -> bool:
  """Whether this jaxlib knows the option and its value, and $XLA_FLAGS does not set it."""
  try:
    jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
  except jax.errors.JaxRuntimeError:
    return False
  return name not in os.environ.get('XLA_FLAGS', '')


def jit(function: Callable[..., Any], **arguments: Any) -> Callable[..., Any]:
  """`jax.jit` of a module's function, with `options` as they are when it is first called."""

  @functools.cache
  def compiled() -> Callable[..., Any]:
    return jax.jit(function, compiler_options=options(), **arguments)

  @functools.wraps(function)
  def call(*args: Any) -> Any:
    return compiled()(*args)

  return call


def run_once(function: Callable[..., Any], *args: Any, **arguments: Any) -> Any:
  """`jax.jit(function, **arguments)(*args)`, without optimisation on CPUs, where that would take longer than it saves."""
  plain = {'xla_backend_optimization_level': '0', 'xla_llvm_disable_expensive_passes': 'True'}
  on_cpu = jax.default_backend() == 'cpu'
  return jax.jit(function, compiler_options=plain if on_cpu else {}, **arguments)(*args)


def _of_the_user() -> pathlib.Path | None:
  """The user's cache directory; None where there is no home."""
  base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  return pathlib.Path(base) / 'diffusion_distillation' / 'compiled' if os.path.isabs(base) else None


def _can_write(directory: pathlib.Path) -> bool:
  """Makes the directory if need be."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
      return True
  except OSError:
    return False


def _machine() -> str:
  """Of the processor and its instruction sets: one without some of them would end at the first."""
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.is_file() else []
  flags = next((line for line in lines if line.startswith(('flags', 'Features'))), platform.processor())
  return f'{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}'
