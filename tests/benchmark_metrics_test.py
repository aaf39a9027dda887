"""The benchmark of metrics at a small size; the others are in benchmarks_test.py."""

import pytest

from benchmarks import metrics
from diffusion_distillation.evaluation.metrics import METRICS


def test_every_metric_has_a_line(capsys):
  metrics.main(['--samples=30', '--reference=20', '--features=3', '--classes=4'])
  lines = capsys.readouterr().out.splitlines()
  assert [line.split(' | ')[0].strip('| ') for line in lines[2:]] == list(METRICS)
  with pytest.raises(SystemExit, match='at least 2 samples'):
    metrics.main(['--samples=1'])
