"""How many samples a row takes."""

import errno
import types

import numpy as np
import pytest

from diffusion_distillation.errors import DamagedError
from diffusion_distillation.evaluation import measure, report_contents, results, row_batches, sampling
from diffusion_distillation.evaluation.extracted import Extracted, Extractors
from diffusion_distillation.evaluation.metrics import RunningFeatures
from diffusion_distillation.evaluation.yardstick import Yardstick
from diffusion_distillation.system import cluster
from tests import tiny

SIZE, FLOOR = 4096, 0.2


@pytest.fixture
def row(monkeypatch):
  """A row of a model whose samples have features about `shift`, and the real ones about 0; 64 a batch."""

  extractor = types.SimpleNamespace(metric='FD-test', digest='', of=lambda x: Extracted(np.float32(x)))
  reference = RunningFeatures(SIZE)
  reference.add(np.random.default_rng(0).normal(size=(SIZE, 4)).astype(np.float32))

  def measured(shift, tolerance, size=64, workdir=None, stops=None, asked=None, seed=1, count=SIZE):
    asked = [] if asked is None else asked

    def batches(self, params, grid, num_samples, seed, first=0):
      rng = np.random.default_rng(1)
      for start in range(0, num_samples, size):
        drawn = shift + rng.normal(size=(size, 4))
        if start == stops:
          raise KeyboardInterrupt
        if start >= first:
          asked.append(start)
          yield drawn, size

    monkeypatch.setattr(sampling.Drawer, 'batches', batches)
    config = tiny.config(
      evaluation__num_samples=count, evaluation__tolerance=tolerance, evaluation__seed=seed
    )
    model = types.SimpleNamespace(
      stage=tiny.plan()[0][0], params=None, weights='ema', step=0, digest='', seconds=0.0
    )
    setting = measure.Setting(model, 'ddim', 2)
    by = Yardstick(Extractors(extractor), reference.result(), FLOOR)
    found, first = measure.measure_setting(config, setting, by, workdir)
    assert len(first) == min(found['num_drawn'], report_contents.SHOWN)
    return found | {'seconds_per_image': 0.0}

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


@pytest.mark.parametrize(('tolerance', 'drawn'), [(0.0, 640), (0.05, 128)])
def test_an_interrupted_row_goes_on_where_it_was(row, tmp_path, tolerance, drawn):
  """Its value is that of the uninterrupted row, bit for bit; only the batch that was on its way is drawn again."""
  expected, asked = row(3.0, tolerance, size=32, count=640), []
  for stops in (64, 96):
    with pytest.raises(KeyboardInterrupt):
      row(3.0, tolerance, 32, tmp_path, stops, asked, count=640)
  assert row(3.0, tolerance, 32, tmp_path, None, asked, count=640) == expected
  assert expected['num_drawn'] == drawn
  compiling = [0]  # each start draws an image to compile the program
  assert asked[:8] == [*compiling, 0, 32, *compiling, 32, 64, *compiling, 64]
  assert not (tmp_path / row_batches.FOLDER).exists()


def test_batches_of_another_row_are_not_used(row, tmp_path):
  with pytest.raises(KeyboardInterrupt):
    row(3.0, 0.0, workdir=tmp_path, stops=320, count=512)
  asked = []
  row(3.0, 0.0, workdir=tmp_path, asked=asked, seed=2, count=512)
  assert {64, 128, 192} <= set(asked)


@pytest.mark.parametrize('kept', [0, 100])
def test_damaged_batches_are_one_line_and_drawn_again(row, tmp_path, kept):
  with pytest.raises(KeyboardInterrupt):
    row(3.0, 0.0, workdir=tmp_path, stops=320, count=512)
  path = tmp_path / row_batches.FOLDER / '000001.npz'
  path.write_bytes(path.read_bytes()[:kept])
  with pytest.raises(DamagedError, match=r'000001\.npz is damaged .* run the same command again'):
    row(3.0, 0.0, workdir=tmp_path, count=512)
  assert row(3.0, 0.0, workdir=tmp_path, count=512) == row(3.0, 0.0, count=512)


def test_a_row_is_measured_though_the_disk_is_full(row, tmp_path, monkeypatch, caplog):
  def full(*_, **__):
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(row_batches.np, 'savez', full)
  assert row(3.0, 0.0, workdir=tmp_path, count=512) == row(3.0, 0.0, count=512)
  assert caplog.text.count('No space left on device; if this row is interrupted') == 1
  assert not (tmp_path / row_batches.FOLDER).exists()


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
