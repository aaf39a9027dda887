"""All sections with their defaults. Other configs start from this one and override what differs.

Every key is declared next to the code that it configures; docs/configuration.md lists all keys.
"""

import dataclasses

import ml_collections

from diffusion_distillation import config
from diffusion_distillation.datasets.settings import DatasetSection
from diffusion_distillation.diffusion.schedules import ScheduleSection
from diffusion_distillation.diffusion.times import TimeSection
from diffusion_distillation.diffusion.weightings import WEIGHTINGS
from diffusion_distillation.evaluation.section import EvaluationSection
from diffusion_distillation.methods import METHODS, Student
from diffusion_distillation.methods.denoising import TrainSection
from diffusion_distillation.methods.progressive import DistillSection
from diffusion_distillation.networks import NETWORKS
from diffusion_distillation.networks.denoiser import ModelSection
from diffusion_distillation.run.gate import GateSection
from diffusion_distillation.run.pairs import PairsSection
from diffusion_distillation.run.tracking import EarlyStopSection
from diffusion_distillation.system.checkpoints import CheckpointSection
from diffusion_distillation.system.compilation import ComputeSection
from diffusion_distillation.system.logs import LogSection
from diffusion_distillation.system.sharding import MeshSection
from diffusion_distillation.training.autoencoding import AutoencoderSection
from diffusion_distillation.training.contrastive import TextEncoderSection
from diffusion_distillation.training.lora import LoraSection
from diffusion_distillation.training.optimizers import OptimizerSection


@dataclasses.dataclass(frozen=True)
class TopLevel:
  """Keys that do not belong to a section."""

  seed: int = config.key(
    0, 'Seed of the initial weights, the batches and the noise in training.', config.NOT_NEGATIVE
  )
  weighting: str = config.key(
    'snr_trunc', 'Weighting of the loss of base training as a function of logsnr.', choices=WEIGHTINGS
  )
  methods: tuple[str, ...] = config.key(
    ('progressive',),
    'Distillation methods that follow base training, in this order. Each adds one stage of its name; `progressive` adds one '
    'stage per round.',
    choices=[name for name in METHODS if name != 'denoising'],
    distinct=True,
  )
  max_skipped: int = config.key(
    20,
    'Number of consecutive updates with a non-finite loss or gradient, which are skipped, after which training goes '
    'back to the last checkpoint.',
    config.POSITIVE,
  )


def _sections() -> dict[str, type]:
  """Returns all sections in the order of the documentation; methods and networks declare their own sections."""
  model = config.joined(ModelSection, *(cls.Section for cls in NETWORKS.values()))
  students = {name: cls.Section for name, cls in METHODS.items() if issubclass(cls, Student)}
  return {
    '': TopLevel,
    'dataset': DatasetSection,
    'model': model,
    'student': config.optional(
      model, "The students' network, if it differs from the base's; `None`: as in `model`."
    ),
    'autoencoder': AutoencoderSection,
    'text_encoder': TextEncoderSection,
    'schedule': ScheduleSection,
    'time': TimeSection,
    'optimizer': OptimizerSection,
    'train': TrainSection,
    'distill': DistillSection,
    'pairs': PairsSection,
    **students,
    'lora': LoraSection,
    'checkpoint': CheckpointSection,
    'log': LogSection,
    'evaluation': EvaluationSection,
    'gate': GateSection,
    'early_stop': EarlyStopSection,
    'mesh': MeshSection,
    'compute': ComputeSection,
  }


def get_config() -> ml_collections.ConfigDict:
  """Returns the defaults, locked so that a mistyped key is an error."""
  config.SECTIONS.clear()
  config.SECTIONS.update(_sections())
  return config.default_config()
