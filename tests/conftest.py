"""Before jax starts: 8 virtual CPU devices, and no silent broadcasting between ranks."""

import os

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'

import jax
import pytest

from tests import tiny

jax.config.update('jax_numpy_rank_promotion', 'raise')


@pytest.fixture(scope='session')
def finished(tmp_path_factory):
  """A finished run of the tiny config; tests only read it, or copy it."""
  workdir = tmp_path_factory.mktemp('finished') / 'workdir'
  code, _, err = tiny.run_main(*tiny.flags(), f'--workdir={workdir}')
  assert code == 0, err
  return workdir
