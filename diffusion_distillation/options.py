"""The options of a command."""

import dataclasses
import os
from collections.abc import Sequence

from diffusion_distillation import paths
from diffusion_distillation.config import Config


@dataclasses.dataclass(frozen=True)
class Options:
  """The command line; see `command.py` for the meaning of each flag."""

  mode: str
  config: Config | None
  default: Config
  workdir: str | os.PathLike[str] | None
  workdirs: Sequence[str] = ()
  stage: str | None = None
  weights: str = 'ema'
  num_samples: int | None = None
  seed: int = 0
  sampler: str | None = None
  gamma: float | None = None
  clip_x: bool | None = None
  steps: int | None = None
  grid: str | None = None
  times: Sequence[str] = ()
  classes: Sequence[str] = ()
  prompts: Sequence[str] = ()
  negative_prompt: str | None = None
  guidance: float | None = None
  guidance_interval: Sequence[str] = ()
  guiding_model: str | os.PathLike[str] | None = None
  out: str | os.PathLike[str] | None = None
  format: str = 'jax'
  source: str | None = None
  checkpoint: str | os.PathLike[str] | None = None
  lora: str | os.PathLike[str] | None = None
  lora_scale: float = 1.0
  coordinator: str | None = None
  num_processes: int | None = None
  process_id: int | None = None
  peer_timeout: int = 100
  step: int | None = None
  port: int = 7860
  images: str | os.PathLike[str] | None = None
  inception: str | os.PathLike[str] | None = None
  rest: Sequence[str] = ()

  def on_disk(self) -> 'Options':
    """Returns the options with absolute paths; raises UserError for a URL or an unknown home directory."""
    workdir = None if self.workdir is None else paths.on_disk('--workdir', self.workdir)
    checkpoint = None if self.checkpoint is None else paths.on_disk('--checkpoint', self.checkpoint)
    return dataclasses.replace(self, workdir=workdir, checkpoint=checkpoint)

  def given(self, names: Sequence[str]) -> str | None:
    """Returns the first of these options that differs from its default; None if all are at their defaults."""
    return next(
      (name for name in names if getattr(self, name) not in (getattr(Options, name), [])), None
    )
