"""The benchmark of schedules with a quality gate."""

import copy

import pytest

from benchmarks import ablation, schedules
from configs import digits
from tests import tiny


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
