"""Watching a student of few steps while it trains: does it still draw all that the data has?

stage_dir/health.json      the data's figures, to compare those in metrics.jsonl with
stage_dir/denoisings.png   DMD: samples, noised, as the teacher and as the fake score would denoise them
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
  8  # students of more are not looked at: their samples cost too much, and they do not collapse
)
_SAMPLES = 256
_TIMES = (0.3, 0.5, 0.7, 0.9)  # of the noised samples in the picture
_KEPT = 0.9  # of the running loss, from one line of metrics to the next

LEAST_DIVERSITY = (
  0.5  # below it a warning, but not in the first fifth: what starts from the base draws its mean
)
MOST_LAG = 2.0  # above it a warning


@dataclasses.dataclass(frozen=True)
class Figures:
  """Of some images.

  Attributes:
    spread: root of the trace of their features' covariance: half the mean squared distance of two, as a root.
    brightness: mean pixel, in [0, 1].
    saturation: mean of (largest - smallest) / largest channel, in [0, 1]; 0 of grey images.
  """

  spread: float
  brightness: float
  saturation: float

  @classmethod
  def of(cls, images: np.ndarray, extractor: FeatureExtractor) -> 'Figures':
    """Of (n, H, W, C) uint8."""
    scaled = images.astype(np.float64) / 255.0
    largest, smallest = scaled.max(-1), scaled.min(-1)
    saturation = (largest - smallest) / np.maximum(largest, 1e-9)
    spread = np.sqrt(extractor(images).astype(np.float64).var(0).sum())
    return cls(float(spread), float(scaled.mean()), float(saturation.mean()))


class Monitor:
  """Looks at a stage's samples now and then.

  Args:
    config: of the run.
    stage: that is trained.
    stage_dir: of it.
    images: the training images.
    extractor: the features that diversity is measured by.
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
      real = sharding.whole(next(batches))
    self.data = Figures.of(real['image'][real['mask']], extractor)
    write_json(stage_dir / 'health.json', dataclasses.asdict(self.data))
    self._label_counts = measure.label_counts(config, stage_dir.parent)
    self._running: float | None = None
    self._warned: set[str] = set()

  def resume(self, done: int) -> None:
    """Takes the running loss up where metrics.jsonl has it at update `done`."""
    self._running = None
    for line in logs.read(self._stage_dir / 'metrics.jsonl'):
      if line['step'] <= done and 'fake_loss' in line:
        self._running = _follow(self._running, line['fake_loss'])

  def due(self, done: int) -> bool:
    """Whether to look after update `done`."""
    return done % self._config.log.health_every == 0 or done == self._stage.num_updates

  def look(self, state: TrainState, frozen: Mapping[str, Params]) -> dict[str, float]:
    """Figures of fresh samples: `diversity` as a ratio to the data's, `brightness` and `saturation`.

    Args:
      state: of the training.
      frozen: the parameters that the updates only read, the teacher's among them, on the devices.
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
      f'the samples have {diversity:.2f} of the diversity of the data',
    )
    return {
      'diversity': diversity,
      'brightness': figures.brightness,
      'saturation': figures.saturation,
    }

  def lag(self, values: Mapping[str, float]) -> dict[str, float]:
    """`fake_score_lag`: the fake score's loss on the latest samples over its running loss before, where it has one."""
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
    """Once, until it is right again."""
    if wrong and name not in self._warned:
      _log.warning('stage %s: %s', self._stage.name, text)
    (self._warned.add if wrong else self._warned.discard)(name)

  def _picture(self, params: Mapping[str, Params], images: np.ndarray, cond: Cond) -> None:
    """Rows: the samples, then for each time the noised samples, the teacher's denoising, the fake score's."""
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
  """Whether a stage is looked at."""
  return bool(config.log.health_every) and stage.parent is not None and stage.num_steps <= MOST_STEPS


def begin(config: Config, stage: Stage, workdir: pathlib.Path, images: Loader) -> Monitor:
  """A look-out for a stage, with the workdir's extractor, which is trained if it is not there yet."""
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
  """(3 T n, H, W, C) uint8: noised, real and fake denoising of n images at each of T times."""
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
