"""Runs with guidance through main.py: pairs, the first round, DMD, rows by weight, parameters split over devices, two stages."""

import json

import numpy as np
import pytest

from tests import tiny

pytestmark = pytest.mark.slow

OVERRIDES = {
  'model__conditional': True,
  'dataset__label_dropout': 0.2,
  'train__warmup': 0,
  'train__learning_rate': 1e-2,
  'train__ema_decay': (0.0,),
  'methods': ('progressive', 'dmd'),
  'distill__guidance': 1.5,
  'distill__end_steps': 2,
  'pairs__guidance': 1.5,
  'pairs__num_pairs': 32,
  'pairs__sampler': 'ddim',
  'pairs__num_steps': 4,
  'pairs__batch_size': 16,
  'dmd__num_updates': 6,
  'dmd__learning_rate': 1e-7,
  'dmd__fake_learning_rate': 1e-7,
  'dmd__batch_size': 16,
  'dmd__guidance': 1.5,
  'evaluation__samplers': ('ddim',),
  'mesh__fsdp': 2,
}


def rows(workdir):
  found = json.loads((workdir / 'results.json').read_text())['rows']
  return {(row['stage'], row['num_steps'], row['guidance']): row for row in found}


def test_a_run_is_distilled_with_guidance_and_measured_by_weight(fresh):
  workdir = fresh
  code, _, err = tiny.run_main(*tiny.flags(**OVERRIDES), f'--workdir={workdir}', devices=2)
  assert code == 0, err
  assert json.loads((workdir / 'pairs' / 'pairs.json').read_text())['guidance'] == 1.5
  before = rows(workdir)
  assert {guidance for *_, guidance in before} == {0.0}

  # Weights of the evaluation may change; what is measured is not measured again.
  more = tiny.flags(**OVERRIDES | {'evaluation__guidance': (0.0, 2.0)})
  code, _, err = tiny.run_main(*more, f'--workdir={workdir}', devices=2)
  assert code == 0, err
  after = rows(workdir)
  assert {key: row for key, row in after.items() if key in before} == before
  new = {key: row['nfe'] for key, row in after.items() if key not in before}
  assert new == {('base', steps, 2.0): 2 * steps for _, steps, guidance in new}
  assert '<th>guidance</th>' in (workdir / 'report' / 'index.html').read_text()

  # The guidance that made a stage may not.
  code, _, err = tiny.run_main(
    *tiny.flags(**OVERRIDES | {'distill__guidance': 1.0}), f'--workdir={workdir}', devices=2
  )
  assert code == 2 and 'distill.guidance was 1.5, is 1.0' in err

  # The fake score starts from the teacher, so that without guidance both would be the same at first.
  first = json.loads((workdir / 'dmd' / 'metrics.jsonl').read_text().splitlines()[0])
  assert first['dm_gradient'] > 1e-3


STAGES = ('guided', 'progressive_0002', 'progressive_0001', 'dmd')
IN_TWO_STAGES = {
  **OVERRIDES,
  'methods': ('guided', 'progressive', 'dmd'),
  'distill__end_steps': 1,
  **{f'{section}__guidance': 0.0 for section in ('distill', 'pairs', 'dmd')},
  'guided__num_updates': 8,
  'guided__batch_size': 16,
  'guided__learning_rate': 1e-9,
  'evaluation__guidance': (0.0, 2.0, 9.0),
}


def test_all_students_after_the_first_stage_take_the_weight(fresh, tmp_path):
  workdir = fresh
  code, _, err = tiny.run_main(*tiny.flags(**IN_TWO_STAGES), f'--workdir={workdir}', devices=2)
  assert code == 0, err
  check_two_stages(workdir)
  out = tmp_path / 'x.npz'
  sampling = ('--mode=sample', f'--workdir={workdir}', '--num_samples=4', f'--out={out}')
  code, line, err = tiny.run_main(*sampling, '--stage=dmd', '--guidance=9')
  assert code == 0 and ', 1 network call each' in line
  assert '--guidance=9: this model was trained with weights from 0 to 4' in err


def check_two_stages(workdir):
  found = rows(workdir)
  measured = {(stage, guidance): row['nfe'] for (stage, _, guidance), row in found.items()}
  steps = dict(zip(STAGES, (4, 2, 1, 1), strict=True))
  assert {key: calls for key, calls in measured.items() if key[0] != 'base'} == {
    (stage, guidance): steps[stage] for stage in STAGES for guidance in (0.0, 2.0)
  }
  # The first stage, whose learning rate is tiny here, starts as the base without guidance, for every weight.
  base = found['base', 4, 0.0]['value']
  for guidance in (0.0, 2.0):
    assert found['guided', 4, guidance]['value'] == pytest.approx(base, rel=1e-3)
  for stage in STAGES:
    described = json.loads((workdir / stage / 'model' / 'model.json').read_text())
    assert described['conditioning']['guidance'] == {'low': 0.0, 'high': 4.0}
    lineage = json.loads((workdir / stage / 'stage.json').read_text())
    teachers = {'guided': 'base', 'progressive_0001': 'progressive_0002'}
    assert lineage['parent']['stage'] == teachers.get(stage, 'guided') == lineage['start']['stage']
  weights = np.concatenate(
    [np.load(path)['guidance'] for path in sorted((workdir / 'pairs').glob('*.npy'))]
  )
  assert weights.min() < 0.2 and weights.max() > 3.8 and len(set(weights)) == 32
  # The fake score starts as the teacher, and both are told the same weight.
  first = json.loads((workdir / 'dmd' / 'metrics.jsonl').read_text().splitlines()[0])
  assert first['dm_gradient'] < 1e-3
