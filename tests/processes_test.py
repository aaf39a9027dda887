"""Several processes on one machine compute what one computes."""

import json
import os
import socket
import subprocess
import sys

import jax
import pytest

from diffusion_distillation.system import checkpoints
from tests import peer, tiny


def free_port():
  with socket.socket() as found:
    found.bind(('127.0.0.1', 0))
    return found.getsockname()[1]


def run_peers(out, count, devices, fsdp, methods):
  """What the first of `count` processes, of `devices` each, has found."""
  flags = f'--xla_force_host_platform_device_count={devices} {tiny.FAST_COMPILE}'
  environment = os.environ | {'XLA_FLAGS': flags}
  command = [sys.executable, '-m', 'tests.peer', str(out), str(fsdp), ','.join(methods)]
  address = f'127.0.0.1:{free_port()}'
  processes = [
    subprocess.Popen(
      [*command, *([address, str(count), str(k)] if count > 1 else [])],
      cwd=tiny.ROOT,
      env=environment,
      stderr=subprocess.PIPE,
      text=True,
    )
    for k in range(count)
  ]
  told = [process.communicate(timeout=600)[1] for process in processes]
  assert [process.returncode for process in processes] == [0] * count, '\n'.join(told)
  return json.loads((out / 'found.json').read_text())


def assert_same_training(found, expected, rtol=2e-5):
  assert list(found) == list(expected)
  for name in found:
    if name != 'restored':
      for one, other in zip(found[name]['told'], expected[name]['told'], strict=True):
        assert one == pytest.approx(other, rel=rtol, abs=1e-7), name


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_two_and_four_processes_train_every_method_as_one_does(tmp_path):
  methods = ('base', *peer.METHODS)
  one = run_peers(tmp_path / 'one', 1, 4, 1, methods)
  assert len(one) == len(methods) + 1
  two = run_peers(tmp_path / 'two', 2, 2, 1, methods)
  assert_same_training(two, one)
  few = ('base', 'progressive', 'dmd2')  # one network; a teacher; three networks that take turns
  four = run_peers(tmp_path / 'four', 4, 1, 2, few)
  assert_same_training(four, {name: one[name] for name in four})
  again = run_peers(tmp_path / 'again', 4, 1, 2, ('base',))
  assert again['base'] == four['base'], 'the same layout, but not bit for bit'
  for found in (one, two, four):
    assert found['restored'] == found['dmd2']['digest']
  # What two processes have written, this one reads, on eight devices.
  stage = peer.stages_of(methods)[0][-1]
  like = jax.eval_shape(stage.recipe.create_state, peer.params_of(stage)[0])
  restored, _ = checkpoints.Checkpoints(tmp_path / 'two').restore(like, set_aside=False)
  assert checkpoints.digest(restored) == two['restored']
