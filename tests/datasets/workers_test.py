"""Processes that read images, started from scripts, from stdin, and from threads."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest

from diffusion_distillation.datasets.loading import Loader
from tests import tiny, tiny_pictures

SCRIPT = """
from diffusion_distillation.datasets.loading import Loader
from tests import tiny_pictures

class Own(tiny_pictures.Numbers):
  pass

if __name__ == '__main__':
  for images in (tiny_pictures.numbers(8), Own('own', (1, 1, 1), (), '', 8)):
    loader = Loader(images, workers=1)
    try:
      print(next(loader.in_order(4))['image'].ravel().tolist(), flush=True)
    except Exception as error:
      print(type(error).__name__, error)
    loader.close()
"""


def test_the_main_module_stays_where_it_is(monkeypatch):
  """Another thread may import, pickle or start processes meanwhile."""
  main, seen = sys.modules['__main__'], []

  def state(images):
    seen.append(sys.modules['__main__'])
    return images.__dict__

  monkeypatch.setattr(tiny_pictures.Numbers, '__getstate__', state, raising=False)
  with contextlib.closing(Loader(tiny_pictures.numbers(8), workers=1)) as loader:
    assert next(loader.in_order(4))['image'].ravel().tolist() == [0, 1, 2, 3]
  assert seen and all(module is main for module in seen)


@pytest.mark.parametrize('where', ['file', 'stdin'])
def test_a_script_s_own_images_are_read_by_processes_where_it_has_a_file(tmp_path, where):
  """Others are in any case: nothing has to be guarded or imported again."""
  path = tmp_path / 'main.py'
  path.write_text(SCRIPT)
  command = [sys.executable, path if where == 'file' else '-']
  environment = os.environ | {'PYTHONPATH': str(tiny.ROOT)}
  done = subprocess.run(
    command, input=SCRIPT, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
  )
  others, own = done.stdout.splitlines()
  assert others == '[0, 1, 2, 3]'
  refused = 'UserError own: its class is defined in the main module, which has no file'
  assert own == others if where == 'file' else own.startswith(refused), done.stderr


def test_what_a_set_raises_in_a_process_arrives_and_the_process_goes_on():
  images = tiny_pictures.Unreadable('numbers', (1, 1, 1), (), '', 8)
  with contextlib.closing(Loader(images, workers=1)) as loader:
    stream = loader.in_order(4)
    with pytest.raises(OSError, match='the disk is gone'):
      next(stream)
    assert len(tiny_pictures.workers()) == 1  # it goes on


def test_an_error_that_cannot_be_read_again_arrives_as_its_text():
  images = tiny_pictures.Peculiar('numbers', (1, 1, 1), (), '', 8)
  with contextlib.closing(Loader(images, workers=1)) as loader:
    with pytest.raises(RuntimeError, match=r'TwoPartError.*x\.png: the disk is gone'):
      next(loader.in_order(4))
    assert len(tiny_pictures.workers()) == 1  # it goes on


def test_workers_know_no_jax_and_do_not_heed_the_signals_of_the_main_process():
  with contextlib.closing(Loader(tiny_pictures.numbers(400), workers=1)) as loader:
    stream = loader.in_order(4)
    found = [next(stream)]
    (pid,) = tiny_pictures.workers()
    for number in (signal.SIGINT, signal.SIGTERM):
      os.kill(pid, number)
    found += stream
    assert tiny_pictures.workers() == {pid}
  assert [int(batch['image'][0, 0, 0, 0]) for batch in found] == [k % 256 for k in range(0, 400, 4)]
  assert not any(batch['cond']['label'].any() for batch in found)
  assert not tiny_pictures.workers()


def test_a_worker_that_is_killed_is_an_error_at_once_though_another_is_stuck_in_a_read(tmp_path):
  body = """
loader = Loader(tiny_pictures.numbers(1000, stuck=sys.argv[1]), workers=2)
stream = loader.in_order(4)
next(stream)
while len(list(pathlib.Path(sys.argv[1]).iterdir())) < 2:
  time.sleep(0.01)
os.kill(min(tiny_pictures.workers()), signal.SIGKILL)
try:
  next(stream)
except Exception as error:
  print(type(error).__name__, error)
loader.close()
print(len(tiny_pictures.workers()))
print(next(loader.in_order(4))['image'].ravel().tolist())
os._exit(0)
"""
  (tmp_path / 'stuck').mkdir()
  done = tiny_pictures.run_script(tmp_path / 'main.py', body, tmp_path / 'stuck')
  message, left, first = done.stdout.splitlines()
  assert message.startswith('UserError a process that reads numbers ended: ')
  assert 'dataset.workers below 2' in message
  assert (left, first) == ('0', '[0, 1, 2, 3]')


def test_workers_end_with_the_main_process_however_it_ends(tmp_path):
  body = """
next(Loader(tiny_pictures.numbers(100), workers=1).in_order(4))
os.kill(os.getpid(), signal.SIGKILL)
"""
  done = tiny_pictures.run_script(tmp_path / 'main.py', body)
  assert done.returncode == -signal.SIGKILL, done.stderr
