"""A run with guidance through main.py: pairs, the first round, DMD, rows by weight, and parameters split over devices."""

import json

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


def test_a_run_is_distilled_with_guidance_and_measured_by_weight(tmp_path):
  workdir = tmp_path / 'workdir'
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
