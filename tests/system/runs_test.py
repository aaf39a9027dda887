"""Several runs in one process, one after the other: none leaves anything behind that another one finds."""

import signal

import jax
import pytest

from diffusion_distillation import modes
from diffusion_distillation.errors import UserError
from diffusion_distillation.system import files, interrupts, sharding
from tests import tiny


@pytest.fixture
def handlers():
  """The process's own, as a notebook has some."""
  before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
  own = lambda number, frame: None  # noqa: E731
  for number in before:
    signal.signal(number, own)
  yield own
  for number, handler in before.items():
    signal.signal(number, handler)


def run(monkeypatch, does, **mesh):
  """A run, with the flags of one, that does nothing but `does`."""
  monkeypatch.setattr(modes.run_module, 'run', lambda config, directory: does())
  overrides = {f'mesh__{axis}': size for axis, size in mesh.items()}
  return tiny.run_cli(*tiny.flags(**overrides), '--workdir=nowhere')


def test_each_run_has_its_own_mesh(monkeypatch, handlers):
  before, found = sharding.describe(), []
  for mesh in ({'fsdp': 2}, {'fsdp': 8}, {}):
    assert run(monkeypatch, lambda: found.append(sharding.describe()), **mesh)[0] == 0
  layouts = [' (data 4 x fsdp 2)', ' (data 1 x fsdp 8)', '']
  assert found == [f'8 cpu device(s){layout}' for layout in layouts]
  assert sharding.describe() == before


def test_a_run_that_fails_leaves_its_mesh_too():
  before = sharding.describe()
  with pytest.raises(UserError), sharding.laid_out(fsdp=4):
    assert 'fsdp 4' in sharding.describe()
    raise UserError('a test')
  assert sharding.describe() == before


def test_a_signal_stops_the_run_that_it_came_to_and_no_other(monkeypatch, handlers):
  def stopped():
    signal.raise_signal(signal.SIGTERM)
    interrupts.check()

  code, _, err = run(monkeypatch, stopped)
  assert code == 75 and 'stopped by SIGTERM' in err
  assert run(monkeypatch, interrupts.check)[0] == 0
  assert signal.getsignal(signal.SIGTERM) is signal.getsignal(signal.SIGINT) is handlers
  assert not interrupts.pending()


def test_all_processes_look_equally_often_over_all_runs(monkeypatch):
  """The runtime's count goes on where the last run ended."""
  looks = []
  monkeypatch.setattr(interrupts, '_reached', [])
  monkeypatch.setattr(interrupts, '_received', [])
  interrupts.synchronize(lambda k: looks.append(k) or k == 4)
  assert [interrupts.pending() for _ in range(2)] == [False, False]
  interrupts.uninstall()
  assert [interrupts.pending() for _ in range(3)] == [False, True, True]
  assert looks == [1, 2, 3, 4]


def test_whether_a_process_writes_is_a_matter_of_its_place(monkeypatch):
  assert files.writes()
  for joined, index, expected in ((True, 1, False), (True, 0, True), (False, 0, True)):
    monkeypatch.setattr(jax.distributed, 'is_initialized', lambda joined=joined: joined)
    monkeypatch.setattr(jax, 'process_index', lambda index=index: index)
    assert files.writes() is expected
