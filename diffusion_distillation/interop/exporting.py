"""Exports a finished stage as a folder that can be used without this package."""

import contextlib
import os
import pathlib
import shutil
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from diffusion_distillation import paths
from diffusion_distillation.config import choose
from diffusion_distillation.diffusion import samplers, times
from diffusion_distillation.errors import StorageError, UserError
from diffusion_distillation.evaluation import pictures, sampling
from diffusion_distillation.evaluation.loading import LoadedModel, load
from diffusion_distillation.evaluation.sampling import Drawer
from diffusion_distillation.interop import (
  diffusers_writer,
  lora_writer,
  model_card,
  onnx_writer,
  stable_diffusion_writer,
  stablehlo,
)
from diffusion_distillation.networks import conditioning
from diffusion_distillation.stages import model, model_folders
from diffusion_distillation.stages.model import StoredModel
from diffusion_distillation.system import files, interrupts
from diffusion_distillation.training.state import Params

SEED = 0  # seed of the images that are compared and shown
BATCHES = (16, 3)  # the two batch sizes at which the exported program is checked


class Format(NamedTuple):
  """A format that models are exported to.

  Attributes:
    write: receives the model and its sampler as a drawer, the weights of the network, the times (N + 1,) and the folder to
      write to; returns a function that draws with the files that were written, see `stablehlo.Draw`.
    library: name of the library on the Hugging Face hub, for the model card.
    files: name and meaning of each file.
    usage: receives the description of the model; returns instructions for running the files, in Markdown.
    tolerance: fraction of values that may differ from the model's by at most one level; a single value always may.
    conditions: the conditions that the files take.
  """

  write: Callable[[Drawer, Params, np.ndarray, pathlib.Path], stablehlo.Draw]
  library: str
  files: Mapping[str, str]
  usage: Callable[[Mapping[str, Any]], str]
  tolerance: float = 1e-3  # rounding of float32
  conditions: tuple[str, ...] = ('label',)


FORMATS: dict[str, Format] = {
  'jax': Format(
    *(stablehlo.write, 'jax', stablehlo.FILES, stablehlo.usage),
    conditions=('label', conditioning.WEIGHT),
  ),
  'diffusers': Format(
    diffusers_writer.write, 'diffusers', diffusers_writer.FILES, diffusers_writer.usage
  ),
  'onnx': Format(onnx_writer.write, 'onnx', onnx_writer.FILES, onnx_writer.usage, onnx_writer.TOLERANCE),
}


class TextFormat(NamedTuple):
  """A format that models of texts are exported to.

  Attributes:
    write: receives the model and the folder to write to; compares what was written with the model, and raises StorageError if
      they differ.
    library, files, usage: see `Format`.
  """

  write: Callable[[StoredModel, pathlib.Path], None]
  library: str
  files: Mapping[str, str]
  usage: Callable[[Mapping[str, Any]], str]


OF_TEXTS: dict[str, TextFormat] = {
  'diffusers': TextFormat(
    stable_diffusion_writer.write,
    'diffusers',
    stable_diffusion_writer.FILES,
    stable_diffusion_writer.usage,
  )
}


# Formats of a single file: each receives the folder of the model and the file to write, and returns a line about it.
OF_FILES: dict[str, Callable[[pathlib.Path, str | os.PathLike[str] | None], str]] = {
  'lora': lora_writer.export
}


def _format(name: str, stored: StoredModel) -> Format | TextFormat:
  """Returns the format of this name for a model; raises UserError if the format does not support its conditions."""
  to = choose('--format', name, FORMATS)
  of_texts = conditioning.takes_text(stored.denoise.conditioning)
  if of_texts and name in OF_TEXTS:
    return OF_TEXTS[name]
  if unknown := sorted(set(stored.denoise.conditioning) - set(to.conditions)):
    able = [name for name, other in FORMATS.items() if unknown[0] in other.conditions]
    able = list(OF_TEXTS) if of_texts else able
    raise UserError(
      f'--format={name} cannot export this model: it takes {("text" if of_texts else unknown[0])!r} as an input, which '
      + (f'only --format={able[0]} supports' if able else 'no format supports')
    )
  return to


def export(
  workdir: pathlib.Path, stage: str | None, out: str | os.PathLike[str] | None, format: str = 'jax'
) -> str:
  """Writes the folder `out` atomically, after checking that the exported files draw the same images as the model.

  Args:
    workdir: a workdir, the directory of a stage, or the folder of a model.
    stage: name of a stage of the workdir; by default, the last finished stage of its plan.
    out: a folder that does not exist yet, or is empty; for a format in OF_FILES, a file that does not exist yet.
    format: a name in FORMATS or OF_FILES.

  Returns:
    A line that says what was written.

  Raises:
    UserError: there is no finished stage, no such format, or `out` is not writable; nothing was written.
    StorageError: the files draw other images than the model; nothing was kept.
  """
  choose('--format', format, FORMATS | OF_FILES)
  if format in OF_FILES:
    return OF_FILES[format](find(workdir, stage), out)
  into = check_out(out)
  folder = find(workdir, stage)
  loaded = load(folder)
  to = _format(format, loaded.stored)
  temporary = into.with_name(f'.{into.name}.tmp')
  made = [parent for parent in into.parents if not parent.exists()]
  shutil.rmtree(temporary, ignore_errors=True)

  def discard() -> None:
    shutil.rmtree(temporary, ignore_errors=True)
    for parent in made:
      with contextlib.suppress(OSError):
        parent.rmdir()

  try:
    with interrupts.cleaning(discard):
      temporary.mkdir(parents=True)
      _write(to, loaded, folder, temporary)
      os.replace(temporary, into)
  except BaseException:
    discard()
    raise
  stored = loaded.stored
  calls = samplers.SAMPLERS[stored.sampler]().calls(stored.num_steps)
  name = stored.provenance.get('stage', folder.name)
  line = f'{into}: {name} exported as {format}, {calls} network call{"s" * (calls > 1)} per image'
  what = 'weights, timesteps and tokens are' if isinstance(to, TextFormat) else 'images agree with'
  return f"{line}; its {what} the model's"


def check_out(out: str | os.PathLike[str] | None) -> pathlib.Path:
  """Returns the folder to write; raises UserError unless it is empty or does not exist."""
  if not out:
    raise UserError('--mode=export needs --out, the folder to write')
  path = paths.on_disk('--out', out).resolve()  # a link stays; what it points to is written
  if path.is_dir() and any(path.iterdir()):
    raise UserError(f'--out={out} is not empty; name a new folder')
  if path.exists() and not path.is_dir():
    raise UserError(f'--out={out} is a file; name a new folder')
  there = next(parent for parent in path.parents if parent.exists())
  if not there.is_dir() or not os.access(there, os.W_OK):
    raise UserError(f'--out={out}: {there} is not a writable directory')
  return path


def find(workdir: pathlib.Path, stage: str | None) -> pathlib.Path:
  """Returns the folder of the model; raises UserError if the given stage is not finished."""
  if stage is None:
    return model_folders.find(workdir)
  found = sorted(path.parent.parent.name for path in workdir.glob(f'*/model/{model.DESCRIPTION}'))
  if stage not in found:
    raise UserError(
      f'--stage={stage}: --workdir={workdir} has no finished stage of that name; finished are: {", ".join(found) or "none"}'
    )
  return workdir / stage / 'model'


def _write(
  to: Format | TextFormat, loaded: LoadedModel, folder: pathlib.Path, into: pathlib.Path
) -> None:
  if isinstance(to, TextFormat):
    to.write(loaded.stored, into)
  else:
    _write_and_draw(to, loaded, into)
  description = without_paths(files.read_json(folder / model.DESCRIPTION))
  files.write_json(into / model.DESCRIPTION, description)
  card = model_card.render(description, to, _dataset(folder, loaded.stored.provenance))
  (into / 'README.md').write_text(card, encoding='utf-8')


def _write_and_draw(to: Format, loaded: LoadedModel, into: pathlib.Path) -> None:
  stored, count = loaded.stored, BATCHES[0]
  drawer = loaded.drawer(samplers.SAMPLERS[stored.sampler](), stored.clip_x, count)
  grid = times.make_grid(stored.times, stored.num_steps, stored.schedule)
  draw = to.write(drawer, stored.params, grid, into)
  images = _compare(draw, drawer, loaded.sample(count, SEED), to.tolerance)
  sheet = pictures.to_pil(pictures.grid(pictures.enlarge(images, 32), 4))
  sheet.save(into / 'samples.png')


def _dataset(folder: pathlib.Path, made: Mapping[str, Any]) -> str | None:
  """Returns the name of the dataset of a model's run; None if it was moved out of its workdir, or trained elsewhere."""
  if made.get('imported'):
    return None
  config = folder.parent.parent / 'config.json'
  if not (folder.parent / 'stage.json').is_file() or not config.is_file():
    return None
  name = files.read_json(config).get('dataset', {}).get('name')
  return None if name in (None, 'none') else str(name)


def _compare(draw: stablehlo.Draw, drawer: Drawer, expected: np.ndarray, tolerance: float) -> np.ndarray:
  """Returns the images (n, H, W, C) that the files draw at the first batch size; raises StorageError if any images differ."""
  index = np.arange(len(expected), dtype=np.int32)
  z, keys = sampling.noise(drawer, np.int32(SEED), index)  # type: ignore[arg-type]
  noise, data, cond = np.asarray(z), np.asarray(jax.random.key_data(keys)), drawer.cond(index, SEED)
  labels = None if cond is None else np.asarray(cond['label'])
  drawn = [draw(noise[:n], data[:n], None if labels is None else labels[:n]) for n in BATCHES]
  for images in drawn:
    off = np.abs(images.astype(int) - expected[: len(images)])
    if off.max() > 1 or np.count_nonzero(off) > max(1, tolerance * off.size):
      raise StorageError(
        f'the exported files draw other images than the model (at a batch size of {len(images)}, {np.mean(off > 0):.2%} of '
        f'the values differ, by up to {off.max()} of 255); nothing was kept. GPUs and TPUs round products: export on the '
        'CPU, with JAX_PLATFORMS=cpu'
      )
  return drawn[0]


def without_paths(value: Any) -> Any:
  """Shortens absolute paths in JSON to their last part, so that it contains no details of the machine."""
  if isinstance(value, dict):
    return {key: without_paths(part) for key, part in value.items()}
  if isinstance(value, list):
    return [without_paths(part) for part in value]
  is_path = isinstance(value, str) and pathlib.PurePath(value).is_absolute()
  return pathlib.PurePath(value).name if is_path else value
