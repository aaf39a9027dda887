"""Compiled programs, kept on the disk from run to run."""

import dataclasses
import hashlib
import os
import pathlib
import platform

import jax

from diffusion_distillation.config import POSITIVE, key


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
  updates_per_dispatch: int = key(
    1,
    'Number of updates per call of the compiled program; more than one pays off for small networks on fast devices. '
    '`log.every`, `log.health_every` and `checkpoint.every` must be multiples of it.',
    POSITIVE,
  )
  cache: str = key(
    '',
    "Directory in which compiled programs are kept; if empty, the user's cache directory; `none` for no cache.",
  )


def keep(directory: str) -> None:
  """From now on jax keeps what it compiles in `directory`; 'none': nowhere; '': in the user's cache directory.

  $JAX_COMPILATION_CACHE_DIR goes before the user's. Programs for one machine's CPU are not found by another's.
  """
  if directory == 'none':
    jax.config.update('jax_enable_compilation_cache', False)
  elif directory or not getattr(jax.config, 'jax_compilation_cache_dir', None):
    base = pathlib.Path(directory) if directory else _of_the_user()
    jax.config.update('jax_compilation_cache_dir', str(base.absolute() / _machine()))


def _of_the_user() -> pathlib.Path:
  base = os.environ.get('XDG_CACHE_HOME') or pathlib.Path.home() / '.cache'
  return pathlib.Path(base) / 'diffusion_distillation' / 'compiled'


def _machine() -> str:
  """Of the processor and its instruction sets: one without some of them would end at the first."""
  info = pathlib.Path('/proc/cpuinfo')
  lines = info.read_text().splitlines() if info.is_file() else []
  flags = next((line for line in lines if line.startswith(('flags', 'Features'))), platform.processor())
  return f'{platform.machine()}-{hashlib.sha256(flags.encode()).hexdigest()[:8]}'
