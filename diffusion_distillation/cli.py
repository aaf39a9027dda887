"""What `main.py` calls: one function a mode, and errors as one line and an exit code."""

import dataclasses
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
  return 0


def _train(options: Options) -> None:
  if options.config is None:
    raise UserError('--mode=train needs --config, such as --config=configs/digits.py')
  train.run(_checked(options.config, options), options.workdir)


def _sample(options: Options) -> None:
  out = pictures.check_out(options.out)
  config = _checked(workdir.read_config(options.workdir), options)
  model = _choose_stage(_models(config, options.workdir), options.stage)
  draw = measure.drawer(config, model, 'ddim')
  images = draw.draw(model.params, model.stage.num_steps, options.num_samples, options.seed)
  pictures.save(out, images, draw.labels(np.arange(options.num_samples)))
  print(
    f'{out}: {options.num_samples} images of {model.stage.name} in {model.stage.num_steps} steps '
    f'({model.step} of {model.stage.num_updates} updates)'
  )


def _evaluate(options: Options) -> None:
  config = _checked(workdir.read_config(options.workdir), options)
  if options.config is not None:
    config = _checked(options.config, options)
  with workdir.open_workdir(options.workdir, config):
    models = _models(config, options.workdir)
    _, images = workdir.plan_for(config)
    measure.evaluate(config, models, images, options.workdir, again=True)
  print(options.workdir / 'results.json')


def _checked(config: Config, options: Options) -> Config:
  check_keys(config, options.default)
  return config


def _models(config: Config, path: pathlib.Path) -> list[workdir.Model]:
  stages, _ = workdir.plan_for(config)
  found = [workdir.load_model(path, stage) for stage in stages]
  models = [model for model in found if model is not None]
  if found[0] is None:
    raise UserError(f'--workdir={path} holds no checkpoint of {stages[0].name} yet')
  return models


def _choose_stage(models: list[workdir.Model], name: str | None) -> workdir.Model:
  by_name = {model.stage.name: model for model in models}
  if name is None:
    return models[-1]
  if name not in by_name:
    raise UserError(f'--stage={name} is not there; the workdir has {", ".join(by_name)}')
  return by_name[name]


MODES: dict[str, Callable[[Options], None]] = {
  'train': _train,
  'sample': _sample,
  'evaluate': _evaluate,
}
