"""Starting jax's devices, with one line in place of whatever a driver or plugin raises."""

import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
from types import ModuleType

import jax

from diffusion_distillation.errors import UserError

_INSTALL = {'cuda': 'cuda13', 'gpu': 'cuda13', 'tpu': 'tpu'}  # the extra of jax, by the platform's name


def start() -> None:
  """Starts the devices of $JAX_PLATFORMS, or the best that there are.

  Raises:
    UserError: they cannot be started; with what this jax has, and what to install.
  """
  try:
    jax.local_device_count()
  except Exception as error:  # whatever a plugin's driver makes it raise
    wanted = _wanted()
    names = [name.strip() for name in wanted.split(',') if name.strip()]
    text = str(error).partition('(set JAX_PLATFORMS')[0]
    said = ' '.join(text.split())[:200] or type(error).__name__
    advice = [
      f'for {name}: pip install "jax[{_INSTALL[name]}]"' for name in names if name in _INSTALL
    ] + ['unset JAX_PLATFORMS to take what there is, or JAX_PLATFORMS=cpu']
    asked = f'JAX_PLATFORMS={wanted}: ' if wanted else ''
    raise UserError(
      f'{asked}jax cannot start its devices ({said}); this jax has {", ".join(installed())}; '
      + '; '.join(advice)
    ) from error


def _wanted() -> str:
  return getattr(jax.config, 'jax_platforms', None) or os.environ.get('JAX_PLATFORMS', '')


def installed() -> list[str]:
  """The platforms that this jax has: 'cpu', and those of its plugins."""
  plugins = {entry.name for entry in importlib.metadata.entry_points(group='jax_plugins')}
  plugins |= {found.name for found in pkgutil.iter_modules(_plugin_folders())}
  if importlib.util.find_spec('libtpu') is not None:
    plugins.add('tpu')
  return ['cpu', *sorted(name.removeprefix('xla_') for name in plugins)]


def _plugin_folders() -> list[str]:
  try:
    plugins: ModuleType = importlib.import_module('jax_plugins')
  except ImportError:
    return []
  return list(plugins.__path__)
