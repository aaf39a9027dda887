"""Compiler options, and the on-disk cache of compiled programs."""

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

from diffusion_distillation.config import NOT_NEGATIVE, POSITIVE, key

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
    "Type in which the frozen teacher's parameters are kept. Parameters that a student's adapters change (`lora.rank`) are always float32.",
    choices=('float32', 'bfloat16'),
  )
  remat: bool = key(
    False,
    "Whether each block's activations are recomputed in the backward pass instead of being kept, which saves memory.",
  )
  attention: str = key(
    'xla',
    'Implementation of attention. `cudnn` is a fused kernel for GPUs; it needs `compute.dtype=bfloat16` and heads of at '
    'most 128 channels.',
    choices=('xla', 'cudnn'),
  )
  updates_per_dispatch: int = key(
    1,
    'Number of updates per call of the compiled program; more than one pays off for small networks on fast devices. '
    '`log.every`, `log.health_every`, `log.frechet_every` and `checkpoint.every` must be multiples of it.',
    POSITIVE,
  )
  device_gb: float = key(
    0.0,
    'Memory in GB of the devices that `--mode=plan` plans for: it names the smallest number of them that each stage fits, with '
    "`mesh.fsdp` and `micro_batches`, and measures no times; 0: this machine's devices.",
    NOT_NEGATIVE,
  )
  fast_cpu: bool = key(
    True,
    'Whether a CPU with several cores becomes two devices, if all training batches are even and `mesh` is the default; on one device, '
    "programs use XLA's YNNPACK kernels instead, if this version of jaxlib has them. Programs are also optimized less, which "
    'compiles faster and runs as fast. `$JAX_NUM_CPU_DEVICES` and `$XLA_FLAGS` take precedence.',
  )
  cache: str = key(
    '',
    "Directory in which compiled programs are cached; if empty, the user's cache directory; `none` for no cache.",
    path='disk',
  )


# Compiler options for CPUs. The kernels compute matrix products and sums on all cores; with several virtual devices, they
# would compete for the cores. Most convolutions are left to XLA's own, which are faster. The second group skips optimizations
# that take a third of the compilation time and do not make programs faster.
_KERNELS = {'xla_cpu_experimental_ynn_fusion_type': 'LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_REDUCE'}
_QUICK = {'xla_backend_optimization_level': '1', 'xla_llvm_disable_expensive_passes': 'True'}
# Without optimization, XLA's older emitters take less time than the default ones.
_ONCE = {
  'xla_backend_optimization_level': '0',
  'xla_llvm_disable_expensive_passes': 'True',
  'xla_cpu_use_fusion_emitters': 'False',
}
_fast_cpu = True


def use(cache: str = '', fast_cpu: bool = True) -> None:
  """Sets how programs are compiled from now on, and where they are cached.

  If the directory is not writable, a warning is logged and programs are not cached.

  Args:
    cache: directory in which jax caches compiled programs; 'none' for no cache; '' for $JAX_COMPILATION_CACHE_DIR or else
      the user's cache directory. Each type of CPU has its own cache.
    fast_cpu: whether `options` are used on CPUs.
  """
  global _fast_cpu
  _fast_cpu = fast_cpu
  # If the disk is full or the cache is gone, programs are just compiled again.
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
  """Logs the warning only once."""
  where = base or "the user's cache directory (there is no $HOME)"
  _log.warning('compiled programs are not cached: cannot write to %s; see compute.cache', where)


def is_cached() -> bool:
  """Whether compiled programs are cached."""
  enabled = getattr(jax.config, 'jax_enable_compilation_cache', True)
  return bool(enabled and getattr(jax.config, 'jax_compilation_cache_dir', None))


def options() -> dict[str, str]:
  """Returns the `compiler_options` of `jax.jit` for programs whose speed matters."""
  if not _fast_cpu or jax.default_backend() != 'cpu':
    return {}
  return _free(_QUICK | (_KERNELS if jax.local_device_count() == 1 else {}))


def _free(wanted: dict[str, str]) -> dict[str, str]:
  """Returns those options that this jaxlib supports and $XLA_FLAGS does not set."""
  return {name: value for name, value in wanted.items() if _is_free(name, value)}


@functools.cache
def _is_free(name: str, value: str) -> bool:
  """Whether this jaxlib supports the option and its value, and $XLA_FLAGS does not set it."""
  try:
    jax.jit(lambda x: x, compiler_options={name: value}).lower(0.0).compile()
  except jax.errors.JaxRuntimeError:
    return False
  return name not in os.environ.get('XLA_FLAGS', '')


def jit(function: Callable[..., Any], **arguments: Any) -> Callable[..., Any]:
  """Like `jax.jit` for a module-level function; reads `options` at the first call."""

  @functools.cache
  def compiled() -> Callable[..., Any]:
    return jax.jit(function, compiler_options=options(), **arguments)

  @functools.wraps(function)
  def call(*args: Any) -> Any:
    return compiled()(*args)

  return call


def run_once(function: Callable[..., Any], *args: Any, **arguments: Any) -> Any:
  """Returns `jax.jit(function, **arguments)(*args)`, compiled without optimization on CPUs, as it is run only once."""
  on_cpu = jax.default_backend() == 'cpu'
  return jax.jit(function, compiler_options=_free(_ONCE) if on_cpu else {}, **arguments)(*args)


def _of_the_user() -> pathlib.Path | None:
  """Returns the user's cache directory, or None if there is no home directory."""
  base = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
  return pathlib.Path(base) / 'diffusion_distillation' / 'compiled' if os.path.isabs(base) else None


def _can_write(directory: pathlib.Path) -> bool:
  """Whether the directory is writable; creates it if necessary."""
  try:
    directory.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=directory):
      return True
  except OSError:
    return False


def _machine() -> str:
  """Identifies the processor and its instruction sets, because programs may not run on a processor that lacks some of them."""
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.is_file() else []
  flags = next((line for line in lines if line.startswith(('flags', 'Features'))), platform.processor())
  return f'{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}'
