"""The devices of a CPU: how many there are, and what decides it."""

import os
import types

import jax
import pytest

from diffusion_distillation.system import platforms
from tests import tiny


@pytest.fixture
def jax_settings(monkeypatch):
  """The settings of jax as they are before the devices start, on a machine with two cores; `updates` are those made to them."""
  jax.devices()  # those of all tests
  updates = {}
  settings = types.SimpleNamespace(
    jax_num_cpu_devices=-1, jax_platforms=None, updates=updates, update=updates.__setitem__
  )
  settings.update_started = jax.config.update
  monkeypatch.setattr(jax, 'config', settings)
  monkeypatch.setattr(os, 'cpu_count', lambda: 2)
  monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_use_fusion_emitters=false')
  return settings


@pytest.mark.parametrize('config', [None, tiny.config(), tiny.config(train__micro_batches=2)])
def test_a_cpu_with_two_cores_becomes_two_devices(jax_settings, config):
  platforms.start(config)
  assert jax_settings.updates == {'jax_num_cpu_devices': 2}


@pytest.mark.parametrize(
  'changes',
  [
    {'train__batch_size': 3},
    {'dmd__batch_size': 2, 'dmd__micro_batches': 2},
    {'mesh__data': 1},
    {'mesh__fsdp': 2},
    {'compute__fast_cpu': False},
  ],
)
def test_a_config_may_need_one_device(jax_settings, changes):
  platforms.start(tiny.config(**changes))
  assert not jax_settings.updates


@pytest.mark.parametrize('reason', ['variable', 'flag', 'processes', 'core'])
def test_other_numbers_of_devices_take_precedence(jax_settings, monkeypatch, reason):
  if reason == 'variable':
    jax_settings.jax_num_cpu_devices = 1
  elif reason == 'flag':
    monkeypatch.setenv('XLA_FLAGS', '--xla_force_host_platform_device_count=4')
  elif reason == 'processes':
    monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  else:
    monkeypatch.setattr(os, 'cpu_count', lambda: 1)
  platforms.start(tiny.config())
  assert not jax_settings.updates


def test_a_program_that_has_used_jax_keeps_its_devices(jax_settings, monkeypatch):
  monkeypatch.setattr(jax_settings, 'update', jax_settings.update_started)
  count = jax.device_count()
  platforms.start(tiny.config())
  assert jax.device_count() == count


def test_a_run_on_a_cpu_has_two_devices(tmp_path):
  code, out, err = tiny.run_main(
    *tiny.flags(log__measured_updates=0), '--mode=plan', f'--workdir={tmp_path / "new"}'
  )
  assert code == 0, err
  assert f'parameters; {min(2, os.cpu_count())} cpu device(s)' in out + err
