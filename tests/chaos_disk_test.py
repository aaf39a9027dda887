"""Disks that fill, turn read-only, lose a directory under a run, or are slow."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.errors import StorageError
from diffusion_distillation.system import checkpoints, logs
from diffusion_distillation.system.checkpoints import Checkpoints
from tests import disasters, tiny
from tests.disasters import LAST
from tests.restart_test import COMMAND, outcome, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ADVICE = 'run the same command again'


def mount(*arguments):
  """Mounts, or skips the test where that cannot be done."""
  if shutil.which('mount') is None or os.geteuid():
    pytest.skip('mounting needs root')
  done = subprocess.run(['mount', *map(str, arguments)], capture_output=True, text=True)
  if done.returncode:
    pytest.skip(f'mounting is not permitted: {done.stderr.strip()}')


@contextlib.contextmanager
def mounted(directory, *options):
  directory.mkdir(exist_ok=True)
  mount(*options, directory)
  try:
    yield directory
  finally:
    subprocess.run(['umount', '-l', str(directory)], check=True)


@pytest.fixture
def small(tmp_path):
  """A disk of its own, in memory."""
  with mounted(tmp_path / 'small', '-t', 'tmpfs', '-o', 'size=24m', 'tmpfs') as directory:
    yield directory


def fill(directory):
  """Leaves no byte free; returns what to remove."""
  path, state = directory / 'filler', os.statvfs(directory)
  with path.open('wb', buffering=0) as file:
    with contextlib.suppress(OSError):
      os.posix_fallocate(file.fileno(), 0, state.f_bavail * state.f_frsize)
    with contextlib.suppress(OSError):
      while True:
        os.write(file.fileno(), bytes(4096))
  assert not os.statvfs(directory).f_bavail
  return path


def run_until(moment, workdir):
  """Starts a run and returns it when the moment has come."""
  process = tiny.start_main(*COMMAND, f'--workdir={workdir}')
  if not wait_for(moment, process):
    pytest.fail(f'it ended too soon: {process.communicate()[1]}')
  return process


def newer(path, than):
  """Whether `path` was written after."""
  return path.exists() and path.stat().st_mtime_ns > than.stat().st_mtime_ns


def end_of(process):
  try:
    _, err = process.communicate(timeout=240)  # a guard against hanging
  finally:
    process.kill()
  return process.returncode, err


def assert_goes_on(workdir, finished):
  code, _, err = tiny.run_main(*COMMAND, f'--workdir={workdir}')
  assert code == 0 and 'Traceback' not in err, err
  assert outcome(workdir) == outcome(finished)


@pytest.mark.parametrize('moment', ['begun', 'saving', 'measured'])
def test_a_full_disk_stops_the_run_and_room_lets_it_go_on(finished, small, tmp_path, moment):
  workdir = shutil.copytree(finished, small / 'workdir')
  if moment == 'measured':
    (workdir / 'results.json').unlink()
  else:
    disasters.cut_back(workdir)
  mark = tmp_path / 'mark'
  mark.touch()
  moments = {
    'begun': lambda: newer(workdir / LAST / 'metrics.jsonl', mark),
    'saving': lambda: [*(workdir / LAST / 'checkpoints').glob('8*')],
    'measured': lambda: (workdir / 'results.partial.json').exists(),
  }
  process = run_until(moments[moment], workdir)
  filler = fill(small)
  code, err = end_of(process)
  assert code == 5, err
  disasters.assert_told(err, str(workdir), 'free up space', ADVICE)
  if moment != 'measured':
    assert disasters.load(workdir).step == 5
  filler.unlink()
  assert_goes_on(workdir, finished)


def test_a_disk_that_is_made_larger_is_enough(finished, small):
  """Full from the start: told before anything is done."""
  workdir = shutil.copytree(finished, small / 'workdir')
  disasters.cut_back(workdir)
  fill(small)
  code, _, err = tiny.run_main(*COMMAND, f'--workdir={workdir}')
  assert code in (2, 5)
  disasters.assert_told(err, str(workdir), 'free up space')
  mount('-o', 'remount,size=64m', small)
  assert_goes_on(workdir, finished)


def test_a_read_only_disk_is_refused_at_the_start(finished, small):
  workdir = shutil.copytree(finished, small / 'workdir')
  disasters.cut_back(workdir)
  mount('-o', 'remount,ro', small)
  code, _, err = tiny.run_main(*COMMAND, f'--workdir={workdir}')
  assert code in (2, 5)
  disasters.assert_told(err, str(workdir), 'ead-only')


def test_a_disk_that_turns_read_only_under_a_run(finished, tmp_path):
  """As ext4 does when it finds an error: writes fail, and what was not synced is lost."""
  image, directory, mark = tmp_path / 'disk', tmp_path / 'mounted', tmp_path / 'mark'
  with image.open('wb') as file:
    file.truncate(48 << 20)
  if shutil.which('mkfs.ext4') is None:
    pytest.skip('no mkfs.ext4')
  subprocess.run(['mkfs.ext4', '-q', '-F', str(image)], check=True)
  with mounted(directory, '-o', 'loop,errors=remount-ro', image):
    device = subprocess.check_output(['findmnt', '-no', 'SOURCE', str(directory)], text=True).strip()
    trigger = pathlib.Path('/sys/fs/ext4') / pathlib.Path(device).name / 'trigger_fs_error'
    if not trigger.exists():
      pytest.skip('this kernel cannot be told to find an error')
    workdir = shutil.copytree(finished, directory / 'workdir')
    disasters.cut_back(workdir)
    subprocess.run(['sync', '-f', str(directory)], check=True)
    mark.touch()
    process = run_until(lambda: newer(workdir / LAST / 'metrics.jsonl', mark), workdir)
    trigger.write_text('a test')
    code, err = end_of(process)
    assert code == 5, err
    disasters.assert_told(err, str(workdir), 'ead-only', ADVICE)
    assert disasters.load(workdir).step == 5
  with mounted(directory, '-o', 'loop', image):
    assert disasters.load(workdir).step == 5
    assert_goes_on(workdir, finished)


def test_a_stage_that_vanishes_under_a_run(finished, tmp_path):
  workdir, aside = shutil.copytree(finished, tmp_path / 'workdir'), tmp_path / 'aside'
  disasters.cut_back(workdir)
  (tmp_path / 'mark').touch()
  moment = lambda: newer(workdir / LAST / 'metrics.jsonl', tmp_path / 'mark')  # noqa: E731
  process = run_until(moment, workdir)
  (workdir / LAST).rename(aside)
  code, err = end_of(process)
  assert code == 5, err
  disasters.assert_told(err, str(workdir / LAST), 'vanished', ADVICE)
  assert not (workdir / LAST).exists()
  aside.rename(workdir / LAST)
  assert disasters.load(workdir).step == 5
  assert_goes_on(workdir, finished)


def test_checkpoints_that_vanish_under_a_run_are_written_anew_or_told(finished, tmp_path):
  workdir = shutil.copytree(finished, tmp_path / 'workdir')
  disasters.cut_back(workdir)
  (tmp_path / 'mark').touch()
  moment = lambda: newer(workdir / LAST / 'metrics.jsonl', tmp_path / 'mark')  # noqa: E731
  process = run_until(moment, workdir)
  shutil.rmtree(workdir / LAST / 'checkpoints')
  code, err = end_of(process)
  assert code in (0, 5) and 'Traceback' not in err, err
  if code:
    disasters.assert_told(err, str(workdir / LAST), ADVICE)
  assert_goes_on(workdir, finished)


# In this process.


def state_at(step):
  return {f'w{k}': jax.random.normal(jax.random.key(100 * step + k), (64, 100)) for k in range(8)}


def test_a_save_on_a_full_disk_leaves_the_one_before_whole(small):
  """The disk has room for two, not for a third."""
  saver = Checkpoints(small)
  for step in (1, 2):
    saver.save(step, state_at(step), 0.0)
  saver.wait()
  filler = fill(small)
  with pytest.raises(StorageError, match=r'checkpoint 3 .* from step 2; free up space'):
    saver.save(3, state_at(3), 0.0)
    saver.wait()
  saver.close()
  restored, _ = Checkpoints(small).restore(state_at(0), set_aside=False)
  jax.tree.map(np.testing.assert_array_equal, restored, state_at(2))
  filler.unlink()
  saver.save(3, state_at(3), 0.0)
  saver.close()
  assert saver.steps() == [2, 3]
  restored, _ = Checkpoints(small).restore(state_at(0), set_aside=False)
  jax.tree.map(np.testing.assert_array_equal, restored, state_at(3))


@pytest.mark.timeout(60)  # the test is that it does not wait for ever
@pytest.mark.parametrize('lines_too', [True, False])
def test_metrics_on_a_full_disk_raise_and_never_wait(small, tmp_path, lines_too):
  """Also where there is room for the lines and none for the events: more than a queue holds."""
  if not lines_too:
    (small / 'metrics.jsonl').symlink_to(tmp_path / 'metrics.jsonl')
  writer = logs.MetricsWriter(small, 0)
  fill(small)
  with pytest.raises(OSError, match='No space left'):
    for step in range(500):
      writer.write(step, {f'value_{k}': 1.0 for k in range(20)})
  with contextlib.suppress(OSError):
    writer.close()


def test_a_slow_disk_is_told(tmp_path, monkeypatch, caplog):
  monkeypatch.setattr(checkpoints, '_SLOW', 0.2)
  saver = Checkpoints(tmp_path)
  saver.save(1, {'w': jnp.zeros(3)}, 0.0)
  saver.wait()
  saver.save(2, {'w': jnp.zeros(3)}, 0.0)
  assert 'slow disk' not in caplog.text
  writes = saver._writer.wait
  monkeypatch.setattr(saver._writer, 'wait', lambda: (time.sleep(0.5), writes()))
  saver.save(3, {'w': jnp.zeros(3)}, 0.0)
  saver.close()
  assert 'slow disk: training waited' in caplog.text and str(tmp_path) in caplog.text
  assert 'raise checkpoint.every' in caplog.text
  assert saver.steps() == [2, 3]
