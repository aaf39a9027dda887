"""The benchmark of schedules: its rows, costs, tables and figure, and the devices that it runs on."""

import copy
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import ablation, schedules
from configs import digits
from tests import tiny


def test_devices_are_started_as_in_a_run_before_anything_uses_jax(monkeypatch, tmp_path):
  done = []
  monkeypatch.setattr(sys, 'argv', ['schedules.py', f'--workdir={tmp_path}', '--seeds=2'])
  monkeypatch.setattr(ablation.interrupts, 'install', lambda: None)
  monkeypatch.setattr(ablation.platforms, 'start', lambda: done.append('devices'))
  monkeypatch.setattr(ablation, 'Bench', lambda workdir, scale: done.append('bench'))
  ablation.main('', {'part': lambda bench, seed: done.append(seed)}, lambda bench: '')
  assert done == ['devices', 'bench', 0, 1]


def test_the_figure_of_schedules_has_means_over_seeds_with_bars():
  """Two seeds of one schedule and one of another; the costs of the base model count."""

  def rows(name, seed, num_steps, value):
    costs = {'base_calls': 4000, 'calls': 1000, 'base_seconds': 60.0, 'seconds': 60.0 * (seed + 1)}
    return {'part': name, 'seed': seed, 'num_steps': num_steps, 'value': value, **costs}

  found = [
    rows('demo', 0, 4, 3.0),
    rows('demo', 1, 4, 5.0),
    rows('demo', 1, 1, 8.0),
    rows('short', 1, 1, 9.0),
  ]
  evaluations, minutes = schedules.figure(found).axes
  demo, short = minutes.containers
  assert [one.get_label() for one in minutes.containers] == ['demo', 'short']
  assert demo[0].get_xydata().tolist() == [[2.5, 4.0], [3.0, 8.0]]
  assert short[0].get_xydata().tolist() == [[3.0, 9.0]]
  deviations = [[np.ptp(line, axis=0).max() / 2 for line in bars.get_segments()] for bars in demo[2]]
  np.testing.assert_allclose(deviations, [[0.5**0.5, 0.0], [2**0.5, 0.0]], rtol=1e-6)
  assert evaluations.containers[0][0].get_xydata().tolist() == [[5.0, 4.0], [5.0, 8.0]]
  assert [text.get_text() for text in minutes.texts] == ['4', '1', '1']


@pytest.mark.slow
def test_schedules_share_a_base_and_count_what_each_costs(monkeypatch, tmp_path):
  """Rounds that halve and one that quarters share a base model; each row exists once, with its costs, and is in the tables."""
  changes = {'distill__start_steps': 4, 'train__num_updates': 2, 'train__batch_size': 8}
  config = tiny.config(**changes, distill__batch_size=8, evaluation__num_samples=64)
  monkeypatch.setattr(digits, 'get_config', lambda: copy.deepcopy(config))
  halves = schedules.Schedule(factor=(2,), updates=(2,), rates=(1e-3,))
  quarter = schedules.Schedule(factor=(4,), updates=(1,), rates=(1e-3,))
  monkeypatch.setattr(schedules, 'SCHEDULES', {'halves': halves, 'quarter': quarter})
  monkeypatch.setattr(schedules, 'STEPS', (4, 2, 1))
  bench = ablation.Bench(tmp_path, 1.0)
  for _ in range(2):
    for name in schedules.SCHEDULES:
      schedules.run(name, bench, 3)
  rows = {(row['part'], row['num_steps']): row for row in bench.rows}
  assert sorted(rows) == [('halves', 1), ('halves', 2), ('halves', 4), ('quarter', 1), ('quarter', 4)]
  assert len(bench.rows) == len(rows) and all(row['seed'] == 3 for row in bench.rows)
  assert rows['halves', 4]['value'] == rows['quarter', 4]['value'] != rows['halves', 2]['value']
  # A round by halves calls the student once and the teacher twice for each of 8 images, one by quarters 1 + 4.
  assert [rows[key]['updates'] for key in (('halves', 4), ('halves', 2), ('halves', 1))] == [0, 2, 4]
  assert [rows[key]['calls'] for key in (('halves', 1), ('quarter', 1))] == [4 * 8 * 3, 8 * 5]
  assert rows['quarter', 1]['base_calls'] == 2 * 8 and rows['quarter', 1]['seconds'] > 0
  quality, _, to_one = schedules.tables(bench.rows)
  assert schedules.write(bench) == (tmp_path / 'schedules.md').read_text().rstrip()
  assert len(Image.open(tmp_path / 'schedules.png').getcolors(1 << 20)) > 20
  assert f'| quarter | {rows["quarter", 4]["value"]:.3g} |  | ' in quality.replace('not measured', '')
  assert '| halves | 2 | 4 | 2.00 | 6.00 | ' in to_one


@pytest.mark.slow
def test_a_gated_schedule_counts_the_updates_that_the_gate_has_added(monkeypatch, tmp_path):
  changes = {'distill__start_steps': 2, 'train__num_updates': 2, 'train__batch_size': 8}
  gate = {'gate__samples': 40}
  config = tiny.config(**changes, **gate, distill__batch_size=8, evaluation__num_samples=64)
  monkeypatch.setattr(digits, 'get_config', lambda: copy.deepcopy(config))
  spoiled = schedules.Schedule(updates=(2,), rates=(10.0,), gate=1.0)
  monkeypatch.setattr(schedules, 'SCHEDULES', {'gated': spoiled})
  monkeypatch.setattr(schedules, 'STEPS', (2, 1))
  monkeypatch.setattr(schedules.Schedule, 'config', limited(schedules.Schedule.config))
  bench = ablation.Bench(tmp_path, 1.0)
  for _ in range(2):
    schedules.run('gated', bench, 3)
  assert [(row['num_steps'], row['updates']) for row in bench.rows] == [(2, 0), (1, 18)]
  assert '| gated | 2 | 18 | 9.00 |' in list(schedules.tables(bench.rows))[2]


def limited(make):
  """The config of a schedule, with a smaller limit."""

  def config(self, *args):
    found = make(self, *args)
    assert found.gate.factor == self.gate
    found.gate.extra, found.gate.limit = 8.0, 9.0
    return found

  return config
