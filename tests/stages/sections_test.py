"""What the students' sections of a config change in the plan, and what they leave alone."""

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.diffusion.process import alpha_sigma
from diffusion_distillation.diffusion.schedules import Cosine, LinearBeta
from diffusion_distillation.diffusion.weightings import Constant, Edm, Snr, SnrPlusOne, SnrTrunc
from diffusion_distillation.errors import UserError
from diffusion_distillation.networks.head import Head, StridedHead
from diffusion_distillation.run import run
from diffusion_distillation.stages import plan as stages
from diffusion_distillation.stages import workdir as workdirs
from tests import tiny
from tests.stages.students_test import ALL, ROUNDS, plan


def test_what_only_measures_changes_nothing_that_is_trained():
  several = {'dmd2__num_steps': 2}
  measured = {
    'evaluation__clip_x': False,
    'evaluation__grid': 'karras',
    'evaluation__samplers': ('heun',),
  }
  assert plan(*ALL, **several) == plan(*ALL, **several, **measured)


def test_base_rounds_and_fake_scores_have_a_weighting_each():
  """Without one of their own the others have the base's."""
  given = {'weighting': 'snr', 'distill__weighting': 'constant', 'dmd__fake_weighting': 'edm'}
  for changes, expected in (
    (given, (Snr(), Constant(), Edm(), Snr())),
    ({'weighting': 'snr_plus_one'}, 4 * (SnrPlusOne(),)),
    ({'dmd2__fake_weighting': 'edm'}, (SnrTrunc(), SnrTrunc(), SnrTrunc(), Edm())),
  ):
    planned = plan(*ALL, **changes)
    names = ('base', ROUNDS[0], 'dmd', 'dmd2')
    assert tuple(planned[name].recipe.method.weighting for name in names) == expected


def test_dmd_keeps_no_average_of_the_generator_unless_asked_to():
  """As in the papers: decay 0, the generator itself is the stage's model."""
  planned = plan(*ALL)
  decays = {name: stage.recipe.ema_decay for name, stage in planned.items()}
  assert decays['dmd'] == decays['dmd2'] == (0.0,)
  assert decays['knowledge'] == decays['consistency'] == (0.9999,)
  assert plan('dmd', dmd__ema_decay=(0.9,))['dmd'].recipe.ema_decay == (0.9,)


@pytest.mark.parametrize('name', ['dmd', 'dmd2'])
def test_the_gan_looks_at_all_times_and_at_others_if_asked_to(name):
  gan = {f'{name}__gan_generator': 0.1, f'{name}__gan_fake': 0.2}
  found = plan(name, **gan)[name].recipe.method.gan
  assert (found.first_t, found.last_t, type(found.module)) == (0.0, 1.0, Head)
  asked = {f'{name}__gan_first_t': 0.1, f'{name}__gan_last_t': 0.6}
  found = plan(name, **gan, **asked)[name].recipe.method.gan
  assert (found.first_t, found.last_t) == (0.1, 0.6)


def test_a_strided_head_is_of_the_width_of_the_encoder():
  found = plan('dmd2', dmd2__gan_head='strided')['dmd2'].recipe.method.gan
  assert isinstance(found.module, StridedHead) and found.width == 8
  assert StridedHead.check((8, 8, 768)) is None


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'model__ch_mult': (1, 1)}, r'dmd2\.gan_head=strided: .* 8x8 .* has 4x4: choose gan_head=pooled'),
    ({'model__ch': 100, 'model__num_groups': 4}, 'must divide the channels; the model has 100'),
  ],
  ids=str,
)
def test_a_strided_head_that_does_not_fit_is_refused_in_one_line(changes, message):
  with pytest.raises(UserError, match=message) as error:
    plan('dmd2', dmd2__gan_head='strided', **changes)
  assert '\n' not in str(error.value)


def test_fake_score_and_head_are_clipped_together_if_asked_to():
  planned = plan('dmd', 'dmd2')
  assert all(stage.recipe.optimizer.clipped_together == () for stage in planned.values())
  planned = plan('dmd', 'dmd2', dmd__joint_clip=True, dmd2__joint_clip=True)
  together = {name: stage.recipe.optimizer.clipped_together for name, stage in planned.items()}
  assert together == {'base': (), 'dmd': ('fake_score',), 'dmd2': ('fake_score', 'head')}


MODERATE = [
  {'model__output': 'v'},
  {'model__output': 'eps', 'schedule__name': 'linear_beta'},
  {'model__output': 'eps', 'schedule__name': 'karras'},
  {'model__output': 'eps', 'schedule__logsnr_min': -13.0},
  {'model__output': 'eps', 'student__output': 'x'},
]


@pytest.mark.parametrize('name', ALL[1:])
def test_a_student_that_predicts_eps_is_refused_where_its_errors_explode(name):
  """At t = 1, where x is (z - sigma eps) / alpha; a schedule or an output as the message says is taken."""
  for changes in ({'model__output': 'eps'}, {'student__output': 'eps'}):
    with pytest.raises(UserError, match=rf'^{name}: .* 22,0\d\d times .* student\.output') as error:
      stages.check_output(plan(name, **changes)[name])
    assert '\n' not in str(error.value)
  for changes in MODERATE:
    stages.check_output(plan(name, **changes)[name])


def test_public_epsilon_teachers_are_below_the_limit_and_the_cosine_schedule_is_not():
  """DDPM's product of 1 - beta over its 1000 steps, beta from 1e-4 to 0.02, and e^10 by the cosine's last logsnr."""
  ddpm = 1 / np.sqrt(np.prod(1 - np.linspace(1e-4, 0.02, 1000)))
  gains = [1 / alpha_sigma(s(jnp.ones(1)), jnp.ones(1))[0][0] for s in (LinearBeta(), Cosine())]
  np.testing.assert_allclose(gains, [ddpm, np.exp(10)], rtol=0.04)
  assert gains[0] < stages.MAX_GAIN < gains[1]


def test_rounds_of_eps_are_planned_as_the_paper_s_table_of_outputs_needs_them():
  stages.check_output(plan('progressive', model__output='eps', weighting='snr')[ROUNDS[-1]])


def test_a_finished_student_of_eps_is_used_and_an_unfinished_one_is_not_trained(tmp_path):
  config = tiny.config(methods=('knowledge',), model__output='eps')
  planned, _ = workdirs.plan_for(tmp_path, config)
  with pytest.raises(UserError, match='knowledge: a student that predicts eps'):
    run._check(config, tmp_path, planned)
  (tmp_path / 'knowledge').mkdir()
  (tmp_path / 'knowledge' / 'stage.json').write_text('{"finished": true}')
  assert run._check(config, tmp_path, planned)[0] == {'knowledge'}
