"""Killed at random moments, again and again; and of several processes, one."""

import contextlib
import json
import random
import shutil
import signal
import socket
import subprocess
import time

import pytest

from tests import disasters, tiny
from tests.restart_test import COMMAND, STAGES, outcome, steps_logged, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(2400)]

LONGEST = 1.2  # until a kill, in units of the time that the start took: machines differ


def marks(workdir):
  """When each file was written that tells of work done; those are left out that every start writes."""
  if not workdir.is_dir():
    return {}
  found = {}
  for path in workdir.rglob('*'):
    with contextlib.suppress(FileNotFoundError):  # it goes while we look
      if path.name not in ('.lock', 'config.json', 'dataset.json') and path.is_file():
        found[path] = path.stat().st_mtime_ns
  return found


def where(workdir):
  """The stage that a kill hit; None: the measuring after all of them."""
  for name in STAGES:
    path = workdir / name / 'stage.json'
    if not path.is_file() or not json.loads(path.read_text())['finished']:
      return name
  return None


def cut_back_to(workdir, place, step):
  """A finished run as it was after `step` updates of its stage at `place`; place 3: not yet measured."""
  for name in ('results.json', 'results.partial.json', 'extractor.safetensors'):
    (workdir / name).unlink(missing_ok=True)
  for name in STAGES[place + 1 :]:
    disasters.cut_back(workdir, name, 0)
  if place < len(STAGES):
    disasters.cut_back(workdir, STAGES[place], step)


def killed_at_random(command, workdir, chance):
  """Starts a run and kills it; returns whether it was still alive."""
  before = marks(workdir)
  began = time.monotonic()
  process = tiny.start_main(*command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
  try:
    if wait_for(lambda: marks(workdir) != before, process):
      with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(chance.uniform(0, LONGEST) * (time.monotonic() - began))
  finally:
    process.kill()
    process.wait()
  assert process.returncode in (0, -signal.SIGKILL)
  return process.returncode == -signal.SIGKILL


def test_killed_at_random_moments_it_ends_like_the_uninterrupted_run(finished, tmp_path):
  """Killed in the measuring and in each stage, saving after each update, so often in the midst of it."""
  chance = random.Random(0)
  workdir = shutil.copytree(finished, tmp_path / 'workdir')
  command = [*COMMAND, '--config.checkpoint.every=1', f'--workdir={workdir}']
  hit = []
  for place in reversed(range(len(STAGES) + 1)):
    cut_back_to(workdir, place, step=7)
    if killed_at_random(command, workdir, chance):
      hit.append(where(workdir))
  assert len(set(hit)) >= 2, hit
  code, _, err = tiny.run_main(*command)
  assert code == 0 and 'damaged' not in err, err
  assert outcome(workdir) == outcome(finished)
  for stage in STAGES:
    assert steps_logged(workdir, stage) == steps_logged(finished, stage)
    assert not (workdir / stage / 'damaged').exists()


def test_killed_before_its_first_update_it_starts_over(finished, tmp_path):
  """While it finds out what there is to do, and while it compiles."""
  chance = random.Random(1)
  workdir = shutil.copytree(finished, tmp_path / 'workdir')
  disasters.cut_back(workdir)
  for _ in range(2):
    process = tiny.start_main(*COMMAND, f'--workdir={workdir}')
    time.sleep(chance.uniform(1, 10))
    process.kill()
    process.communicate()
  code, _, err = tiny.run_main(*COMMAND, f'--workdir={workdir}')
  assert code == 0, err
  assert outcome(workdir) == outcome(finished)


# Several processes.


def two(workdir, *flags):
  """Starts both processes of a run on this machine."""
  with socket.socket() as free:
    free.bind(('127.0.0.1', 0))
    port = free.getsockname()[1]
  command = [*COMMAND, *flags, f'--workdir={workdir}', f'--coordinator=127.0.0.1:{port}']
  command += ['--num_processes=2', '--peer_timeout=10']
  return [tiny.start_main(*command, f'--process_id={k}') for k in range(2)]


@contextlib.contextmanager
def ended(processes):
  """None of them outlives the test."""
  try:
    yield processes
  finally:
    for process in processes:
      process.kill()
      process.wait()


LONG = ('--config.train.num_updates=400', '--config.checkpoint.every=5')


def saved(workdir):
  return [int(path.name) for path in (workdir / 'base' / 'checkpoints').glob('*') if path.name.isdigit()]


def test_when_one_process_is_killed_the_other_ends_by_itself_and_both_go_on(tmp_path):
  workdir = tmp_path / 'workdir'
  with ended(two(workdir, *LONG)) as (first, second):
    assert wait_for(lambda: saved(workdir), first), first.communicate()[1]
    second.kill()
    began = time.monotonic()
    first.communicate(timeout=120)
    assert first.returncode not in (0, None)
    assert time.monotonic() - began < 60
  step = max(saved(workdir))
  with ended(two(workdir, *LONG)) as both:
    assert wait_for(lambda: max(saved(workdir), default=0) > step, both[0]), both[0].communicate()[1]
    for process in both:
      process.send_signal(signal.SIGTERM)
    errs = [process.communicate(timeout=240)[1] for process in both]
    assert [process.returncode for process in both] == [75, 75], errs
    assert not any('damaged' in err for err in errs), errs
  assert max(saved(workdir)) > step


def test_sigterm_to_one_process_stops_both_at_the_same_step(tmp_path):
  workdir = tmp_path / 'workdir'
  with ended(two(workdir, *LONG)) as both:
    assert wait_for(lambda: saved(workdir), both[0]), both[0].communicate()[1]
    both[1].send_signal(signal.SIGTERM)
    errs = [process.communicate(timeout=240)[1] for process in both]
  assert [process.returncode for process in both] == [75, 75], errs
  for err in errs:
    disasters.assert_told(err, 'SIGTERM', 'run the same command again')
  step = max(saved(workdir))
  lines = (workdir / 'base' / 'metrics.jsonl').read_text().splitlines()
  assert all(json.loads(line)['step'] <= step for line in lines)
  assert json.loads((workdir / 'base' / 'stage.json').read_text())['finished'] is False
