"""What a stage was made from, as its stage.json names it."""

import dataclasses

from diffusion_distillation.stages import provenance
from diffusion_distillation.stages.provenance import Model
from tests.stages.students_test import plan


def test_lineage_names_both_parents():
  model = Model(plan()['base'], 'ema', None, 'a', 1, 0.0, {})
  other = dataclasses.replace(model, stage=plan('knowledge')['knowledge'], digest='b')
  described = provenance.Parents(model, other, 'p').describe()
  assert described == {
    'parent': {'stage': 'base', 'weights': 'ema', 'digest': 'a'},
    'start': {'stage': 'knowledge', 'weights': 'ema', 'digest': 'b'},
    'pairs': 'p',
    'distance': None,
  }
  assert provenance.Parents(model).describe()['start'] is None  # new parameters
