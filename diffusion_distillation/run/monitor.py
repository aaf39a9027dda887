"""Monitors the samples of a few-step student during training, to detect mode collapse.

stage_dir/health.json      the statistics of the data, for comparison with those of the samples in metrics.jsonl
stage_dir/denoisings.png   DMD: samples, noised samples, and their denoisings by the teacher and the fake score
"""

import contextlib
import dataclasses
import functools
import logging
import pathlib
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distillation.config import Config
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.process import diffuse
from diffusion_distillation.evaluation import measure, pictures
from diffusion_distillation.evaluation.features import FeatureExtractor, load_or_train
from diffusion_distillation.networks.conditioning import Cond
from diffusion_distillation.networks.denoiser import Bound
from diffusion_distillation.networks.spaces import Space
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.stages.workdir import open_images
from diffusion_distillation.system import files, logs, sharding
from diffusion_distillation.system.files import write_json
from diffusion_distillation.training.state import Params, TrainState

_log = logging.getLogger(__name__)

MOST_STEPS = (
  8  # students with more steps are not monitored: their samples cost too much, and they do not collapse
)
_SAMPLES = 256
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
  def of(cls, images: np.ndarray, extractor: FeatureExtractor) -> 'Figures':
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
    images: the training images.
    extractor: extracts the features that diversity is measured in.
  """

  def __init__(
    self,
    config: Config,
    stage: Stage,
    stage_dir: pathlib.Path,
    images: Loader,
    extractor: FeatureExtractor,
  ) -> None:
    self._config, self._stage, self._stage_dir = config, stage, stage_dir
    self._extractor = extractor
    chosen = np.random.Generator(np.random.Philox(0)).permutation(len(images))[:_SAMPLES]
    with contextlib.closing(images.in_order(len(chosen), chosen)) as batches:
      real = sharding.gather_batch(next(batches))
    self.data = Figures.of(real['image'][real['mask']], extractor)
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
    """Draws samples and returns their `diversity` relative to the data, their `brightness` and their `saturation`.

    Args:
      state: the training state.
      frozen: the parameters that updates only read, such as the teacher's, on the devices.
    """
    stage, config = self._stage, self._config
    draw = measure.drawer(config, stage, stage.sampler, self._label_counts)
    grid = times.uniform(stage.num_steps)
    images = draw.draw(state.ema_params[0], grid, _SAMPLES, config.evaluation.seed)
    if 'fake_score' in state.params:
      networks = {'teacher': frozen['teacher'], 'fake_score': state.params['fake_score']}
      self._picture(networks, images[:8], draw.cond(np.arange(8), config.evaluation.seed))
    figures = Figures.of(images, self._extractor)
    diversity = figures.spread / max(self.data.spread, 1e-12)
    begun = int(state.step) <= stage.num_updates / 5
    self._warn(
      'diversity',
      diversity < LEAST_DIVERSITY and not begun,
      f'the samples are only {diversity:.2f} times as diverse as the data',
    )
    return {
      'diversity': diversity,
      'brightness': figures.brightness,
      'saturation': figures.saturation,
    }

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
    scores = self._stage.recipe.bind(params)
    networks = (scores['teacher'], scores['fake_score'])
    rows = _denoisings(self._stage.space, networks, images, logsnr, cond)
    sheet = np.concatenate([images, sharding.to_host(rows)])
    if not files.writes():
      return
    picture = pictures.to_pil(pictures.grid(pictures.enlarge(sheet, 32), len(images)))
    temporary = self._stage_dir / 'denoisings.tmp'
    picture.save(temporary, format='png')
    temporary.replace(self._stage_dir / 'denoisings.png')


def watches(config: Config, stage: Stage) -> bool:
  """Whether a stage is monitored."""
  return bool(config.log.health_every) and stage.parent is not None and stage.num_steps <= MOST_STEPS


def begin(config: Config, stage: Stage, workdir: pathlib.Path, images: Loader) -> Monitor:
  """Creates the monitor of a stage; trains the workdir's feature extractor if it does not exist yet."""
  held_out = open_images(config, 'eval')
  extractor = load_or_train(workdir / 'extractor.safetensors', images, held_out)
  held_out.close()
  (workdir / stage.name).mkdir(exist_ok=True)
  return Monitor(config, stage, workdir / stage.name, images, extractor)


@functools.partial(jax.jit, static_argnums=0)
def _denoisings(
  space: Space,
  networks: tuple[Bound, Bound],
  images: jax.Array,
  logsnr: jax.Array,
  cond: Cond,
) -> jax.Array:
  """Returns (3 T n, H, W, C) uint8: noised images, teacher's and fake score's denoisings of n images at each of T times."""
  x = space.encode(images)
  eps = jax.random.normal(jax.random.key(0), x.shape)
  rows = []
  for at in logsnr:
    full = jnp.full(len(x), at)
    z = diffuse(x, eps, full)
    rows += [z, *(network(z, full, cond).x for network in networks)]
  return space.decode(jnp.concatenate(rows))


def _follow(running: float | None, value: float) -> float:
  return value if running is None else _KEPT * running + (1.0 - _KEPT) * value
