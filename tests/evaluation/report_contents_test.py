"""Which images the report shows."""

import types

import numpy as np
import pytest

from diffusion_distillation.diffusion.guidance import NONE, Guidance
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import report_contents
from diffusion_distillation.networks.conditioning import Classes
from tests import tiny


def measured(name, sampler, num_steps, weight=0.0, own=(4, 'ddim'), weights='ema', classes=3):
  conditioning = {'label': Classes(classes)} if classes else {}
  stage = types.SimpleNamespace(
    name=name, num_steps=own[0], sampler=own[1], denoise=types.SimpleNamespace(conditioning=conditioning)
  )
  guidance = Guidance(weight) if weight else NONE
  model = types.SimpleNamespace(stage=stage, weights=weights)
  return types.SimpleNamespace(model=model, sampler=sampler, num_steps=num_steps, guidance=guidance)


def draw(setting, count, chosen):
  """Images whose pixels tell what was asked for."""
  labels = chosen['label'] if chosen else [99] * count
  pixels = [[10 * setting.guidance.weight, label, setting.num_steps] for label in labels]
  return np.asarray(pixels, np.uint8).reshape(count, 1, 1, 3)


ROWS = [
  *(measured('base', sampler, n) for sampler in ('heun', 'ddim') for n in (4, 2)),
  measured('base', 'ddim', 4, weights='ema_0.5'),
  measured('student', 'ddim', 2, own=(2, 'ddim')),
]


def test_a_stage_is_shown_at_its_own_steps_with_its_own_sampler():
  found = report_contents.own_rows(ROWS)
  assert {name: [(m.sampler, m.num_steps) for m in own] for name, own in found.items()} == {
    'base': [('ddim', 4)],
    'student': [('ddim', 2)],
  }
  assert list(report_contents.samples(ROWS, draw)) == ['base\n4 steps', 'student\n2 steps']
  # A base that was not measured with its own sampler is shown with the first that it was measured with.
  others = [measured('base', sampler, 4, own=(4, 'ddim')) for sampler in ('heun', 'euler')]
  assert [m.sampler for m in report_contents.own_rows(others)['base']] == ['heun']


def test_classes_by_weight_start_from_the_same_noise_for_all_models_that_have_several():
  rows = [
    *(measured('base', 'ddim', 4, weight) for weight in (2.0, 0.0, 0.5)),
    *(measured('guided', 'ddim', 2, weight, own=(2, 'ddim')) for weight in (0.0, 2.0)),
    measured('one', 'ddim', 4, 1.0),
    *(measured('unconditional', 'ddim', 4, weight, classes=0) for weight in (0.0, 2.0)),
  ]
  base, guided = report_contents.by_guidance(rows, draw)
  assert (base.stage, base.weights, base.labels) == ('base', (0.0, 0.5, 2.0), (0, 1, 2))
  assert base.images.shape == (3, 3, 1, 1, 3)
  for k, label in enumerate(base.labels):
    for j, weight in enumerate(base.weights):
      assert base.images[k, j, 0, 0].tolist() == [10 * weight, label, 4]
  assert (guided.stage, guided.weights) == ('guided', (0.0, 2.0))
  assert report_contents.by_guidance(
    [measured('base', 'ddim', 4, w, classes=99) for w in (0.0, 1.0)], draw
  )[0].labels == (*range(10),)


def test_the_stage_whose_neighbours_are_shown_has_to_be_in_the_plan():
  with pytest.raises(UserError, match=r"evaluation.neighbours_of='progresive_0001' .*progressive_0001"):
    tiny.plan(evaluation__neighbours_of='progresive_0001')
