"""Which rows an evaluation has: models, samplers and numbers of steps."""

from diffusion_distillation.diffusion import samplers
from diffusion_distillation.evaluation import measure
from tests import tiny


def rows_of(**overrides):
  config = tiny.config(**overrides)
  stages = tiny.plan(**overrides)[0]
  return [(stages[place].name, *rest) for place, *rest in measure.rows(stages, config)]


def test_the_base_is_measured_under_every_sampler_and_each_student_at_its_own_steps():
  names = tuple(samplers.SAMPLERS)
  assert rows_of(evaluation__samplers=names) == [
    *(('base', 'ema', name, steps) for steps in (4, 2, 1) for name in names),
    ('progressive_0002', 'ema', 'ddim', 2),
    ('progressive_0001', 'ema', 'ddim', 1),
  ]


def test_further_averages_are_measured_at_their_stages_own_steps():
  averages = {'train__ema_decay': (0.9, 0.5, 0.2), 'distill__ema_decay': (0.0, 0.8)}
  assert rows_of(evaluation__samplers=('heun',), distill__start_steps=2, **averages) == [
    ('base', 'ema', 'heun', 2),
    ('base', 'ema', 'heun', 1),
    ('base', 'ema_0.5', 'ddim', 2),
    ('base', 'ema_0.2', 'ddim', 2),
    ('progressive_0001', 'ema', 'ddim', 1),
    ('progressive_0001', 'ema_0.8', 'ddim', 1),
  ]


def test_rows_of_more_steps_than_wanted_are_left_out():
  limits = {'distill__start_steps': 16, 'evaluation__max_steps': 4, 'train__ema_decay': (0.9, 0.5)}
  assert rows_of(evaluation__samplers=('ddim',), **limits) == [
    *(('base', 'ema', 'ddim', steps) for steps in (4, 2, 1)),
    *((f'progressive_000{steps}', 'ema', 'ddim', steps) for steps in (4, 2, 1)),
  ]
