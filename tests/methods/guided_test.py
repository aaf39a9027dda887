"""Students of a guided teacher: with one variance for all, guidance moves the teacher's mean, in closed form."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.diffusion.guidance import Guidance
from diffusion_distillation.diffusion.schedules import Cosine
from diffusion_distillation.diffusion.weightings import SnrTrunc
from diffusion_distillation.errors import UserError
from diffusion_distillation.methods.dmd import DMD
from diffusion_distillation.methods.progressive import Progressive
from diffusion_distillation.networks.denoiser import Bound
from diffusion_distillation.networks.guidance import Guided
from diffusion_distillation.run import forecast
from diffusion_distillation.stages.comparison import check_config
from tests import tiny
from tests.evaluation.guidance_test import Exact
from tests.exact import Gaussian

WEIGHT, STD = 1.5, 0.3
TEACHER = Exact((Gaussian(0.2, STD), Gaussian(0.3, STD)), Gaussian(0.1, STD))
# Towards each class from the unconditional mean; without a class there is no guidance.
MOVED = [Gaussian(mean + WEIGHT * (mean - 0.1), STD) for mean in (0.2, 0.3, 0.1)]
LABELS = jnp.array([0, 1, -1], jnp.int32)


def bound(method):
  student = Exact(tuple(MOVED[:2]), MOVED[2])
  nets = method.networks(student, TEACHER)
  return {name: Bound(net, {}) for name, net in nets.items()}


def test_dmd_is_at_rest_where_the_generator_has_the_guided_law():
  """The real score is guided, the fake score is not (Yin et al. 2023, section 3.4)."""
  rngs = jax.random.split(jax.random.key(0), 2)
  eps, noise = (jax.random.normal(rng, (3, 4, 4, 1)) for rng in rngs)
  means = jnp.array([law.mean for law in MOVED])[:, None, None, None]
  x = means + STD * noise
  batch = {'t': jnp.array([0.2, 0.5, 0.9]), 'eps': eps, 'cond': {'label': LABELS}}
  sizes = {}
  for weight in (WEIGHT, 0.0):
    dmd = DMD(Cosine(), SnrTrunc(), guidance=weight, regression=0.0)
    nets = bound(dmd)
    assert isinstance(nets['teacher'].network, Guided) == (weight > 0.0)
    assert nets['fake_score'].network is TEACHER
    nets['fake_score'] = nets['student']  # of the guided law
    sizes[weight] = dmd.matching_losses(nets, x, batch)[1]
  assert (sizes[WEIGHT] < 1e-4).all()
  assert (sizes[0.0][:2] > 0.1).all() and sizes[0.0][2] < 1e-4


def test_the_first_round_follows_the_guided_teacher():
  z = jax.random.normal(jax.random.key(1), (3, 2, 2, 1))
  i, cond = jnp.array([2, 4, 1]), {'label': LABELS}
  guided = bound(Progressive(4, Cosine(), SnrTrunc(), guidance=WEIGHT))
  found = Progressive(4, Cosine(), SnrTrunc()).target_x(guided['teacher'], z, i, cond)
  expected = Progressive(4, Cosine(), SnrTrunc()).target_x(guided['student'], z, i, cond)
  np.testing.assert_allclose(found, expected, atol=2e-5)
  assert isinstance(guided['teacher'].network, Guided)


def test_a_guided_teacher_is_called_twice():
  calls = [DMD(Cosine(), SnrTrunc(), guidance=w, fake_updates=5).calls for w in (0.0, 1.0)]
  assert calls[1] == pytest.approx(calls[0] + 1 / 5)
  assert [Progressive(4, Cosine(), SnrTrunc(), 3, guidance=w).calls for w in (0.0, 1.0)] == [4, 7]


METHODS = ('progressive', 'knowledge', 'dmd')
GUIDED = {
  'methods': METHODS,
  'model__conditional': True,
  'dataset__label_dropout': 0.1,
  'pairs__guidance': WEIGHT,
  'dmd__guidance': WEIGHT,
  'distill__guidance': WEIGHT,
}


def test_a_plan_guides_the_base_and_no_other_teacher():
  stages = {stage.name: stage for stage in tiny.plan(**GUIDED)[0]}
  teachers = {name: stage.recipe.networks.get('teacher') for name, stage in stages.items()}
  base = stages['base'].denoise
  assert teachers['progressive_0002'] == teachers['dmd'] == Guided(base, Guidance(WEIGHT))
  assert teachers['progressive_0001'] == base
  pairs = stages['knowledge'].pairs
  assert pairs.guidance == Guidance(WEIGHT)
  once = pairs.count * pairs.sampler.calls(pairs.num_steps)
  assert forecast.pairs_calls(list(stages.values()), set()) == 2 * once


@pytest.mark.parametrize('key', ['pairs.guidance', 'dmd.guidance', 'distill.guidance'])
def test_a_teacher_that_cannot_be_guided_is_refused_by_the_key(key):
  for changes, message in (
    ({'dataset__label_dropout': 0.0}, 'without label dropout'),
    ({'dataset__label_dropout': 0.0, 'model__conditional': False}, 'unconditional'),
  ):
    others = {name: 0.0 for name in GUIDED if name.endswith('guidance')}
    given = GUIDED | others | changes | {key.replace('.', '__'): 1.0, 'dmd__regression': 0.0}
    with pytest.raises(UserError, match=f'^{key}=1: .*{message}'):
      tiny.plan(**given)


def test_pairs_of_another_teacher_than_the_one_that_is_matched_are_refused():
  with pytest.raises(UserError, match=r'^dmd.guidance=1.5 and pairs.guidance=0 must be the same'):
    tiny.plan(**GUIDED | {'pairs__guidance': 0.0})
  tiny.plan(**GUIDED | {'pairs__guidance': 0.0, 'dmd__regression': 0.0})


@pytest.mark.parametrize('stage', ['progressive_0002', 'dmd'])
def test_a_stage_of_before_is_one_without_guidance(stage, tmp_path):
  """Old configs have no such key; the guidance that made a stage cannot change, that of other stages can."""
  made_with = tiny.config(methods=METHODS).to_dict()
  key = 'dmd' if stage == 'dmd' else 'distill'
  other = 'distill' if stage == 'dmd' else 'dmd'
  for values in (
    made_with,
    {**made_with, key: {k: v for k, v in made_with[key].items() if k != 'guidance'}},
  ):
    check_config(tmp_path / 'stage.json', values, tiny.config(methods=METHODS), stage)
    changed = tiny.config(methods=METHODS, **{f'{other}__guidance': 1.0, 'pairs__guidance': 1.0})
    check_config(tmp_path / 'stage.json', values, changed, stage)
    changed = tiny.config(methods=METHODS, **{f'{key}__guidance': 1.0})
    with pytest.raises(UserError, match=rf'{key}.guidance was 0.0, is 1.0'):
      check_config(tmp_path / 'stage.json', values, changed, stage)
