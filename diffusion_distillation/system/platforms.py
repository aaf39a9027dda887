"""Starts jax's devices, and reports errors of drivers and plugins in one line."""

import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
from types import ModuleType

import jax

from diffusion_distillation.errors import UserError

_INSTALL = {'cuda': 'cuda13', 'gpu': 'cuda13', 'tpu': 'tpu'}  # jax's extra for each platform


def start() -> None:
  """Starts the devices of $JAX_PLATFORMS, or else jax's default devices.

  Raises:
    UserError: the devices cannot be started; the message lists the installed platforms and what to install.
  """
  try:
    jax.local_device_count()
  except Exception as error:  # plugins and drivers may raise anything
    wanted = _wanted()
    names = [name.strip() for name in wanted.split(',') if name.strip()]
    text = str(error).partition('(set JAX_PLATFORMS')[0]
    said = ' '.join(text.split())[:200] or type(error).__name__
    advice = [
      f'for {name}: pip install "jax[{_INSTALL[name]}]"' for name in names if name in _INSTALL
    ] + ['unset JAX_PLATFORMS to use the default devices, or set JAX_PLATFORMS=cpu']
    asked = f'JAX_PLATFORMS={wanted}: ' if wanted else ''
    raise UserError(
      f'{asked}jax cannot start its devices ({said}); installed platforms: {", ".join(installed())}; '
      + '; '.join(advice)
    ) from error


def _wanted() -> str:
  return getattr(jax.config, 'jax_platforms', None) or os.environ.get('JAX_PLATFORMS', '')


def installed() -> list[str]:
  """Returns the platforms that jax has here: 'cpu', and one for each installed plugin."""
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
