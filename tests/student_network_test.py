"""Students whose network is not their teacher's: other width, depth and output, from training to samples."""

import json

import jax
import numpy as np
import pytest

import diffusion_distillation
from diffusion_distillation.errors import UserError
from tests import tiny

OTHER = {'student__ch': 12, 'student__num_res_blocks': 2, 'student__output': 'x'}
METHODS = ('knowledge', 'dmd')
OVERRIDES = OTHER | {
  'methods': METHODS,
  'pairs__num_pairs': 32,
  'pairs__num_steps': 2,
  'pairs__batch_size': 32,
  **{f'{name}__num_updates': 8 for name in METHODS},
  **{f'{name}__batch_size': 16 for name in METHODS},
}


@pytest.fixture(scope='module')
def workdir(finished, tmp_path_factory):
  path = tiny.with_extractor(tmp_path_factory.mktemp('students') / 'workdir', finished)
  code, _, err = tiny.run_cli(*tiny.flags(**OVERRIDES), f'--workdir={path}')
  assert code == 0, err
  return path


def size(params):
  return sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.slow
def test_teacher_and_students_are_trained_measured_and_loaded_with_their_own_networks(workdir):
  teacher = diffusion_distillation.load(workdir / 'base').stored
  rows = json.loads((workdir / 'results.json').read_text())['rows']
  for name in METHODS:
    student = diffusion_distillation.load(workdir / name).stored
    assert (teacher.denoise.output, student.denoise.output) == ('v', 'x')
    assert (teacher.denoise.network.ch, student.denoise.network.ch) == (8, 12)
    assert size(student.params) > 2 * size(teacher.params)
    assert [row['num_steps'] for row in rows if row['stage'] == name] == [1]


@pytest.mark.slow
@pytest.mark.parametrize('name', METHODS)
def test_a_student_learns_from_new_parameters(workdir, name):
  """Not from the teacher's, which do not fit."""
  lineage = json.loads((workdir / name / 'stage.json').read_text())
  assert lineage['parent']['stage'] == 'base' and lineage['start'] is None
  lines = [json.loads(line) for line in (workdir / name / 'metrics.jsonl').read_text().splitlines()]
  assert all(np.isfinite(line['loss']) for line in lines)


def test_the_fake_score_is_a_network_like_the_teachers():
  stages, _ = tiny.plan(**OVERRIDES)
  dmd = stages[-1]
  state = dmd.abstract_state
  assert size(state.params['fake_score']) == size(dmd.abstract_teacher)
  assert size(state.params['student']) == size(dmd.abstract_params) != size(dmd.abstract_teacher)


def test_students_without_keys_of_their_own_have_their_teachers_network():
  base, *others = tiny.plan(methods=METHODS)[0]
  assert all(stage.denoise == base.denoise and not stage.starts_anew for stage in others)
  assert all(stage.start == 'base' for stage in others)


def test_rounds_begin_with_new_parameters_and_go_on_with_the_round_before():
  base, first, second = tiny.plan(**OTHER)[0]
  assert base.starts_anew and first.starts_anew and not second.starts_anew
  assert first.teacher == base.denoise and second.teacher == first.denoise


@pytest.mark.parametrize(
  ('overrides', 'words'),
  [
    (
      {'student__conditional': True},
      'student.conditional: a student must have the conditioning of its teacher',
    ),
    (OTHER | {'knowledge__start': 'progressive_0001'}, 'is not one of'),
    ({'student__ch': 0}, 'student.ch=0 must be positive'),
    ({'student__num_groups': 7}, 'num_groups=7 does not divide'),
    ({'student__name': 'unett'}, "did you mean 'unet'"),
  ],
)
def test_what_does_not_fit_is_refused(overrides, words):
  with pytest.raises(UserError) as error:
    tiny.plan(methods=METHODS, **overrides)
  assert words in str(error.value)
