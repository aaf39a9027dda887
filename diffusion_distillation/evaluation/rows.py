"""What an evaluation measures: which stages, with which weights, samplers, step counts and guidance."""

import dataclasses
from collections.abc import Iterator

from diffusion_distillation.config import Config
from diffusion_distillation.diffusion.guidance import NONE, Guidance, make_guidance
from diffusion_distillation.evaluation.sampled_texts import SampledTexts
from diffusion_distillation.networks import conditioning
from diffusion_distillation.networks.guidance import GuidingModel
from diffusion_distillation.stages.provenance import Model
from diffusion_distillation.stages.stage import Stage


@dataclasses.dataclass(frozen=True)
class Setting:
  """What one row measures: a model, sampler, number of steps, guidance, and the model that guides if there is one.

  `updates` of the model is None if it is not known. `texts` are those that a model of texts draws.
  """

  model: Model
  sampler: str
  num_steps: int
  updates: int | None = None
  guidance: Guidance = NONE
  guiding: GuidingModel | None = None
  texts: SampledTexts | None = None


def rows(stages: list[Stage], config: Config) -> Iterator[tuple[int, str, str, int]]:
  """Yields what is measured: (index of the stage in the list, weights, sampler, number of steps).

  The first stage is measured with every sampler at the step counts of all stages, each student with its own sampler at its
  own step counts, and further moving averages of a stage likewise. Rows above `evaluation.max_steps` are left out.
  """
  counts = list(dict.fromkeys(steps for stage in stages for steps in stage.measured_steps))
  found = [(0, 'ema', sampler, steps) for steps in counts for sampler in config.evaluation.samplers]
  for place, stage in enumerate(stages):
    for weights in stage.weights[:-1]:
      if place or weights != 'ema':
        found += [(place, weights, stage.sampler, steps) for steps in stage.measured_steps]
  yield from (row for row in found if row[-1] <= config.evaluation.max_steps)


def guidances(config: Config, place: int, stage: Stage) -> tuple[Guidance, ...]:
  """Returns the guidances to measure a stage with, the one at `place` in the list.

  The base, the first stage, is measured with those of the config. A student that takes the weight as an input is measured
  with the weights of the config in its range, or else with its smallest weight; other students only without guidance.
  """
  wanted, interval = config.evaluation.guidance, config.evaluation.guidance_interval
  if known := conditioning.weights(stage.denoise.conditioning):
    inside = [weight for weight in wanted if known.low <= weight <= known.high]
    return tuple(make_guidance(weight) for weight in inside or [known.low])
  return (NONE,) if place else tuple(make_guidance(weight, interval) for weight in wanted)
