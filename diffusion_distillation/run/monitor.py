"""Monitors the samples of a few-step student during training, to detect mode collapse.

stage_dir/health.json      the statistics of the data, for comparison with those of the samples in metrics.jsonl
stage_dir/denoisings.png   DMD: samples, noised samples, and their denoisings by the teacher and the fake score
"""

import contextlib
import dataclasses
import logging
import pathlib
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distillation.config import Config
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.process import diffuse
from diffusion_distillation.evaluation import measure, pictures
from diffusion_distillation.evaluation.features import load_or_train
from diffusion_distillation.evaluation.sampling import at_a_time
from diffusion_distillation.networks.conditioning import Cond, Texts
from diffusion_distillation.networks.denoiser import Bound
from diffusion_distillation.run.pairs import StoredPairs
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.stages.workdir import open_images
from diffusion_distillation.system import compilation, files, logs, sharding
from diffusion_distillation.system.files import write_json
from diffusion_distillation.training.recipe import Recipe
from diffusion_distillation.training.state import Params, TrainState

_log = logging.getLogger(__name__)

MOST_STEPS = (
  8  # students with more steps are not monitored: their samples cost too much, and they do not collapse
)
_SAMPLES = 256
_DECODED = 64  # samples of a student whose images a network decodes
_SIDE = 16  # of the images that stand for the features of large images
_TIMES = (0.3, 0.5, 0.7, 0.9)  # times of the noised samples in the picture
_KEPT = 0.9  # decay of the running loss per line of metrics

LEAST_DIVERSITY = 0.5  # a warning below it, after the first fifth of training: early one-step samples are all close to the mean
MOST_LAG = 2.0  # a warning above it


@dataclasses.dataclass(frozen=True)
class Figures:
  """Statistics of a set of images.

  Attributes:
    spread: square root of the trace of the features' covariance, or of half the mean squared distance of two images.
    brightness: mean pixel value, in [0, 1].
    saturation: mean of (largest - smallest) / largest channel, in [0, 1]; 0 for grey images.
  """

  spread: float
  brightness: float
  saturation: float

  @classmethod
  def of(cls, images: np.ndarray, extractor: Callable[[np.ndarray], np.ndarray]) -> 'Figures':
    """Computes the statistics of (n, H, W, C) uint8 images."""
    scaled = images.astype(np.float64) / 255.0
    largest, smallest = scaled.max(-1), scaled.min(-1)
    saturation = (largest - smallest) / np.maximum(largest, 1e-9)
    spread = np.sqrt(extractor(images).astype(np.float64).var(0).sum())
    return cls(float(spread), float(scaled.mean()), float(saturation.mean()))


class Monitor:
  """Checks a stage's samples at intervals during training.

  Args:
    config: the config of the run.
    stage: the stage in training.
    stage_dir: the directory of the stage.
    images: the training images, or an array of images (n, H, W, C) that stand for them; None if there are none, so that
      diversity is not measured.
    extractor: extracts the features that diversity is measured in.
    texts: the texts of the samples, if the student takes texts.
  """

  def __init__(
    self,
    config: Config,
    stage: Stage,
    stage_dir: pathlib.Path,
    images: Loader | np.ndarray | None,
    extractor: Callable[[np.ndarray], np.ndarray],
    texts: Texts | None = None,
  ) -> None:
    self._config, self._stage, self._stage_dir = config, stage, stage_dir
    self._extractor, self._texts = extractor, texts
    real = images if images is None or isinstance(images, np.ndarray) else _some(images)
    self.data = None if real is None else Figures.of(real, extractor)
    if self.data is not None:
      write_json(stage_dir / 'health.json', dataclasses.asdict(self.data))
    self._label_counts = measure.label_counts(config, stage_dir.parent)
    self._running: float | None = None
    self._warned: set[str] = set()

  def resume(self, done: int) -> None:
    """Restores the running loss at update `done` from metrics.jsonl."""
    self._running = None
    for line in logs.read(self._stage_dir / 'metrics.jsonl'):
      if line['step'] <= done and 'fake_loss' in line:
        self._running = _follow(self._running, line['fake_loss'])

  def due(self, done: int) -> bool:
    """Whether to check the samples after update `done`."""
    return done % self._config.log.health_every == 0 or done == self._stage.num_updates

  def look(self, state: TrainState, frozen: Mapping[str, Params]) -> dict[str, float]:
    """Draws samples and returns their `brightness`, their `saturation` and, if there are data, their `diversity` relative to them.

    Args:
      state: the training state.
      frozen: the parameters that updates only read, such as the teacher's, on the devices.
    """
    stage, config = self._stage, self._config
    draw = measure.drawer(config, stage, stage.sampler, self._label_counts)
    count = _SAMPLES
    if self._texts is not None:
      count = _DECODED
      size = at_a_time(stage.space, stage.image_shape, draw.batch_size, count)
      draw = dataclasses.replace(draw, texts=self._texts, batch_size=size)
    grid = times.uniform(stage.num_steps)
    params = _weights(stage.recipe, 'student', {**frozen, 'student': state.ema_params[0]})
    images = draw.draw(params, grid, count, config.evaluation.seed)
    if 'fake_score' in state.params:
      networks = {**frozen, 'fake_score': state.params['fake_score']}
      self._picture(networks, images[:8], draw.cond(np.arange(8), config.evaluation.seed))
    figures = Figures.of(images, self._extractor)
    found = {'brightness': figures.brightness, 'saturation': figures.saturation}
    if self.data is None:
      return found
    diversity = figures.spread / max(self.data.spread, 1e-12)
    begun = int(state.step) <= stage.num_updates / 5
    self._warn(
      'diversity',
      diversity < LEAST_DIVERSITY and not begun,
      f'the samples are only {diversity:.2f} times as diverse as the data',
    )
    return {'diversity': diversity, **found}

  def lag(self, values: Mapping[str, float]) -> dict[str, float]:
    """Returns `fake_score_lag`, the fake score's latest loss divided by its running loss, or {} if there is none yet."""
    fake_loss = values.get('fake_loss')
    if fake_loss is None:
      return {}
    before, self._running = self._running, _follow(self._running, fake_loss)
    if before is None:
      return {}
    lag = fake_loss / before
    self._warn(
      'lag', lag > MOST_LAG, f'the fake score lags behind: its loss is {lag:.1f} times its running loss'
    )
    return {'fake_score_lag': lag}

  def _warn(self, name: str, wrong: bool, text: str) -> None:
    """Logs a warning once, and again only if the problem disappeared in between."""
    if wrong and name not in self._warned:
      _log.warning('stage %s: %s', self._stage.name, text)
    (self._warned.add if wrong else self._warned.discard)(name)

  def _picture(self, params: Mapping[str, Params], images: np.ndarray, cond: Cond) -> None:
    """Writes denoisings.png: the samples, then for each time the noised samples and both networks' denoisings."""
    logsnr = self._stage.schedule(jnp.array(_TIMES))
    recipe, space = self._stage.recipe, self._stage.space
    teacher, fake_score = (
      Bound(recipe.networks[name], _weights(recipe, name, params)) for name in ('teacher', 'fake_score')
    )
    rows = _denoisings((teacher, fake_score), space.encode(jnp.asarray(images)), logsnr, cond)
    size = len(images)
    decoded = [sharding.to_host(space.decode(rows[k : k + size])) for k in range(0, len(rows), size)]
    sheet = np.concatenate([images, *decoded])
    if not files.writes():
      return
    picture = pictures.to_pil(pictures.grid(pictures.enlarge(sheet, 32), len(images)))
    temporary = self._stage_dir / 'denoisings.tmp'
    picture.save(temporary, format='png')
    temporary.replace(self._stage_dir / 'denoisings.png')


_merged = compilation.jit(Recipe.weights, static_argnums=1)


def _weights(recipe: Recipe, name: str, params: Mapping[str, Params]) -> Params:
  """Returns `recipe.weights(name, params)`, from one program if adapters are merged."""
  base = None if recipe.lora is None else recipe.lora.base_of(name)
  if base is None:
    return params[name]
  found = _merged(recipe, name, {key: params[key] for key in (name, base)})
  sharding.wait_on_cpu(found)
  return found


def watches(config: Config, stage: Stage) -> bool:
  """Whether a stage is monitored."""
  return bool(config.log.health_every) and stage.parent is not None and stage.num_steps <= MOST_STEPS


def _some(images: Loader) -> np.ndarray:
  """Returns some of the training images, (n, H, W, C) uint8."""
  chosen = np.random.Generator(np.random.Philox(0)).permutation(len(images))[:_SAMPLES]
  with contextlib.closing(images.in_order(len(chosen), chosen)) as batches:
    real = sharding.gather_batch(next(batches))
  found: np.ndarray = real['image'][real['mask']]
  return found


def _pixels(images: np.ndarray) -> np.ndarray:
  """Returns the colours of images (n, H, W, C) uint8 at a resolution of about 16x16, (n, D), in place of features."""
  height, width = (max(1, side // _SIDE) for side in images.shape[1:3])
  small = images[:, : images.shape[1] // height * height, : images.shape[2] // width * width]
  blocks = small.reshape(
    len(small), small.shape[1] // height, height, small.shape[2] // width, width, -1
  )
  return blocks.mean((2, 4)).reshape(len(small), -1) / 255.0


def begin_with_texts(
  stage: Stage, workdir: pathlib.Path, config: Config, texts: Texts, pairs: StoredPairs | None
) -> Monitor:
  """Creates the monitor of a student that takes texts; it is compared with the images of the stored pairs, if there are any."""
  (workdir / stage.name).mkdir(exist_ok=True)
  real = None
  if pairs is not None:
    some = pairs.read(np.arange(min(_DECODED, len(pairs))))['image']
    decode = stage.space.decode
    real = np.concatenate([sharding.to_host(decode(jnp.asarray(x)[None])) for x in some])
  return Monitor(config, stage, workdir / stage.name, real, _pixels, texts)


def begin(config: Config, stage: Stage, workdir: pathlib.Path, images: Loader) -> Monitor:
  """Creates the monitor of a stage; trains the workdir's feature extractor if it does not exist yet."""
  held_out = open_images(config, 'eval')
  extractor = load_or_train(workdir / 'extractor.safetensors', images, held_out)
  held_out.close()
  (workdir / stage.name).mkdir(exist_ok=True)
  return Monitor(config, stage, workdir / stage.name, images, extractor)


@jax.jit
def _denoisings(networks: tuple[Bound, Bound], x: jax.Array, logsnr: jax.Array, cond: Cond) -> jax.Array:
  """Returns (3 T n, ...), noised x, teacher's and fake score's denoisings of n examples x (n, ...) at each of T times."""
  eps = jax.random.normal(jax.random.key(0), x.shape)
  rows = []
  for at in logsnr:
    full = jnp.full(len(x), at)
    z = diffuse(x, eps, full)
    rows += [z, *(network(z, full, cond).x for network in networks)]
  return jnp.concatenate(rows)


def _follow(running: float | None, value: float) -> float:
  return value if running is None else _KEPT * running + (1.0 - _KEPT) * value
