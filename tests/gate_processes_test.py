"""The quality gate, and measurements during training, in a run of two processes."""

import json

import pytest

from tests import tiny
from tests.processes_test import free_port

FLAGS = tiny.flags(
  train__num_updates=6,
  distill__end_steps=2,
  distill__learning_rate=(1.0,),
  evaluation__samplers=('ddim',),
  evaluation__neighbours=0,
  log__frechet_every=4,
  log__frechet_samples=40,
  gate__factor=1.0,
  gate__samples=60,
  gate__limit=2.0,
  gate__stop=False,
)
NAME = 'progressive_0002'


def start(workdir, count):
  """Runs the config in `count` processes, with two devices in all; returns the exit codes and the last process's log."""
  address = f'127.0.0.1:{free_port()}'
  processes = []
  for k in range(count):
    several = (f'--coordinator={address}', f'--num_processes={count}', f'--process_id={k}')
    own = several if count > 1 else ('--num_processes=1',)
    processes.append(tiny.start_main(f'--workdir={workdir}', *FLAGS, *own, devices=2 // count))
  logs = [process.communicate(timeout=900)[1] for process in processes]
  return [process.returncode for process in processes], logs[0]


def read(path):
  return json.loads(path.read_text())


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_processes_judge_a_student_as_one_does(finished, tmp_path):
  """A student that was spoiled fails twice, is trained for longer by both processes, and the run goes on at the limit."""
  found = {}
  for name, count in (('one', 1), ('two', 2)):
    codes, log = start(tiny.with_extractor(tmp_path / name, finished), count)
    assert codes == [0] * count, log
    assert 'training it to 12 updates' in log and 'the run continues with it' in log
    found[name] = [read(tmp_path / name / NAME / f'{file}.json') for file in ('gate', 'stage', 'track')]
  (one_gate, one_stage, one_track), (two_gate, two_stage, two_track) = found.values()
  assert [check['updates'] for check in one_gate['checks']] == [8, 12, 16]
  for one, two in zip(one_gate['checks'], two_gate['checks'], strict=True):
    assert (one['updates'], one['passed'], one['extractor']) == (
      two['updates'],
      two['passed'],
      two['extractor'],
    )
    for key in ('student', 'teacher', 'floor', 'value', 'error'):
      assert two[key] == pytest.approx(one[key], rel=1e-2), key
  assert one_stage['extended_from'] == two_stage['extended_from'] == [8, 12]
  assert one_stage['num_updates'] == two_stage['num_updates'] == 16
  assert list(two_track['frechet']) == list(one_track['frechet']) == ['4', '8', '12', '16']
  assert two_track['frechet'] == pytest.approx(one_track['frechet'], rel=1e-2)
  rows = [read(tmp_path / name / 'results.json')['rows'] for name in found]
  for one, two in zip(*rows, strict=True):
    assert two['value'] == pytest.approx(one['value'], rel=1e-2) and one['updates'] == two['updates']
