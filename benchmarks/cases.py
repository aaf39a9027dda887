"""The networks and kinds of work that the benchmarks of speed can measure, by name."""

import dataclasses
import json
from collections.abc import Callable

import ml_collections

from configs import cifar10, digits, imagenet64
from diffusion_distillation.stages import plan
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system import sharding

WORKS = {  # kind of work -> the stage that it belongs to
  'base': 'base',
  'round': 'progressive',
  'dmd': 'dmd',
  'sampling': 'base',
  'guided': 'guided',  # the first stage of guided distillation
  'guided_round': 'progressive',  # a round after it, whose student takes the weight of guidance
  'guided_dmd': 'dmd',  # with a guided teacher
}


def _tiny() -> ml_collections.ConfigDict:
  c = digits.get_config()
  c.model.ch, c.model.emb_ch, c.model.num_groups = 8, 16, 4
  return c


def _cifar10_small() -> ml_collections.ConfigDict:
  c = cifar10.get_config()
  c.model.output = 'v'
  c.model.ch, c.model.emb_ch = 64, 256
  return c


def _imagenet64_small() -> ml_collections.ConfigDict:
  c = imagenet64.get_config()
  c.model.ch, c.model.emb_ch = 64, 256
  return c


@dataclasses.dataclass(frozen=True)
class Network:
  """A network that can be benchmarked.

  Attributes:
    config: returns a config with this network.
    image_shape: (H, W, C).
    num_classes: number of classes of the images.
    batch_size: default number of examples per update.
  """

  config: Callable[[], ml_collections.ConfigDict]
  image_shape: tuple[int, int, int]
  num_classes: int
  batch_size: int


NETWORKS = {
  'tiny': Network(_tiny, (8, 8, 1), 10, 16),
  'digits': Network(digits.get_config, (8, 8, 1), 10, 64),
  'cifar10-small': Network(_cifar10_small, (32, 32, 3), 10, 16),
  'cifar10': Network(cifar10.get_config, (32, 32, 3), 10, 128),
  'imagenet64-small': Network(_imagenet64_small, (64, 64, 3), 1000, 32),
  'imagenet64': Network(imagenet64.get_config, (64, 64, 3), 1000, 32),
}


@dataclasses.dataclass(frozen=True)
class Case:
  """A network and a kind of work.

  Attributes:
    network: a name in NETWORKS.
    work: a name in WORKS.
    batch: examples per update, or images drawn at a time; 0 for the network's default.
    dtype: type of the activations and of the frozen teacher's parameters.
    calls: network evaluations per image in sampling.
    wider: factor on the number of channels.
    larger: factor on the height and width of the images; attention stays at the same levels.
  """

  network: str
  work: str
  batch: int = 0
  dtype: str = 'float32'
  calls: int = 4
  wider: int = 1
  larger: int = 1

  @property
  def batch_size(self) -> int:
    """Number of examples, rounded up to a multiple of the number of devices."""
    return sharding.round_up(self.batch or NETWORKS[self.network].batch_size)

  def config(self) -> ml_collections.ConfigDict:
    """The network's config, changed according to the case."""
    c = NETWORKS[self.network].config()
    c.methods = ('progressive', 'dmd')
    c.distill.factor = (2,)
    c.model.ch *= self.wider
    c.model.emb_ch *= self.wider
    c.model.attn_resolutions = tuple(self.larger * side for side in c.model.attn_resolutions)
    c.compute.dtype = c.compute.teacher_dtype = self.dtype
    c.evaluation.batch_size = self.batch_size
    for section in (c.train, c.distill, c.dmd, c.guided):
      section.batch_size = self.batch_size
    if self.work.startswith('guided'):
      c.model.conditional, c.dataset.label_dropout = True, 0.1
    if self.work in ('guided', 'guided_round'):
      c.methods = ('guided', 'progressive')
    if self.work == 'guided_dmd':
      c.dmd.guidance = c.pairs.guidance = 1.0
    return c

  def stage(self) -> Stage:
    """The stage that the work belongs to."""
    known = NETWORKS[self.network]
    height, width, channels = known.image_shape
    shape = (self.larger * height, self.larger * width, channels)
    stages = plan.plan(self.config(), shape, known.num_classes)
    return next(stage for stage in stages if stage.name.startswith(WORKS[self.work]))

  def to_json(self) -> str:
    """The case as JSON."""
    return json.dumps(dataclasses.asdict(self))

  @classmethod
  def from_json(cls, text: str) -> 'Case':
    """The inverse of `to_json`."""
    return cls(**json.loads(text))
