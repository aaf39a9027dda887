"""Compiled programs, kept on the disk from run to run."""

import hashlib
import os
import pathlib
import platform

import jax


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
