"""Stages that are trained by low-rank adapters, as the section `lora` of a config says."""

import dataclasses
import math
import re
from typing import Any

from diffusion_distillation.config import Config
from diffusion_distillation.errors import UserError
from diffusion_distillation.networks import lora
from diffusion_distillation.stages.stage import START, Stage
from diffusion_distillation.training.lora import Lora

_SHOWN = 3  # modules that an error names


def with_adapters(config: Config, stage: Stage) -> Stage:
  """Returns a student's stage with adapters of the weights that it starts from; unchanged if `lora.rank` is 0.

  Raises:
    UserError: the student does not start from trained weights of its own network, or `lora.modules` adapts nothing.
  """
  rank, modules = config.lora.rank, config.lora.modules or lora.ATTENTION
  if not rank:
    return stage
  asked = f'lora.rank={rank}'
  if stage.adds_input:
    raise UserError(
      f"{asked}: {stage.name} adds an input to its teacher's network, whose weights are new and cannot be adapted; set lora.rank=0, or "
      f'leave {stage.name} out of methods'
    )
  if stage.starts_anew:
    raise UserError(
      f'{asked}: {stage.name} has another network than its teacher and starts from new weights, which cannot be adapted; set '
      'lora.rank=0, or leave out the keys of the section student'
    )
  if stage.start is None and stage.parent_weights != 'ema':
    raise UserError(f"{asked}: adapters change a teacher's moving average; set distill.from_weights=ema")
  own = 'teacher' if stage.start in (None, stage.parent) else START
  bases = {'student': own} | ({'average': own} if 'average' in stage.recipe.networks else {})
  _check(rank, modules, stage.abstract_params, stage.name)
  if config.lora.fake_score and (others := stage.recipe.method.from_teacher):
    _check(rank, modules, stage.abstract_teacher, f'the teacher of {stage.name}')
    bases |= dict.fromkeys(others, 'teacher')
  made = Lora(rank, float(config.lora.scale), modules, tuple(sorted(bases.items())))
  return dataclasses.replace(stage, recipe=dataclasses.replace(stage.recipe, lora=made))


def _check(rank: int, modules: str, params: Any, name: str) -> None:
  """Raises UserError unless the expression matches a kernel of the network, and the rank is one that such a kernel can have."""
  try:
    found = lora.adapted(params, modules)
  except re.error as error:
    raise UserError(f'lora.modules={modules!r} is not a valid regular expression: {error}') from error
  if not found:
    some = ', '.join(list(lora.adapted(params, '.*'))[:_SHOWN])
    raise UserError(
      f'lora.modules={modules!r} matches no module of {name} that has a kernel, such as {some}; it must match the whole path'
    )
  most = max(min(math.prod(inputs), math.prod(outputs)) for inputs, outputs in found.values())
  if rank > most:
    raise UserError(f'lora.rank={rank}: no kernel that is adapted in {name} has a rank above {most}')
