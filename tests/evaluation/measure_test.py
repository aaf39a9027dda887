"""How many samples a row takes."""

import types

import numpy as np
import pytest

from diffusion_distillation.evaluation import measure, results, sampling
from diffusion_distillation.evaluation.extracted import Extracted
from diffusion_distillation.evaluation.metrics import RunningFeatures
from diffusion_distillation.system import cluster
from tests import tiny

SIZE, FLOOR = 4096, 0.2


@pytest.fixture
def row(monkeypatch):
  """A row of a model whose samples have features about `shift`, and the real ones about 0; 64 a batch."""

  extractor = types.SimpleNamespace(metric='FD-test', of=lambda x: Extracted(np.float32(x)))
  reference = RunningFeatures(SIZE)
  reference.add(np.random.default_rng(0).normal(size=(SIZE, 4)).astype(np.float32))

  def measured(shift, tolerance, size=64):
    def batches(self, params, grid, num_samples, seed):
      rng = np.random.default_rng(1)
      for _ in range(-(-num_samples // size)):
        yield shift + rng.normal(size=(size, 4)), size

    monkeypatch.setattr(sampling.Drawer, 'batches', batches)
    config = tiny.config(evaluation__num_samples=SIZE, evaluation__tolerance=tolerance)
    model = types.SimpleNamespace(
      stage=tiny.plan()[0][0], params=None, weights='ema', step=0, digest='', seconds=0.0
    )
    setting = measure.Setting(model, 'ddim', 2)
    return measure.measure_setting(config, setting, extractor, reference.result(), FLOOR)[0]

  return measured


def test_without_tolerance_every_row_has_all_samples(row):
  assert row(3.0, 0.0)['num_drawn'] == SIZE


def test_a_row_takes_the_samples_that_its_error_asks_for(row):
  """FLOOR * SIZE / n < 0.05 * 36 as soon as n = 455; of the doublings of 64, 512 is the first beyond."""
  found = row(3.0, 0.05)
  assert found['num_drawn'] == 512
  assert found['value'] == pytest.approx(36.0, rel=0.05)
  assert row(30.0, 0.05)['num_drawn'] == 64


def test_one_sample_is_not_enough_to_estimate_an_error(row):
  """Of one there is no covariance; a row that stops early has drawn more."""
  assert row(3000.0, 0.9, size=1)['num_drawn'] == 2


def test_the_first_process_says_for_all_when_a_row_has_enough(row, monkeypatch):
  """The distances that processes compute may differ in their last bits."""
  monkeypatch.setattr(cluster, 'from_first', lambda value: True)
  assert row(0.5, 0.05)['num_drawn'] == 64


def test_a_row_near_the_floor_takes_all_samples(row):
  assert row(0.5, 0.05)['num_drawn'] == SIZE


def test_rows_of_another_tolerance_are_other_rows():
  model = types.SimpleNamespace(stage=tiny.plan()[0][0], weights='ema', step=0, digest='')
  setting = measure.Setting(model, 'ddim', 2)
  rows = [measure.describe(tiny.config(evaluation__tolerance=t), setting) for t in (0.0, 0.5)]
  assert results.key_of(rows[0]) != results.key_of(rows[1])
  assert results.key_of(rows[0]) == results.key_of({**rows[0], 'num_drawn': 7})
  older = {key: value for key, value in rows[0].items() if key != 'dtype'}  # from an older version
  assert (
    results.key_of(rows[0]) == results.key_of(older) != results.key_of({**older, 'dtype': 'bfloat16'})
  )
