"""What `main.py` calls: one function a mode, and errors as one line and an exit code."""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Sequence

import numpy as np
from absl import flags

from diffusion_distillation import (
  datasets,
  forecast,
  importing,
  interrupts,
  samplers,
  sharding,
  stages,
  times,
  train,
  workdir,
)
from diffusion_distillation.checkpoints import read_json
from diffusion_distillation.configuration import Config, check_keys, choose
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import measure, pictures


@dataclasses.dataclass(frozen=True)
class Options:
  """The command line; see `main.py` for the meaning of each flag."""

  mode: str
  config: Config | None
  default: Config
  workdir: pathlib.Path
  stage: str | None = None
  weights: str = 'ema'
  num_samples: int = 64
  seed: int = 0
  sampler: str = 'ddim'
  gamma: float | None = None
  clip_x: bool | None = None
  steps: int | None = None
  grid: str = 'uniform'
  times: Sequence[str] = ()
  classes: Sequence[str] = ()
  out: pathlib.Path | None = None
  source: str | None = None
  checkpoint: pathlib.Path | None = None
  rest: Sequence[str] = ()


def parse_flags(argv: list[str]) -> list[str]:
  """absl's parser, except that a bad config or override is one line and exit code 2."""
  try:
    # Warnings only, unless asked: --verbosity=0 shows all that orbax and jax have to say.
    rest = flags.FLAGS([argv[0], '--verbosity=-1', *argv[1:]])
    getattr(flags.FLAGS['config'].value, 'items', None)  # raises if the file could not be loaded
    return rest
  except Exception as error:
    before, traceback, lines = str(error).partition('Traceback')
    text = f'{before} {lines.strip().splitlines()[-1]}' if traceback else before
    print(f'error: {" ".join(text.split())}', file=sys.stderr)
    sys.exit(UserError.exit_code)


def run(options: Options) -> int:
  """Carries the mode out; returns the exit code."""
  interrupts.install()
  try:
    if options.rest:
      raise UserError(f'unexpected arguments {list(options.rest)}; flags begin with --')
    MODES[options.mode](options)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    return error.exit_code
  except OSError as error:
    print(f'error: {error}', file=sys.stderr)
    return UserError.exit_code
  return 0


def _config(options: Options) -> Config:
  if options.config is None:
    raise UserError(f'--mode={options.mode} needs --config, such as --config=configs/digits.py')
  check_keys(options.config, options.default)
  return options.config


def _train(options: Options) -> None:
  train.run(_config(options), options.workdir)


def _plan(options: Options) -> None:
  config = _config(options)
  stored = options.workdir / 'config.json'
  if stored.exists():
    workdir.check_config(stored, read_json(stored), config)
  described = datasets.describe(config.dataset.name, config.dataset.image_size)
  planned = workdir.cut(options.workdir, stages.plan(config, *described))
  train.check_batches(config)
  finished = {stage.name for stage in planned if workdir.is_finished(options.workdir, stage)}
  forecast.show(planned, finished, sharding.compile_step(train.train_step), config)


def _import(options: Options) -> None:
  if options.source is None:
    raise UserError(f'--mode=import needs --source, one of {", ".join(importing.SOURCES)}')
  source = choose('--source', options.source, importing.SOURCES)
  if options.checkpoint is None:
    raise UserError('--mode=import needs --checkpoint, the file or directory to read')
  model = source(_config(options), options.default, options.checkpoint, options.workdir)
  print(
    f'{options.workdir / model.stage.name}: imported, for {model.stage.num_steps} steps, '
    f'digest {model.digest[:12]}'
  )


def _sample(options: Options) -> None:
  out = pictures.check_out(options.out)
  config = workdir.read_config(options.workdir, options.default)
  choose('--sampler', options.sampler, samplers.SAMPLERS)
  if options.gamma is not None and options.sampler != 'ancestral':
    raise UserError('--gamma is of ancestral sampling: give --sampler=ancestral, too')
  given = {'gamma': options.gamma, 'clip_x': options.clip_x}
  config.evaluation.update({key: value for key, value in given.items() if value is not None})
  model = _choose_stage(options, config).use(options.weights)
  draw = measure.drawer(config, model.stage, options.sampler)
  grid, classes = _grid(options, model.stage.num_steps), _classes(options, model.stage)
  images = draw.draw(model.params, grid, options.num_samples, options.seed, classes)
  pictures.save(out, images, draw.labels(np.arange(options.num_samples), classes))
  steps = len(grid) - 1
  print(
    f'{out}: {options.num_samples} images of {model.stage.name} in {steps} {options.sampler} steps, '
    f'{steps * draw.sampler.calls_per_step} network calls each '
    f'({model.step} of {model.stage.num_updates} updates)'
  )


def _grid(options: Options, num_steps: int) -> np.ndarray:
  """The times to sample at: those given, or equal steps."""
  if options.times and options.steps:
    raise UserError('give --steps or --times, not both')
  try:
    if options.times:
      return times.grid([float(t) for t in options.times])
    return times.GRIDS[options.grid](options.steps or num_steps)
  except ValueError as error:
    raise UserError(f'--times={",".join(options.times)}: {error}, such as 0,0.25,1') from error


def _classes(options: Options, stage: stages.Stage) -> list[int]:
  """The classes to draw in turn; none for a balanced draw of all."""
  num_classes = stage.denoise.network.num_classes
  given = list(options.classes)
  if given and not num_classes:
    raise UserError(f'--classes={",".join(given)}: stage {stage.name} is of an unconditional model')
  if not all(c.isdecimal() and int(c) < num_classes for c in given):
    raise UserError(f'--classes={",".join(given)}: classes are whole numbers, 0 to {num_classes - 1}')
  return [int(c) for c in given]


def _choose_stage(options: Options, config: Config) -> workdir.Model:
  """The stage that was asked for, or the last that is there."""
  planned = {stage.name: stage for stage in workdir.stored_plan(options.workdir, config)}
  if options.stage is not None and options.stage not in planned:
    raise UserError(f'--stage={options.stage} is not one of {", ".join(planned)}')
  for name in [options.stage] if options.stage else reversed(planned):
    model = workdir.load_model(options.workdir, planned[name], config)
    if model is not None:
      return model
  raise UserError(
    f'--workdir={options.workdir}: no whole checkpoint of {options.stage or "any stage"} yet'
  )


def _evaluate(options: Options) -> None:
  stored = workdir.read_config(options.workdir, options.default)
  config = stored
  if options.config is not None:
    config = _config(options)
    workdir.check_config(options.workdir / 'config.json', json.loads(stored.to_json()), config)
  planned, images = workdir.plan_for(options.workdir, config)
  with workdir.lock_workdir(options.workdir):
    found = [workdir.load_model(options.workdir, stage, config) for stage in planned]
    models = [model for model in found if model is not None]
    if found[0] is None:
      raise UserError(f'--workdir={options.workdir}: no whole checkpoint of {planned[0].name} yet')
    measure.evaluate(config, models, images, options.workdir, again=True)
  print(options.workdir / 'results.json')


MODES: dict[str, Callable[[Options], None]] = {
  'train': _train,
  'plan': _plan,
  'import': _import,
  'sample': _sample,
  'evaluate': _evaluate,
}
