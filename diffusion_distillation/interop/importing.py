"""Imports models as the first stage of a workdir, to be sampled, measured and distilled like other stages."""

import dataclasses
import hashlib
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from diffusion_distillation import datasets
from diffusion_distillation.config import Config, choose, flatten
from diffusion_distillation.diffusion import times
from diffusion_distillation.errors import UserError
from diffusion_distillation.interop import diffusers, edm, google, lora, stable_diffusion
from diffusion_distillation.networks import conditioning
from diffusion_distillation.stages import own_companions, provenance, workdir
from diffusion_distillation.stages.model import StoredModel, read
from diffusion_distillation.stages.plan import plan
from diffusion_distillation.stages.provenance import Model
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system.checkpoints import digest
from diffusion_distillation.system.files import read_json


def from_google(config: Config, default: Config, path: pathlib.Path, into: pathlib.Path) -> Model:
  """Imports a checkpoint of the released code; see `interop/google.py`.

  A base becomes the stage 'base'; a student becomes the config's round with its number of steps. The file does not contain
  output, schedule and time input; they are taken from the config.

  Raises:
    UserError: the file is not valid, or the config does not describe it; nothing was written.
  """
  del default
  _check_trains_none(config, into)
  shape, num_classes = datasets.describe(datasets.Settings.of(config.dataset))
  stages = plan(config, shape, num_classes)
  checkpoint = google.read(path)
  stages = [stage for stage in stages if stage.method in ('denoising', 'progressive')]
  stage = _stage_for(checkpoint.num_sample_steps, stages, path)
  params = google.fit(checkpoint.ema_params, stage.abstract_params, path)
  origin = {'source': 'google', 'file': path.name, 'sha256': checkpoint.sha256}
  return _adopt(config, into, stage, params, origin)


def _check_trains_none(config: Config, into: pathlib.Path) -> None:
  """Raises UserError if the run of an imported model would train an autoencoder and a text encoder."""
  if own_companions.are_wanted(config):
    own_companions.check(into, config, is_imported=True)


def _stage_for(num_steps: int, stages: list[Stage], path: pathlib.Path) -> Stage:
  """Returns the one of `stages` that has the checkpoint's number of steps; for a base (`num_steps` 0), the first stage."""
  for stage in stages:
    if not num_steps or stage.num_steps == num_steps:
      return stage
  raise UserError(
    f'--checkpoint={path} was distilled to {num_steps} steps, but the stages of this config with the same method '
    f'have {", ".join(str(stage.num_steps) for stage in stages) or "none"}; see methods and '
    f'distill.start_steps={num_steps}'
  )


def from_workdir(config: Config, default: Config, path: pathlib.Path, into: pathlib.Path) -> Model:
  """Imports a stage of another run, `path` = WORKDIR/STAGE, with the same network, schedule and, for a student, steps.

  Raises:
    UserError: there is no finished stage, or it does not match the config; nothing was written.
  """
  if not (path / 'stage.json').is_file():
    raise UserError(f'--checkpoint={path} is not a stage of a run: there is no stage.json in it')
  found_in, stored = read_json(path / 'stage.json'), workdir.read_config(path.parent, default)
  if own_companions.are_wanted(stored):
    raise UserError(
      f'--checkpoint={path} was trained with an autoencoder and a text encoder of its run; import its folder, which contains '
      f'them: --source=model --checkpoint={path / "model"}, with autoencoder.num_updates=0 and text_encoder.num_updates=0'
    )
  _check_trains_none(config, into)
  planned = {stage.name: stage for stage in workdir.stored_plan(path.parent, stored)}
  theirs = choose(f'--checkpoint={path}: stage', path.name, planned)
  shape, num_classes = datasets.describe(datasets.Settings.of(config.dataset))
  is_base = theirs.method == 'denoising'
  stages = [stage for stage in plan(config, shape, num_classes) if stage.method == theirs.method]
  named = [stage for stage in stages if stage.name == theirs.name]
  stage = _stage_for(0 if is_base else theirs.num_steps, named or stages, path)
  found, wanted = (dict(flatten(provenance.describe(s))) for s in (theirs, stage))
  for key in wanted:
    if found.get(key) != wanted[key]:
      raise UserError(
        f'--checkpoint={path}: its {key} is {found.get(key)}, but the config says {wanted[key]}'
      )
  model = provenance.load_model(path.parent, theirs, stored)
  if model is None or not found_in.get('finished'):
    raise UserError(f'--checkpoint={path} is not finished; train it to its end first')
  origin = {'source': 'workdir', 'file': str(path), 'sha256': model.digest}
  made = provenance.to_stored(path.parent, model, stored).provenance
  return _adopt(config, into, stage, jax.device_get(model.params), origin, made=made)


def from_model(config: Config, default: Config, path: pathlib.Path, into: pathlib.Path) -> Model:
  """Imports the model folder of a finished stage as the stage 'base', regardless of the config's network.

  Raises:
    UserError: there is no model, or the config does not fit it; nothing was written.
    DamagedError: the folder was changed after it was written.
  """
  del default
  return adopt_stored(config, into, read(path), {'source': 'model', 'folder': str(path)})


def from_diffusers(config: Config, default: Config, path: pathlib.Path, into: pathlib.Path) -> Model:
  """Imports a folder that diffusers saved as the stage 'base', regardless of the config's network; see `interop/diffusers.py`.

  It is sampled in `distill.start_steps` steps; NCSN++, as EDM's models are.

  Raises:
    UserError: there is no model, or it is not supported; nothing was written.
  """
  del default
  stored = diffusers.read(path, config.distill.start_steps)
  return adopt_stored(config, into, stored, {'source': 'diffusers', 'folder': str(path)})


def from_stable_diffusion(
  config: Config,
  default: Config,
  path: pathlib.Path,
  into: pathlib.Path,
  adapter: pathlib.Path | None = None,
  scale: float = 1.0,
) -> Model:
  """Imports a folder of Stable Diffusion as the stage 'base', with its autoencoder and text encoder beside the U-Net.

  It is sampled in `distill.start_steps` steps; see `interop/stable_diffusion.py`. If `adapter` names a file of low-rank adapters,
  they are merged into the U-Net, multiplied by `scale`; see `interop/lora.py`.

  Raises:
    UserError: there is no such model, or it is not supported; nothing was written.
  """
  del default
  stored = stable_diffusion.read(path, config.distill.start_steps)
  made: dict[str, Any] = {'source': 'stable_diffusion', 'folder': str(path)}
  if adapter is not None:
    stored = dataclasses.replace(stored, params=lora.merged(adapter, stored.params, scale))
    made['lora'] = {'file': adapter.name, 'scale': scale}
    made['lora']['sha256'] = hashlib.sha256(adapter.read_bytes()).hexdigest()
  return adopt_stored(config, into, stored, made)


def from_edm(config: Config, default: Config, path: pathlib.Path, into: pathlib.Path) -> Model:
  """Imports one of NVIDIA's EDM models as the stage 'base', regardless of the config's network; see `interop/edm.py`.

  Raises:
    UserError: the file is not such a model, or the config does not fit it; nothing was written.
  """
  del default
  made = {'source': 'edm', 'file': path.name, 'folder': str(path.parent)}
  return adopt_stored(config, into, edm.read(path), made)


def adopt_stored(config: Config, into: pathlib.Path, stored: StoredModel, made: dict[str, str]) -> Model:
  """Makes an imported model the stage 'base' of a new workdir.

  Args:
    config: the config of the new run; it need not describe the model.
    into: the workdir.
    stored: the model.
    made: the source of the model, with its `folder` or `file`; the model's digest is added.

  Raises:
    UserError: the config does not fit the model, or there is already a base; nothing was written.
  """
  _check_trains_none(config, into)
  try:
    times.make_grid(stored.times, stored.num_steps, stored.schedule)
  except ValueError as error:
    raise UserError(f'distill.start_steps={stored.num_steps}: {error}') from error
  classes = conditioning.classes(stored.denoise.conditioning)
  origin = workdir.origin_of(stored)
  stage = plan(config, stored.image_shape, classes.count if classes else 0, origin)[0]
  made = {**made, 'sha256': digest(stored.params)}
  return _adopt(
    config, into, stage, stored.params, made, stored.class_names, stored.provenance, stored.label_counts
  )


def _adopt(
  config: Config,
  into: pathlib.Path,
  stage: Stage,
  params: object,
  origin: dict[str, str],
  class_names: Sequence[str] = (),
  made: Mapping[str, Any] | None = None,
  label_counts: Sequence[int] = (),
) -> Model:
  with workdir.lock_workdir(into):
    if (into / stage.name).exists():
      raise UserError(f'{into / stage.name} already exists; import into another workdir, or remove it')
    workdir.claim(into, config)
    return provenance.adopt(into, stage, params, config, origin, class_names, made, label_counts)


READERS: dict[str, Callable[[Config, Config, pathlib.Path, pathlib.Path], Model]] = {
  'google': from_google,
  'workdir': from_workdir,
  'model': from_model,
  'diffusers': from_diffusers,
  'stable_diffusion': from_stable_diffusion,
  'edm': from_edm,
}
