"""What the report shows beside the rows: samples, the training images nearest to them, and what was seen during training."""

import contextlib
import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from diffusion_distillation.config import Config
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.diffusion.guidance import Guidance
from diffusion_distillation.evaluation import neighbours
from diffusion_distillation.evaluation.neighbours import Neighbours
from diffusion_distillation.evaluation.sampled_texts import SampledTexts
from diffusion_distillation.evaluation.sampling import Chosen
from diffusion_distillation.evaluation.yardstick import Yardstick
from diffusion_distillation.networks import conditioning
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.stages.provenance import Model
from diffusion_distillation.system import logs

SHOWN = 16  # number of images per stage in the report
_CLASSES = 10  # number of classes in a grid of classes by guidance
_TEXTS = 8  # number of texts in a grid of texts by model


class Measured(Protocol):
  """What was measured for a row: a model, its sampler, its number of steps and its guidance."""

  @property
  def model(self) -> Model: ...
  @property
  def sampler(self) -> str: ...
  @property
  def num_steps(self) -> int: ...
  @property
  def guidance(self) -> Guidance: ...


# Draws the first n images of a row, uint8, for the chosen conditions or as they were measured.
Draw = Callable[[Any, int, Chosen], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Watched:
  """What was recorded during a stage's training: the lines of its metrics.jsonl, and a picture as PNG or None."""

  lines: list[dict[str, float]]
  picture: bytes | None


@dataclasses.dataclass(frozen=True)
class ByGuidance:
  """Images of one model by class and guidance, those of a class from the same noise.

  Attributes:
    stage: the model.
    weights: the weights of guidance, ascending.
    labels: the classes.
    images: (classes, weights, H, W, C) uint8.
  """

  stage: str
  weights: tuple[float, ...]
  labels: tuple[int, ...]
  images: np.ndarray


@dataclasses.dataclass(frozen=True)
class ByText:
  """Images of every model by text, those of a text from the same noise.

  Attributes:
    texts: the texts.
    models: the stage, number of steps and guidance of each model.
    images: (texts, models, H, W, C) uint8.
  """

  texts: tuple[str, ...]
  models: tuple[str, ...]
  images: np.ndarray


@dataclasses.dataclass(frozen=True)
class ReportContents:
  """What the report shows beside the rows.

  Attributes:
    samples: images (SHOWN, H, W, C) uint8 of each stage by caption, all from the same noise.
    watched: what was recorded during the training of each stage.
    neighbours: samples with the nearest training images, or None.
    neighbours_of: the stage of these samples.
    by_guidance: images of each model that was measured with several weights of guidance.
    class_names: the names of the classes by label; empty if the images have none.
    by_text: images of models of texts; None for other models.
  """

  samples: dict[str, np.ndarray]
  watched: dict[str, Watched] = dataclasses.field(default_factory=dict)
  neighbours: Neighbours | None = None
  neighbours_of: str = ''
  by_guidance: tuple[ByGuidance, ...] = ()
  class_names: tuple[str, ...] = ()
  by_text: ByText | None = None


def watched(measured: Sequence[Measured], workdir: pathlib.Path) -> dict[str, Watched]:
  """Returns what was recorded about each measured stage during its training."""
  found = {}
  for name in dict.fromkeys(m.model.stage.name for m in measured):
    directory = workdir / name
    picture = directory / 'denoisings.png'
    lines = logs.read(directory / 'metrics.jsonl')
    found[name] = Watched(lines, picture.read_bytes() if picture.is_file() else None)
  return found


def own_rows(measured: Sequence[Measured]) -> dict[str, list[Any]]:
  """Returns, for each stage, what was measured at its own number of steps: one entry per guidance.

  The base may have been measured with several samplers; its own one is preferred, then the first.
  """
  at_own: dict[str, list[Any]] = {}
  for m in measured:
    if m.num_steps == m.model.stage.num_steps and m.model.weights == 'ema':
      at_own.setdefault(m.model.stage.name, []).append(m)
  found = {}
  for name, own in at_own.items():
    stage = own[0].model.stage
    sampler = stage.sampler if any(m.sampler == stage.sampler for m in own) else own[0].sampler
    found[name] = [m for m in own if m.sampler == sampler]
  return found


def samples(measured: Sequence[Measured], draw: Draw) -> dict[str, np.ndarray]:
  """Returns the first images of each stage by caption, with the first of its guidance weights."""
  shown = {}
  for name, own in own_rows(measured).items():
    steps = own[0].num_steps
    shown[f'{name}\n{steps} step{"s" * (steps > 1)}'] = draw(own[0], SHOWN, None)
  return shown


def by_guidance(measured: Sequence[Measured], draw: Draw) -> tuple[ByGuidance, ...]:
  """Returns images by class and guidance of each conditional model that was measured with several weights."""
  found = []
  for name, own in own_rows(measured).items():
    classes = conditioning.classes(own[0].model.stage.denoise.conditioning)
    by_weight = {m.guidance.weight: m for m in reversed(own)}
    if classes is not None and len(by_weight) > 1:
      labels, weights = tuple(range(min(classes.count, _CLASSES))), tuple(sorted(by_weight))
      images = [draw(by_weight[w], len(labels), {'label': labels}) for w in weights]
      found.append(ByGuidance(name, weights, labels, np.stack(images, axis=1)))
  return tuple(found)


def by_text(
  measured: Sequence[Measured], draw: Draw, texts: SampledTexts | None, seed: int
) -> ByText | None:
  """Returns the first images of each model with their texts, for each guidance; None without texts."""
  own = [m for found in own_rows(measured).values() for m in found]
  if texts is None or not own:
    return None
  images = np.stack([draw(m, SHOWN, None)[:_TEXTS] for m in own], axis=1)
  names = [
    f'{m.model.stage.name}, {m.num_steps} step{"s" * (m.num_steps > 1)}'
    + (f', guidance {m.guidance.weight:g}' if m.guidance else '')
    for m in own
  ]
  return ByText(tuple(texts.texts(np.arange(len(images)), seed)), tuple(names), images)


def _nearest(
  config: Config, drawn: Callable[[int], np.ndarray], by: Yardstick, train: Loader
) -> Neighbours | None:
  """Returns samples, of which `drawn` returns a number, with the training images nearest to them; None if none are looked for."""
  if by.searched is None:
    return None
  with contextlib.closing(train), contextlib.closing(workdirs.open_images(config, 'eval')) as held_out:
    return neighbours.find(drawn(neighbours.COMPARED), by.extractors.main, train, held_out, by.searched)


def gather(
  config: Config,
  measured: Sequence[Measured],
  draw: Draw,
  by: Yardstick,
  train: Loader | None,
  workdir: pathlib.Path,
  texts: SampledTexts | None = None,
) -> ReportContents:
  """Draws and reads what the report shows beside the rows.

  Args:
    config: the config of the run.
    measured: what the rows measured, in their order.
    draw: draws images of one of them.
    by: what they were measured by.
    train: the training images, closed afterwards; None for a dataset without images.
    workdir: the directory of the run.
    texts: what models of texts draw; None for other models.
  """
  own, near = own_rows(measured), None
  of = config.evaluation.neighbours_of or next(reversed(own), '')
  if train is not None and of in own:
    near = _nearest(config, lambda count: draw(own[of][0], count, None), by, train)
  return ReportContents(
    samples=samples(measured, draw),
    watched=watched(measured, workdir),
    neighbours=near,
    neighbours_of=of,
    by_guidance=by_guidance(measured, draw),
    class_names=() if train is None else tuple(train.images.classes),
    by_text=by_text(measured, draw, texts, config.evaluation.seed),
  )
