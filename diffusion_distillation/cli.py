"""The command line behind `command.py`: one function per mode. Errors become one line and an exit code."""

import contextlib
import errno
import json
import os
import pathlib
import sys
from collections.abc import Callable

import numpy as np

from diffusion_distillation import datasets
from diffusion_distillation.config import (
  Config,
  check_keys,
  check_numbers,
  choose,
  expand_paths,
  to_markdown,
)
from diffusion_distillation.datasets import preparing
from diffusion_distillation.diffusion import samplers
from diffusion_distillation.errors import Preempted, StorageError, UserError
from diffusion_distillation.evaluation import measure, pictures, sample_flags
from diffusion_distillation.evaluation.loading import LoadedModel, chosen_classes, load
from diffusion_distillation.interop import exporting, importing
from diffusion_distillation.options import Options
from diffusion_distillation.run import replay, tracking
from diffusion_distillation.run import run as run_module
from diffusion_distillation.serving import page
from diffusion_distillation.stages import comparison, provenance, workdir
from diffusion_distillation.stages.model import StoredModel
from diffusion_distillation.stages.parts import make_sampler
from diffusion_distillation.stages.provenance import Model
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system import (
  cluster,
  compilation,
  files,
  interrupts,
  platforms,
  sharding,
)


def run(options: Options) -> int:
  """Runs the mode and returns the exit code."""
  interrupts.install()
  try:
    return leave_quietly(_run(options))
  except BrokenPipeError:  # the reader of the output has exited, as with `| head`
    return leave_quietly(Preempted.exit_code if options.mode == 'train' else 0, unread=True)
  finally:
    interrupts.uninstall()


def leave_quietly(code: int, unread: bool = False) -> int:
  """Flushes stdout and stderr. If their reader has exited, drops this and all later output instead of raising an error."""
  for stream in (sys.stdout, sys.stderr):
    try:
      stream.flush()
    except BrokenPipeError:
      unread = True
  for stream in (sys.stdout, sys.stderr) if unread else ():
    with contextlib.suppress(OSError):  # the stream is not a file, as in a notebook
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
  return code


def _run(options: Options) -> int:
  try:
    options = options.on_disk()
    if options.rest:
      raise UserError(f'unexpected arguments {list(options.rest)}; flags begin with --')
    _join(options)
    if options.mode not in _WITHOUT_DEVICES:
      platforms.start()
    MODES[options.mode](options)
  except UserError as error:
    return _fail(str(error), error.exit_code)
  except BrokenPipeError:
    raise
  except OSError as error:
    workdir = None if options.workdir is None else pathlib.Path(options.workdir)
    if (gone := _vanished(error, workdir)) is not None:
      message = f'{gone} has vanished; restore it, and run the same command again'
      return _fail(message, StorageError.exit_code)
    if error.errno not in _OF_THE_DISK:
      return _fail(str(error), UserError.exit_code)
    where = error.filename or options.workdir or 'the output'
    advice = 'free up space or repair the disk, and run the same command again'
    return _fail(f'{where}: {error.strerror}; {advice}', StorageError.exit_code)
  return 0


# Errors of a disk that is full, read-only, broken, gone, or over its quota.
_OF_THE_DISK = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.ESTALE, errno.EDQUOT)


def _vanished(error: OSError, workdir: pathlib.Path | None) -> pathlib.Path | None:
  """Returns the directory in the workdir that no longer exists, if that caused the error; else None."""
  if error.errno != errno.ENOENT or error.filename is None or workdir is None:
    return None
  directory = pathlib.Path(error.filename).parent
  return directory if workdir in directory.parents and not directory.exists() else None


def _fail(message: str, code: int) -> int:
  with contextlib.suppress(BrokenPipeError):
    print(f'error: {message}', file=sys.stderr)
  cluster.leave(code)
  return code


def _join(options: Options) -> None:
  """Connects to the other processes of the run."""
  given = (options.coordinator, options.num_processes, options.process_id)
  if options.mode in ('train', 'evaluate', 'sample'):
    cluster.start(*given, timeout=options.peer_timeout)
  elif any(value is not None for value in given) and (options.num_processes != 1 or options.process_id):
    raise UserError(
      f'--mode={options.mode} runs in one process; remove --coordinator, --num_processes and --process_id'
    )


def _config(options: Options) -> Config:
  if options.config is None:
    raise UserError(f'--mode={options.mode} needs --config, such as --config=digits')
  config = options.config
  check_keys(config, options.default)
  expand_paths(config)
  compilation.use(config.compute.cache, config.compute.fast_cpu)
  return config


def _stored_config(options: Options, directory: pathlib.Path) -> Config:
  """Returns the config that the workdir was made with."""
  config = workdir.read_config(directory, options.default)
  expand_paths(config)
  compilation.use(config.compute.cache, config.compute.fast_cpu)
  return config


def _workdir(options: Options) -> pathlib.Path:
  if options.workdir is None:
    raise UserError(f'--mode={options.mode} needs --workdir, the directory of the run')
  return pathlib.Path(options.workdir)


def _prepare(options: Options) -> None:
  config = _config(options)
  check_numbers(config)
  dataset = config.dataset
  broken = preparing.prepare(datasets.Settings.of(dataset), dataset.workers)
  skipped = ', '.join(f'{count} of {role}' for role, count in broken.items())
  print(f'{dataset.prepared}: prepared; images skipped: {skipped}')


def _train(options: Options) -> None:
  config, directory = _config(options), _workdir(options)
  with sharding.laid_out(**config.mesh):
    run_module.run(config, directory)


def _plan(options: Options) -> None:
  config, directory = _config(options), _workdir(options)
  with sharding.laid_out(**config.mesh):
    run_module.show_plan(config, directory)


def _import(options: Options) -> None:
  directory = _workdir(options)
  if options.source is None:
    raise UserError(f'--mode=import needs --source, one of {", ".join(importing.READERS)}')
  source = choose('--source', options.source, importing.READERS)
  if options.checkpoint is None:
    raise UserError('--mode=import needs --checkpoint, the file or directory to read')
  model = source(_config(options), options.default, pathlib.Path(options.checkpoint), directory)
  print(
    f'{directory / model.stage.name}: imported, for {model.stage.num_steps} steps, '
    f'digest {model.digest[:12]}'
  )


def _export(options: Options) -> None:
  if flag := options.given(_OF_SAMPLING):
    raise UserError(f'--{flag} only applies to --mode=sample: a stage is exported with its own settings')
  compilation.use()
  print(exporting.export(_workdir(options), options.stage, options.out, options.format))


def _sample(options: Options) -> None:
  out, directory = pictures.check_out(options.out, options.num_samples), _workdir(options)
  if options.sampler is not None:
    choose('--sampler', options.sampler, samplers.SAMPLERS)
  if options.gamma is not None and options.sampler != 'ancestral':
    raise UserError('--gamma only applies to --sampler=ancestral')
  stored, settings = _stored_model(options, directory)
  sampler = options.sampler or stored.sampler
  clip_x = stored.clip_x if options.clip_x is None else options.clip_x
  gamma = settings.gamma if options.gamma is None else options.gamma
  step = make_sampler(sampler, gamma)
  grid = sample_flags.grid(stored, options.times, options.steps, options.grid)
  chosen = chosen_classes(stored, options.classes)
  guidance = sample_flags.guidance(stored, options.guidance or 0.0, options.guidance_interval, chosen)
  draw = LoadedModel(stored).drawer(step, clip_x, settings.batch_size, guidance)
  images = draw.draw(stored.params, grid, options.num_samples, options.seed, chosen, 'sample')
  if not files.writes():
    return
  cond = draw.cond(np.arange(options.num_samples), options.seed, chosen)
  pictures.save(out, images, None if cond is None else cond.get('label'))
  steps, calls, made = len(grid) - 1, guidance.calls(step, grid, stored.schedule), stored.provenance
  updates = 'an unknown number of' if made.get('updates') is None else made['updates']
  print(
    f'{out.path}: {options.num_samples} images of {made.get("stage", directory.name)} in {steps} {sampler} '
    f'step{"s" * (steps > 1)}, {calls} network call{"s" * (calls > 1)} each ({updates} updates)'
  )


def _stored_model(options: Options, directory: pathlib.Path) -> tuple[StoredModel, Config]:
  """Returns the model to sample from, and the section `evaluation` of the config to sample it with."""
  if (directory / 'config.json').is_file():
    config = _stored_config(options, directory)
    return _model_of_workdir(options, directory, config), config.evaluation
  if options.stage is not None or options.weights != 'ema':
    raise UserError('--stage and --weights need the --workdir of a run, not the folder of a model')
  compilation.use()
  return load(directory).stored, options.default.evaluation


def _model_of_workdir(options: Options, directory: pathlib.Path, config: Config) -> StoredModel:
  """Returns the requested stage, or by default the last one with a checkpoint, with the requested weights."""
  planned = {stage.name: stage for stage in workdir.stored_plan(directory, config)}
  if options.stage is not None and options.stage not in planned:
    raise UserError(f'--stage={options.stage} is not one of {", ".join(planned)}')
  names = [options.stage] if options.stage else [*reversed(planned)]
  if options.weights == tracking.BEST:
    return tracking.read_best(directory, names)
  for name in names:
    model = provenance.load_model(directory, planned[name], config, (options.weights,))
    if model is not None:
      return provenance.to_stored(directory, model.use(options.weights), config)
  raise UserError(f'--workdir={directory}: no complete checkpoint of {options.stage or "any stage"} yet')


def _replay(options: Options) -> None:
  directory = _workdir(options)
  if options.stage is None or options.step is None:
    raise UserError(
      '--mode=replay needs --stage and --step, which the message about a skipped update contains'
    )
  config = _stored_config(options, directory)
  with sharding.laid_out(**config.mesh):
    found = replay.replay(config, directory, options.stage, options.step)
  print(f'{replay.told(found)}; details are in {directory / options.stage / "nonfinite.json"}')


def _released(directory: pathlib.Path, stage: Stage, config: Config) -> Model | None:
  """Returns a stage's verified model, whose weights are loaded again when needed; None without a complete checkpoint."""
  model = provenance.load_model(directory, stage, config, stage.weights[:-1])
  return None if model is None else provenance.release(directory, model, ())


def _evaluate(options: Options) -> None:
  directory = _workdir(options)
  stored = _stored_config(options, directory)
  config = stored
  if options.config is not None:
    config = _config(options)
    check_numbers(config)
    comparison.check_config(directory / 'config.json', json.loads(stored.to_json()), config)
  planned, images = workdir.plan_for(directory, config)
  if images is None:
    raise UserError('--mode=evaluate needs images to compare with: dataset.name=none has none')
  with workdir.lock_workdir(directory):
    found = [_released(directory, stage, config) for stage in planned]
    models = [model for model in found if model is not None]
    if found[0] is None:
      raise UserError(f'--workdir={directory}: no complete checkpoint of {planned[0].name} yet')
    measure.evaluate(config, models, images, directory, again=True)
  if files.writes():
    print(directory / 'results.json')


def _serve(options: Options) -> None:
  directory = _workdir(options)
  if flag := options.given(('stage', *_OF_SAMPLING)):
    raise UserError(f'--{flag} does not apply to --mode=serve: set it on the page instead')
  if (directory / 'config.json').is_file():
    _stored_config(options, directory)
  else:
    compilation.use()
  page.serve(directory, options.port)


def _keys(options: Options) -> None:
  """Prints docs/configuration.md."""
  del options
  print(_ABOUT_KEYS + to_markdown())


_ABOUT_KEYS = """# Configuration

Every key of a config, with its default in [configs/default.py](../configs/default.py). A config such as
[configs/digits.py](../configs/digits.py) changes some of the defaults, and the command line overrides both:
`--config.train.batch_size=64`. Tuples are written as in Python: `--config.distill.num_updates='(50_000,100_000)'`.

This page is the output of `python main.py --mode=keys`.

"""


_GUIDANCE = ('guidance', 'guidance_interval')
_OF_SAMPLING = (
  *('weights', 'sampler', 'steps', 'grid', 'times', 'classes'),
  *(*_GUIDANCE, 'clip_x', 'gamma'),
)
_WITHOUT_DEVICES = ('prepare', 'keys')

MODES: dict[str, Callable[[Options], None]] = {
  'train': _train,
  'prepare': _prepare,
  'plan': _plan,
  'import': _import,
  'sample': _sample,
  'export': _export,
  'evaluate': _evaluate,
  'replay': _replay,
  'serve': _serve,
  'keys': _keys,
}
