"""What `main.py` calls: one function a mode, and errors as one line and an exit code."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable

import numpy as np
from absl import flags

from diffusion_distillation import interrupts, train, workdir
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import measure, pictures
from diffusion_distillation.stages import Config, check_keys


@dataclasses.dataclass(frozen=True)
class Options:
  """The command line."""

  mode: str
  config: Config | None
  default: Config
  workdir: pathlib.Path
  stage: str | None
  num_samples: int
  seed: int
  out: pathlib.Path | None
  rest: list[str]


def parse_flags(argv: list[str]) -> list[str]:
  """absl's parser, except that a bad config or override is one line and exit code 2."""
  try:
    # Warnings only, unless asked: --verbosity=0 shows all that orbax and jax have to say.
    rest = flags.FLAGS([argv[0], '--verbosity=-1', *argv[1:]])
    getattr(flags.FLAGS['config'].value, 'items', None)  # raises if the file could not be loaded
    return rest
  except Exception as error:
    text = ' '.join(str(error).split())
    print(f'error: {text}', file=sys.stderr)
    sys.exit(UserError.exit_code)


def run(options: Options) -> int:
  """Carries the mode out; returns the exit code."""
  interrupts.install()
  try:
    if options.rest:
      raise UserError(f'unexpected arguments {options.rest}; flags begin with --')
    MODES[options.mode](options)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return error.exit_code
  except OSError as error:
    print(f'error: {error}', file=sys.stderr)
    return UserError.exit_code
  return 0


def _train(options: Options) -> None:
  if options.config is None:
    raise UserError('--mode=train needs --config, such as --config=configs/digits.py')
  check_keys(options.config, options.default)
  train.run(options.config, options.workdir)


def _sample(options: Options) -> None:
  out = pictures.check_out(options.out)
  config = workdir.read_config(options.workdir, options.default)
  model = _choose_stage(options, config)
  draw = measure.drawer(config, model, 'ddim')
  images = draw.draw(model.params, model.stage.num_steps, options.num_samples, options.seed)
  pictures.save(out, images, draw.labels(np.arange(options.num_samples)))
  print(
    f'{out}: {options.num_samples} images of {model.stage.name} in {model.stage.num_steps} steps '
    f'({model.step} of {model.stage.num_updates} updates)'
  )


def _choose_stage(options: Options, config: Config) -> workdir.Model:
  """The stage that was asked for, or the last that is there."""
  stages = {stage.name: stage for stage in workdir.stored_plan(options.workdir, config)}
  if options.stage is not None and options.stage not in stages:
    raise UserError(f'--stage={options.stage} is not one of {", ".join(stages)}')
  for name in [options.stage] if options.stage else reversed(stages):
    model = workdir.load_model(options.workdir, stages[name], config)
    if model is not None:
      return model
  raise UserError(
    f'--workdir={options.workdir}: no whole checkpoint of {options.stage or "any stage"} yet'
  )


def _evaluate(options: Options) -> None:
  stored = workdir.read_config(options.workdir, options.default)
  config = stored
  if options.config is not None:
    check_keys(options.config, options.default)
    config = options.config
    workdir.check_config(options.workdir / 'config.json', json.loads(stored.to_json()), config)
  stages, images = workdir.plan_for(config)
  with workdir.lock_workdir(options.workdir):
    found = [workdir.load_model(options.workdir, stage, config) for stage in stages]
    models = [model for model in found if model is not None]
    if found[0] is None:
      raise UserError(f'--workdir={options.workdir}: no whole checkpoint of {stages[0].name} yet')
    measure.evaluate(config, models, images, options.workdir, again=True)
  print(options.workdir / 'results.json')


MODES: dict[str, Callable[[Options], None]] = {
  'train': _train,
  'sample': _sample,
  'evaluate': _evaluate,
}
