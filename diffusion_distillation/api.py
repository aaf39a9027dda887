"""The Python interface to the command line: `get_config` loads a config by name, `train` runs it and returns its results."""

import inspect
import os
import runpy
from collections.abc import Callable, Mapping
from typing import Any

from diffusion_distillation import arguments, paths
from diffusion_distillation.config import Config, check_keys, check_known, expand_paths, flatten
from diffusion_distillation.errors import UserError
from diffusion_distillation.run.compared import is_measured
from diffusion_distillation.run.run import run
from diffusion_distillation.system import files, interrupts, platforms, sharding


def get_config(name: str, overrides: Mapping[str, Any] | None = None) -> Config:
  """Returns the config `name` with `overrides`, like `--config=NAME --config.KEY=VALUE` on the command line.

  Args:
    name: a config that comes with the library, such as 'digits', or the path of a config file.
    overrides: values by key, such as {'train.num_updates': 1000}; docs/configuration.md lists all keys.

  Raises:
    UserError: there is no such config, variant or key, or a value has the wrong type.
  """
  arguments.configs()  # makes `from configs import default` work in the file
  path, _, variant = arguments.find_config(name).partition(':')
  make: Callable[..., Config] | None = runpy.run_path(path).get('get_config')
  if make is None:
    raise UserError(f'{path} has no function get_config')
  if variant and not inspect.signature(make).parameters:
    raise UserError(f'{name}: the config has no variants')
  config = make(variant) if variant else make()
  given = dict(overrides or {})
  check_known(list(given), [key for key, _ in flatten(config)])
  for key, value in given.items():
    try:
      config.update_from_flattened_dict({key: value})
    except (TypeError, ValueError) as error:
      raise UserError(f'{key}={value!r} has the wrong type: {" ".join(str(error).split())}') from error
  return config


def train(config: Config, workdir: str | os.PathLike[str]) -> dict[str, Any]:
  """Trains, distills and evaluates, as `--mode=train` does; resumes an interrupted run, and keeps finished stages.

  It runs in one process. Plan and progress are printed on stderr. The first SIGINT (Ctrl-C, or interrupting a notebook's kernel)
  saves a checkpoint before it raises; a second one ends the process at once. A CPU becomes two devices of jax for the rest of the
  process, unless jax has been used before or the config rules it out; see docs/scaling.md.

  Args:
    config: the config of the run, for example from `get_config`; it is not changed.
    workdir: the directory of the run; docs/train.md lists the files in it.

  Returns:
    The contents of `results.json`; empty if nothing is measured: for datasets without images, such as `dataset.name=prompts`, without
    `evaluation.clip`.

  Raises:
    UserError: the config is not valid or does not match the workdir; raised before anything is written or compiled.
    Preempted: a signal stopped the run, and everything is saved; the same call resumes it.
    NumericalError: the loss or its gradient stayed non-finite.
  """
  directory = paths.on_disk('workdir', workdir)
  config = config.copy_and_resolve_references()
  check_keys(config, get_config('default'))
  expand_paths(config)
  platforms.set_up(config)
  interrupts.install()
  try:
    with interrupts.unsaved(), sharding.laid_out(**config.mesh):  # what the caller holds is not saved
      run(config, directory)
  finally:
    interrupts.uninstall()
  results = directory / 'results.json'
  return files.read_json(results) if is_measured(config) and results.is_file() else {}
