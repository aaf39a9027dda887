"""The quality gate: its statistics against known distributions, its decisions, and stages that it trains for longer."""

import dataclasses
import json

import numpy as np
import pytest

from diffusion_distillation.errors import QualityError, UserError
from diffusion_distillation.evaluation.frechet import Moments
from diffusion_distillation.run import gate, loop
from diffusion_distillation.run.gate import Floor, Gate, Shortfall
from diffusion_distillation.stages import extending, provenance
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.stages.provenance import Model, Parents
from tests import tiny

PASSES = Shortfall(1.0, 1.0, 0.5, -0.5, 0.1)
FAILS = Shortfall(4.0, 1.0, 0.5, 2.5, 0.1)
GATE = {'gate__factor': 2.0, 'gate__samples': 200, 'evaluation__num_samples': 200}
CONFIG = tiny.config(**GATE)
STAGES, IMAGES = tiny.plan()
BASE, STUDENT, LAST = STAGES


def normal(rng, count, mean):
  """Features of a model whose Frechet distance to N(0, 1)^4 is mean^2."""
  return rng.normal(size=(count, 4)) + np.array([mean, 0.0, 0.0, 0.0])[None]


STANDARD = Moments(np.zeros(4), np.eye(4))


def of_perfect(rng, count):
  """The floor of `count` samples, from repetitions."""
  found = [gate.frechet_distance(gate.moments_of(normal(rng, count, 0.0)), STANDARD) for _ in range(200)]
  return Floor(np.mean(found), 0.0)


@pytest.mark.parametrize('count', [50, 400])
def test_the_floor_is_the_distance_of_as_many_samples_of_a_perfect_model(count):
  rng = np.random.default_rng(0)
  found = gate.floor_of(rng.normal(size=(20_000, 4)), count, 0)
  assert abs(found.value - of_perfect(rng, count).value) < 3 * found.error < found.value


@pytest.mark.parametrize('count', [60, 400])
def test_the_shortfall_is_unbiased_and_its_error_is_that_of_repetitions(count):
  """Student and teacher have the distances 1 and 0.25, so that the shortfall for the factor 2 is 0.5."""
  rng = np.random.default_rng(1)
  floor = of_perfect(rng, count)
  found = []
  for _ in range(150):
    student, teacher = normal(rng, count, 1.0), normal(rng, count, 0.5)
    found.append(gate.shortfall(student, teacher, STANDARD, floor, 2.0))
  values = np.array([one.value for one in found])
  assert values.mean() == pytest.approx(0.5, abs=3 * values.std() / np.sqrt(len(values)))
  assert np.mean([one.error for one in found]) == pytest.approx(values.std(), rel=0.25)


def test_a_student_as_bad_as_allowed_rarely_fails_and_a_worse_one_always():
  rng = np.random.default_rng(2)
  floor, fails = of_perfect(rng, 400), {0.5: 0, np.sqrt(0.5): 0, 1.2: 0}
  for mean in fails:
    for _ in range(60):
      teacher = normal(rng, 400, 0.5)
      student = normal(rng, 400, mean)
      fails[mean] += gate.shortfall(student, teacher, STANDARD, floor, 2.0).fails
  assert fails[0.5] == 0 and fails[1.2] == 60
  assert fails[np.sqrt(0.5)] <= 5  # 2.3 % of them, or a few more: the error is itself an estimate


def test_noise_that_student_and_teacher_share_cancels():
  rng, floor = np.random.default_rng(3), Floor(0.03, 0.01)
  teacher = normal(rng, 400, 0.5)
  same = gate.shortfall(teacher, teacher, STANDARD, floor, 1.0)
  other = gate.shortfall(normal(rng, 400, 0.5), teacher, STANDARD, floor, 1.0)
  assert same.value == same.error == 0.0 and not same.fails and other.error > 0.01
  assert gate.shortfall(teacher, teacher, STANDARD, floor, 2.0).error >= floor.error


def test_a_measurement_that_is_not_finite_fails():
  assert FAILS.fails and not PASSES.fails
  assert FAILS._replace(value=float('nan')).fails and not FAILS._replace(error=2.0).fails


@pytest.mark.parametrize(
  ('extra', 'limit', 'period', 'totals'),
  [
    (0.5, 3.0, 1, [12, 18, 24]),
    (0.3, 1.5, 1, [11, 12]),
    (0.3, 1.9, 4, [12]),
    (1.0, 1.0, 1, []),
  ],
)
def test_a_stage_grows_by_a_fraction_of_its_updates_up_to_the_limit(extra, limit, period, totals):
  config = tiny.config(gate__extra=extra, gate__limit=limit)

  @dataclasses.dataclass(frozen=True)
  class Turns:
    period: int

  recipe = dataclasses.replace(STUDENT.recipe, method=Turns(period))
  stage, found = dataclasses.replace(STUDENT, recipe=recipe), []
  while (total := gate.more_updates(stage, config)) is not None:
    stage = stage.lengthened(total)
    found.append(total)
  assert found == totals
  assert stage.planned_updates == (8 if totals else None)
  assert stage.earlier_ends == tuple([8, *totals][: len(totals)])


def model_of(stage, digest='a'):
  return Model(stage, 'ema', digest, stage.num_updates, 0.0, {})


def judged(monkeypatch, workdir, measured, stage=STUDENT, **changes):
  monkeypatch.setattr(Gate, '_measured', lambda *args: measured)
  return Gate(tiny.config(**GATE | changes), workdir, IMAGES).judge(model_of(stage), model_of(BASE))


def test_what_follows_from_a_measurement(monkeypatch, tmp_path, caplog):
  assert judged(monkeypatch, tmp_path, PASSES) is None and not caplog.text
  longer = judged(monkeypatch, tmp_path, FAILS)
  assert (longer.num_updates, longer.earlier_ends, longer.planned_updates) == (12, (8,), 8)
  assert 'progressive_0002 falls short of its teacher after 8 updates' in caplog.text
  caplog.clear()
  at_limit = STUDENT.lengthened(24)
  with pytest.raises(QualityError, match=r'raise gate\.limit=3 or gate\.factor.*or remove') as error:
    judged(monkeypatch, tmp_path, FAILS, at_limit)
  assert error.value.exit_code == 6 and '\n' not in str(error.value)
  assert judged(monkeypatch, tmp_path, FAILS, at_limit, gate__stop=False) is None
  assert 'the run continues' in caplog.text
  assert judged(monkeypatch, tmp_path, FAILS, at_limit, gate__limit=3.5).num_updates == 28
  assert judged(monkeypatch, tmp_path, PASSES, at_limit) is None


def test_a_stage_that_others_were_made_from_is_not_judged(monkeypatch, tmp_path):
  provenance.begin_stage(tmp_path, LAST, Parents(model_of(STUDENT), model_of(STUDENT)), CONFIG)
  assert judged(monkeypatch, tmp_path, FAILS) is None


def test_a_teacher_is_drawn_with_the_guidance_that_its_student_is_drawn_with():
  changes = {'model__conditional': True, 'dataset__label_dropout': 0.1, 'guided__weights': (1.0, 4.0)}
  changes |= {'methods': ('dmd', 'guided', 'progressive'), 'dmd__guidance': 2.0, 'pairs__guidance': 2.0}
  _, dmd, guided, first, _ = tiny.plan(**changes)[0]
  assert [gate.guidance_of(stage).weight for stage in (dmd, guided, first)] == [2.0, 1.0, 1.0]


def test_updates_before_an_earlier_end_are_those_of_the_shorter_stage():
  (_, student), _ = tiny.plan(methods=('consistency',), consistency__num_updates=8)
  longer = student.lengthened(12).lengthened(20)
  for update, end in ((0, 8), (7, 8), (8, 12), (11, 12), (12, 20), (19, 20)):
    recipe = longer.recipe_at(update)
    assert recipe.learning_rate['student'].num_updates == recipe.method.num_updates == end
  assert student.recipe_at(9).learning_rate['student'].num_updates == 8
  groups = list(
    loop._dispatches(iter(range(20)), longer, 0, tiny.config(compute__updates_per_dispatch=8))
  )
  assert [len(group) for group in groups] == [8, *[1] * 12]


def test_the_plan_of_a_workdir_has_the_updates_that_its_stages_record(tmp_path):
  longer = STUDENT.lengthened(12)
  for stage in (STUDENT, longer):
    provenance.begin_stage(tmp_path, stage, Parents(), CONFIG)
    path = tmp_path / stage.name / 'stage.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | {'finished': True}))
  assert extending.as_recorded(tmp_path, STUDENT) == longer
  assert extending.as_recorded(tmp_path, dataclasses.replace(STUDENT, num_updates=16)).earlier_ends == (
    8,
    12,
  )
  assert extending.as_recorded(tmp_path, BASE) == BASE
  planned = {stage.name: stage for stage in workdirs.stored_plan(tmp_path, tiny.config())}
  assert planned[STUDENT.name] == longer and planned[LAST.name].num_updates == LAST.num_updates
  assert provenance.is_finished(tmp_path, planned[STUDENT.name])
  extending.check_configs(tmp_path, list(planned.values()), tiny.config(gate__factor=3.0))


def test_a_gate_without_images_is_refused():
  with pytest.raises(UserError, match=r'gate\.factor=2 needs images'):
    gate.check(tiny.config(gate__factor=2.0, dataset__name='none'))
  assert gate.make_gate(tiny.config(), None, IMAGES) is None
  assert gate.make_gate(CONFIG, None, None) is None
