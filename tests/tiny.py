"""A config so small that a whole run takes seconds, and main.py as a user runs it, or without its process."""

import contextlib
import dataclasses
import io
import logging
import os
import pathlib
import shutil
import subprocess
import sys
from unittest import mock

from absl.testing import flagsaver

# Tests compile much and compute little; the older code generator for loops takes half of the time.
FAST_COMPILE = (
  '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true '
  '--xla_cpu_use_fusion_emitters=false'
)

ROOT = pathlib.Path(__file__).parent.parent

OVERRIDES = {
  'model.ch': 8,
  'model.emb_ch': 16,
  'model.ch_mult': (1,),
  'model.attn_resolutions': (),
  'model.num_groups': 4,
  'train.num_updates': 12,
  'train.batch_size': 16,
  'train.learning_rate': 1e-3,
  'train.decay': 'none',
  'train.ema_decay': (0.999,),
  'time.stratified': False,
  'distill.start_steps': 4,
  'distill.factor': (2,),
  'distill.num_updates': (8,),
  'distill.batch_size': 16,
  'distill.learning_rate': (3e-4,),
  'checkpoint.every': 5,
  'log.every': 4,
  'log.measured_updates': 1,
  'log.health_every': 0,
  'log.seconds': 0.0,
  'evaluation.num_samples': 48,
  'evaluation.tolerance': 0.0,
  'evaluation.batch_size': 32,
  'evaluation.samplers': ('ddim', 'ancestral'),
}


def config(**overrides):
  """The tiny config; dots in names are written as two underscores."""
  from configs import digits  # not before conftest.py has set jax's flags

  c = digits.get_config()
  c.update_from_flattened_dict(OVERRIDES | {k.replace('__', '.'): v for k, v in overrides.items()})
  return c


def plan(**overrides):
  """The stages of the tiny config, in a workdir that is not there, and the training images."""
  from diffusion_distillation.stages import workdir as workdirs  # as above

  return workdirs.plan_for(ROOT / 'nowhere', config(**overrides))


def colour_digits(settings, role):
  """The digits in three equal channels, under another name: a data set of one's own."""
  from diffusion_distillation import datasets

  grey = datasets.SOURCES['digits'](dataclasses.replace(settings, name='digits', channels=None), role)
  pixels = grey.images.repeat(3, axis=-1)
  return dataclasses.replace(grey, name=settings.name, image_shape=(8, 8, 3), images=pixels)


def flags(**overrides):
  """The tiny config as flags for main.py; each key once."""
  given = OVERRIDES | {key.replace('__', '.'): value for key, value in overrides.items()}
  values = {key: str(value).replace(' ', '') for key, value in given.items()}
  return ['--config=configs/digits.py', *(f'--config.{key}={value}' for key, value in values.items())]


def with_extractor(workdir, finished):
  """Makes a workdir with the extractor of a finished run of the same dataset."""
  workdir.mkdir()
  shutil.copy(finished / 'extractor.safetensors', workdir)
  return workdir


def start_main(*args, devices=None, **popen):
  """main.py in its own process, on a number of virtual devices; None for as many as it takes by itself."""
  count = '' if devices is None else f'--xla_force_host_platform_device_count={devices} '
  environment = os.environ | {'XLA_FLAGS': count + FAST_COMPILE}
  command = [sys.executable, 'main.py', *map(str, args)]
  pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
  return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes | popen)


def run_main(*args, devices=None):
  """Runs main.py to its end; returns (exit code, stdout, stderr)."""
  process = start_main(*args, devices=devices)
  out, err = process.communicate(timeout=900)  # a guard against hanging, not a speed
  return process.returncode, out, err


def run_cli(*args):
  """The same without a process: flags and modes of main.py here, on the devices of this process."""
  from diffusion_distillation import command
  from diffusion_distillation.system import checkpoints

  argv, out, err = ['main.py', *map(str, args)], io.StringIO(), io.StringIO()
  warnings = logging.StreamHandler(err)
  logging.root.addHandler(warnings)
  try:
    with (
      contextlib.chdir(ROOT),
      contextlib.redirect_stdout(out),
      contextlib.redirect_stderr(err),
      flagsaver.flagsaver(),
      mock.patch.object(sys, 'argv', argv),  # where overrides of the config are looked for
      mock.patch.object(checkpoints, 'silence_background_errors'),
    ):
      command.run(command.parse_flags(argv))
  except SystemExit as end:
    return end.code, out.getvalue(), err.getvalue()
  finally:
    logging.root.removeHandler(warnings)
