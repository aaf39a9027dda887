"""What a stage starts from, and what its batches are told."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from diffusion_distillation.networks.conditioning import Classes
from diffusion_distillation.run import inputs
from diffusion_distillation.stages.provenance import Model
from diffusion_distillation.system import sharding
from diffusion_distillation.system.checkpoints import digest
from tests import tiny

PLANNED = tiny.plan(methods=('dmd',), dmd__num_updates=10, dmd__batch_size=16)[0]
BASE, DMD = PLANNED


def model_of(stage, seed):
  params = sharding.to_host(stage.init_params(jax.random.key(seed)))
  return Model(stage, 'ema', digest(params), 1, 0.0, {'ema': params})


def test_a_student_starts_from_the_stage_that_is_named_and_the_fake_score_from_the_teacher():
  teacher, start = model_of(BASE, 0), model_of(BASE, 1)
  state = inputs.Inputs(None, teacher, start).first_state(DMD)
  assert digest(state.params['student']) == digest(state.ema_params[0]) == start.digest
  assert digest(state.params['fake_score']) == teacher.digest


def test_without_another_start_a_student_starts_from_its_teacher():
  teacher = model_of(BASE, 0)
  state = inputs.Inputs(None, teacher).first_state(dataclasses.replace(DMD, start=None))
  assert digest(state.params['student']) == teacher.digest


@pytest.mark.parametrize('i', [0, 3])
def test_processes_share_the_conditions_of_a_batch(monkeypatch, i):
  parts = []
  for index in range(4):
    monkeypatch.setattr(sharding, 'part', lambda index=index: (index, 4))
    parts.append(inputs._part(i, 8))
  np.testing.assert_array_equal(np.concatenate(parts), np.arange(8 * i, 8 * i + 8))


def test_a_stage_without_images_is_told_labels_in_the_proportions_of_the_data(tmp_path):
  told = {
    'model__conditional': True,
    'dmd__num_updates': 10,
    'dmd__batch_size': 16,
    'dmd__regression': 0.0,
  }
  base, dmd = tiny.plan(methods=('dmd',), **told)[0]
  assert 'images' not in dmd.recipe.method.needs
  sizes = [5, 1, 1, 1, 1, 1, 1, 1, 1, 7]
  (tmp_path / 'dataset.json').write_text(json.dumps({'label_counts': sizes}))
  gathered = inputs.gather(dmd, {'base': model_of(base, 0)}, None, tmp_path)
  labels = np.concatenate([batch['cond']['label'] for batch in gathered.batches(dmd, 2)])
  expected = Classes(10).proportional(np.arange(2 * 16, 10 * 16), dmd.recipe.seed, sizes)
  np.testing.assert_array_equal(labels, expected)
  unknown = dataclasses.replace(gathered, label_counts=())
  assert next(unknown.batches(dmd, 2))['cond']['label'].tolist() == [k % 10 for k in range(32, 48)]


def test_a_further_attempt_is_told_other_labels(tmp_path):
  told = {'model__conditional': True, 'dmd__num_updates': 10, 'dmd__batch_size': 16}
  dmd = tiny.plan(methods=('dmd',), dmd__regression=0.0, **told)[0][1]
  given, again = inputs.Inputs(None, label_counts=(1,) * 10), dataclasses.replace(dmd, attempts=(4,))
  labels = [batch['cond']['label'] for batch in given.batches(again, 0)]
  for k, found in enumerate(labels):
    seed, index = again.seed_at(k), np.arange(16 * k, 16 * k + 16)
    np.testing.assert_array_equal(found, Classes(10).proportional(index, seed, (1,) * 10))
  assert (labels[4] != next(given.batches(dmd, 4))['cond']['label']).any()
