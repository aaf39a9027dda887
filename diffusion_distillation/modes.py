"""One function per mode of the command line."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from diffusion_distillation import datasets, paths
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
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import (
  comparing,
  elsewhere,
  feature_files,
  given_images,
  pictures,
  sample_flags,
)
from diffusion_distillation.evaluation.loading import (
  LoadedModel,
  batch_size,
  check_negative,
  chosen_classes,
  load,
  read_guiding,
  with_texts,
)
from diffusion_distillation.evaluation.prompted import Prompted
from diffusion_distillation.interop import exporting, importing
from diffusion_distillation.options import Options
from diffusion_distillation.run import compared, encoded_texts, evaluating, replay, tracking
from diffusion_distillation.run import run as run_module
from diffusion_distillation.serving import page
from diffusion_distillation.stages import comparison, plan_checks, provenance, workdir
from diffusion_distillation.stages.model import StoredModel
from diffusion_distillation.stages.parts import make_sampler
from diffusion_distillation.system import files, platforms, sharding


def _given_config(options: Options) -> Config:
  """Returns the config of the command line, without starting the devices."""
  if options.config is None:
    raise UserError(f'--mode={options.mode} needs --config, such as --config=digits')
  config = options.config
  check_keys(config, options.default)
  expand_paths(config)
  return config


def _config(options: Options) -> Config:
  config = _given_config(options)
  platforms.set_up(config)
  return config


def _stored_config(options: Options, directory: pathlib.Path) -> Config:
  """Returns the config that the workdir was made with."""
  config = workdir.read_config(directory, options.default)
  expand_paths(config)
  platforms.set_up(config)
  return config


def _workdir(options: Options) -> pathlib.Path:
  if options.workdir is None:
    raise UserError(f'--mode={options.mode} needs --workdir, the directory of the run')
  return pathlib.Path(options.workdir)


def _prepare(options: Options) -> None:
  config = _given_config(options)
  check_numbers(config)
  dataset = config.dataset
  if options.workdir is not None and _encode(config, _workdir(options)):
    return
  if dataset.name == datasets.PROMPTS:
    raise UserError(
      '--mode=prepare with dataset.name=prompts needs --workdir, whose imported model encodes the prompts'
    )
  broken = preparing.prepare(datasets.Settings.of(dataset), dataset.workers)
  skipped = ', '.join(f'{count} of {role}' for role, count in broken.items())
  print(f'{dataset.prepared}: prepared; images skipped: {skipped}')


def _encode(config: Config, directory: pathlib.Path) -> bool:
  """Encodes the texts of a run, and images with them, if its model takes texts; returns whether it does."""
  captions = workdir.open_captions(directory, config)
  if captions is None:
    return False
  platforms.set_up(config)
  found = encoded_texts.prepare(config, directory, captions)
  if files.writes():
    print(
      f'{found.folder}: {len(found):,} {"images and captions" if found.x_shape else "texts"} prepared'
    )
  return True


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
  adapted: dict[str, Any] = {}
  if options.lora is not None:
    if options.source != 'stable_diffusion':
      raise UserError('--lora only applies to --source=stable_diffusion')
    adapted = {'adapter': paths.on_disk('--lora', options.lora), 'scale': options.lora_scale}
  if options.checkpoint is None:
    raise UserError('--mode=import needs --checkpoint, the file or directory to read')
  checkpoint = pathlib.Path(options.checkpoint)
  model = source(_config(options), options.default, checkpoint, directory, **adapted)
  print(
    f'{directory / model.stage.name}: imported, for {model.stage.num_steps} steps, '
    f'digest {model.digest[:12]}'
  )


def _export(options: Options) -> None:
  if flag := options.given(_OF_SAMPLING):
    raise UserError(f'--{flag} only applies to --mode=sample: a stage is exported with its own settings')
  platforms.set_up()
  print(exporting.export(_workdir(options), options.stage, options.out, options.format))


def _sample(options: Options) -> None:
  count = options.num_samples or len(options.prompts) or 64
  out, directory = pictures.check_out(options.out, count), _workdir(options)
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
  by_model = options.guiding_model is not None
  guidance = sample_flags.guidance(stored, options.guidance, options.guidance_interval, chosen, by_model)
  guiding = read_guiding(stored, '--guiding_model', options.guiding_model, guidance)
  if options.negative_prompt is not None:
    check_negative(stored, bool(guidance), by_model, '--negative_prompt', '--guidance')
  chosen = with_texts(stored, chosen, options.prompts, bool(guidance), options.negative_prompt)
  size = batch_size(stored, settings.batch_size, count)
  draw = LoadedModel(stored).drawer(step, clip_x, size, guidance, guiding)
  images = draw.draw(stored.params, grid, count, options.seed, chosen, 'sample')
  if not files.writes():
    return
  cond = draw.cond(np.arange(count), options.seed, chosen)
  pictures.save(out, images, None if cond is None else cond.get('label'))
  steps, calls, made = len(grid) - 1, draw.calls(grid), stored.provenance
  updates = 'an unknown number of' if made.get('updates') is None else made['updates']
  print(
    f'{out.path}: {count} images of {made.get("stage", directory.name)} in {steps} {sampler} '
    f'step{"s" * (steps > 1)}, {calls} network call{"s" * (calls > 1)} each ({updates} updates)'
  )


def _stored_model(options: Options, directory: pathlib.Path) -> tuple[StoredModel, Config]:
  """Returns the model to sample from, and the section `evaluation` of the config to sample it with."""
  if (directory / 'config.json').is_file():
    config = _stored_config(options, directory)
    return _model_of_workdir(options, directory, config), config.evaluation
  if options.stage is not None or options.weights != 'ema':
    raise UserError('--stage and --weights need the --workdir of a run, not the folder of a model')
  platforms.set_up()
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
  print(
    f'{replay.describe_findings(found)}; details are in {directory / options.stage / "nonfinite.json"}'
  )


def _evaluate(options: Options) -> None:
  out = elsewhere.check_out(options.out)
  if options.images is not None:
    given = given_images.open_images(options.images)
    own = options.workdir is None and options.config is not None
    config = _checked_config(options) if own else _config_of_run(options, _workdir(options))
    directory = None if options.workdir is None else pathlib.Path(options.workdir)
    asked = _prompted(config)
    if asked is not None and asked.clip is None:
      raise UserError('evaluation.prompts applies to --images only with evaluation.clip=FOLDER')
    return _show_measured(*elsewhere.measure_images(config, given, directory, out, asked))
  directory = _workdir(options)
  if (directory / 'model.json').is_file():
    if options.config is None:
      raise UserError(
        f'--workdir={directory} is the folder of a model; name --config, whose dataset its samples are compared with'
      )
    config = _checked_config(options)
    asked = _prompted(config)
    return _show_measured(*elsewhere.measure_model(config, load(directory), directory, out, asked))
  if out is not None:
    raise UserError(
      f'--out={out} only applies to --images and to the folder of a model; a run writes results.json'
    )
  path = evaluating.evaluate(_config_of_run(options, directory), directory)
  if files.writes():
    print(path)


def _prompted(config: Config) -> Prompted | None:
  """Returns the prompts and the CLIP model that the config names; None if it names no prompts."""
  section = config.evaluation
  if section.prompts:
    return compared.read(config)
  if section.clip:
    raise UserError(
      f'evaluation.clip={section.clip} needs evaluation.prompts=FILE, one prompt for each image'
    )
  return None


def _checked_config(options: Options) -> Config:
  config = _config(options)
  check_numbers(config)
  plan_checks.check_measuring(config)
  return config


def _config_of_run(options: Options, directory: pathlib.Path) -> Config:
  """Returns the config to evaluate a run with: its own, or the given one if only such keys differ as may change."""
  stored = _stored_config(options, directory)
  if options.config is None:
    return stored
  config = _checked_config(options)
  comparison.check_config(directory / 'config.json', json.loads(stored.to_json()), config)
  return config


def _show_measured(results: dict[str, Any], path: pathlib.Path) -> None:
  if files.writes():
    print(f'{elsewhere.table(results)}\n{path}')


def _compare(options: Options) -> None:
  if options.workdir is not None:
    raise UserError(
      '--mode=compare takes --workdirs=A,B, the directories of the runs, instead of --workdir'
    )
  print(comparing.compare(options.workdirs, options.default, options.out))


def _features(options: Options) -> None:
  platforms.set_up()
  print(feature_files.write(options.images, options.inception, options.out))


def _serve(options: Options) -> None:
  directory = _workdir(options)
  set_on_page = [flag for flag in ('stage', *_OF_SAMPLING) if flag != 'guiding_model']
  if flag := options.given(set_on_page):
    raise UserError(f'--{flag} does not apply to --mode=serve: set it on the page instead')
  if (directory / 'config.json').is_file():
    _stored_config(options, directory)
  else:
    platforms.set_up()
  page.serve(directory, options.port, options.guiding_model)


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


_GUIDANCE = ('guidance', 'guidance_interval', 'guiding_model')
_OF_SAMPLING = (
  *('weights', 'sampler', 'steps', 'grid', 'times', 'classes', 'prompts'),
  'negative_prompt',
  *(*_GUIDANCE, 'clip_x', 'gamma'),
)
MODES: dict[str, Callable[[Options], None]] = {
  'train': _train,
  'prepare': _prepare,
  'plan': _plan,
  'import': _import,
  'sample': _sample,
  'export': _export,
  'evaluate': _evaluate,
  'features': _features,
  'replay': _replay,
  'compare': _compare,
  'serve': _serve,
  'keys': _keys,
}
