"""Starts jax's devices, and reports errors of drivers and plugins in one line."""

import contextlib
import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
from types import ModuleType

import jax

from diffusion_distillation.config import Config
from diffusion_distillation.errors import UserError
from diffusion_distillation.system import compilation

CPU_DEVICES = 2  # the number of virtual devices of a CPU with at least as many cores
_FORCED = 'xla_force_host_platform_device_count'  # jax's older way to set the number of virtual devices
_INSTALL = {'cuda': 'cuda13', 'gpu': 'cuda13', 'tpu': 'tpu'}  # jax's extra for each platform


def set_up(config: Config | None = None) -> None:
  """Sets up the compiler and starts the devices, which must precede all other use of jax; see `start`."""
  if config is None:
    compilation.use()
  else:
    compilation.use(config.compute.cache, config.compute.fast_cpu)
  start(config)


def start(config: Config | None = None) -> None:
  """Starts the devices of $JAX_PLATFORMS, or else jax's default devices, unless they have been started.

  Without a config, or with one whose batches are even and whose mesh is the default, a CPU becomes two devices.

  Raises:
    UserError: the devices cannot be started; the message lists the installed platforms and what to install.
  """
  if config is None or _is_divisible(config):
    _divide_cpu()
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


def _divide_cpu() -> None:
  """Divides a CPU into virtual devices, which are faster than one device; docs/performance.md has the measurements.

  $JAX_NUM_CPU_DEVICES and $XLA_FLAGS take precedence, and the processes of a run with several have one device each.
  """
  given = getattr(jax.config, 'jax_num_cpu_devices', 0) >= 0
  if given or _FORCED in os.environ.get('XLA_FLAGS', '') or jax.distributed.is_initialized():
    return
  if (os.cpu_count() or 1) < CPU_DEVICES:
    return
  with contextlib.suppress(RuntimeError):  # the caller of the library has used jax before
    jax.config.update('jax_num_cpu_devices', CPU_DEVICES)


def _is_divisible(config: Config) -> bool:
  """Whether all batches can be split over the virtual devices, and neither the mesh nor `compute.fast_cpu` rules them out."""
  sections = [one for one in config.values() if isinstance(one, Config) and 'micro_batches' in one]
  is_plain = config.compute.fast_cpu and config.mesh.data == -1 and config.mesh.fsdp == 1
  return is_plain and not any(
    one.batch_size % (CPU_DEVICES * max(1, one.micro_batches)) for one in sections
  )


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
