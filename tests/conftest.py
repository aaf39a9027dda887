"""Before jax starts: 8 virtual CPU devices, quick compilation, no silent broadcasting between ranks."""

import fcntl
import gc
import os
import pathlib
import shutil
import tempfile

import pytest

from tests import tiny

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['JAX_NUMPY_RANK_PROMOTION'] = 'raise'
os.environ['XLA_FLAGS'] = f'--xla_force_host_platform_device_count=8 {tiny.FAST_COMPILE}'
gc.set_threshold(50_000)  # as in __main__.py
# Programs are compiled once for all processes, and for later runs. The directory begins anew when it gets large, because it
# collects the programs of every version of the code.
_COMPILED = tiny.ROOT / '.pytest_cache' / 'compiled'
if 'PYTEST_XDIST_WORKER' not in os.environ:
  if sum(path.stat().st_size for path in _COMPILED.glob('*')) > 4e9:
    shutil.rmtree(_COMPILED)
  os.environ['JAX_COMPILATION_CACHE_DIR'] = str(_COMPILED)
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'


# Each file goes to one worker; the long ones first, for what begins last should be short. The very first does
# without `finished`, which the second makes meanwhile.
LONG = (
  'run/loop_test.py',
  'run_test.py',
  'processes_test.py',
  'chaos_test.py',
  'methods_run_test.py',
  'notebooks_test.py',
  'layouts_test.py',
  'methods/methods_test.py',
  'chaos_disk_test.py',
  'sample_test.py',
  'training/precision_test.py',
  'run/replay_test.py',
  'parity_test.py',
  'methods/isolation_test.py',
)


def pytest_collection_modifyitems(items):
  places = {str(tiny.ROOT / 'tests' / name): place for place, name in enumerate(LONG)}
  items.sort(key=lambda item: places.get(str(item.path), len(LONG)))


@pytest.fixture(scope='session')
def finished(tmp_path_factory):
  """A finished run of the tiny config; tests only read it, or copy it.

  The first worker that asks for it runs main.py; every worker has its own copy.
  """
  own = tmp_path_factory.mktemp('finished') / 'workdir'
  base = tmp_path_factory.getbasetemp()
  shared = base.parent if 'PYTEST_XDIST_WORKER' in os.environ else base
  with (shared / 'finished.lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (shared / 'finished').exists():
      begun = pathlib.Path(tempfile.mkdtemp(dir=shared))
      relative = os.path.relpath(begun, tiny.ROOT)  # as people type it; everywhere else it is absolute
      code, _, err = tiny.run_main(*tiny.flags(), f'--workdir={relative}')
      assert code == 0, err
      begun.rename(shared / 'finished')
  return pathlib.Path(shutil.copytree(shared / 'finished', own))


@pytest.fixture
def fresh(finished, tmp_path):
  """A workdir in which nothing is but an extractor, whose training would take longer than that of a tiny run's networks."""
  return tiny.with_extractor(tmp_path / 'workdir', finished)


@pytest.fixture(scope='session')
def step():
  """The compiled training step; every test that uses it shares its programs."""
  from diffusion_distillation.system import sharding
  from diffusion_distillation.training import step

  return sharding.compile_step(step.train_steps)
