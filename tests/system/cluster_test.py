"""Finding the other processes, and compiled programs; what needs several is in processes_test.py."""

import dataclasses
import os
import threading
import warnings

import jax
import pytest

from diffusion_distillation.errors import UserError
from diffusion_distillation.system import cluster, compilation
from tests import tiny

GIVEN = ('10.0.0.1:1234', 2, 1)


@pytest.fixture
def initialize(monkeypatch):
  """What jax.distributed.initialize was called with; `initialize.error` is what it raises."""

  def call(*args, **kwargs):
    call.calls.append((args, kwargs))
    if call.error:
      raise call.error

  call.calls, call.error = [], None
  monkeypatch.setattr(jax.distributed, 'initialize', call)
  monkeypatch.setattr('diffusion_distillation.system.interrupts.synchronize', lambda reached: None)
  return call


@pytest.mark.parametrize('missing', range(3))
def test_a_part_of_the_address_is_refused(initialize, missing):
  given = [None if k == missing else value for k, value in enumerate(GIVEN)]
  with pytest.raises(
    UserError, match='give all three of --coordinator, --num_processes and --process_id'
  ):
    cluster.start(*given, timeout=100)
  assert not initialize.calls


def test_what_is_given_is_passed_on_with_the_time_after_which_a_peer_is_dead(initialize):
  cluster.start(*GIVEN, timeout=7)
  ((args, kwargs),) = initialize.calls
  assert args == GIVEN
  assert kwargs['heartbeat_timeout_seconds'] == kwargs['shutdown_timeout_seconds'] == 7


@pytest.mark.parametrize('variable', ['SLURM_NTASKS', 'OMPI_COMM_WORLD_SIZE'])
def test_one_task_alone_keeps_all_devices_of_its_machine(initialize, monkeypatch, variable):
  monkeypatch.setenv(variable, '1')
  cluster.start(None, None, None, timeout=100)
  assert not initialize.calls
  monkeypatch.setenv(variable, '2')
  cluster.start(None, None, None, timeout=100)
  assert len(initialize.calls) == 1


def test_where_jax_finds_nobody_this_process_is_alone(initialize):
  initialize.error = ValueError('coordinator_address should be defined.')
  cluster.start(None, None, None, timeout=100)
  with pytest.raises(
    UserError, match=r'process 1 of 2, --coordinator=10\.0\.0\.1:1234: coordinator_address'
  ):
    cluster.start(*GIVEN, timeout=100)


def test_a_coordinator_that_does_not_answer_is_one_line(initialize):
  initialize.error = RuntimeError('DEADLINE_EXCEEDED:\n  no answer')
  with pytest.raises(UserError, match=r'DEADLINE_EXCEEDED: no answer$'):
    cluster.start(*GIVEN, timeout=100)


@pytest.mark.parametrize(
  ('given', 'words'),
  [
    (('nohost', 2, 1), '--coordinator=nohost must be HOST:PORT'),
    (('host:port', 2, 1), '--coordinator=host:port must be HOST:PORT'),
    (('[::1]:1234', 2, 2), '--process_id=2 must be below --num_processes=2'),
  ],
)
def test_an_address_that_is_none_is_refused(initialize, given, words):
  with pytest.raises(UserError, match=f'^{words}'):
    cluster.start(*given, timeout=100)
  assert not initialize.calls


def test_an_environment_that_jax_does_not_understand_says_how_to_run_alone(initialize, monkeypatch):
  monkeypatch.setenv('SLURM_NTASKS', '4')
  initialize.error = ValueError("invalid literal for int() with base 10: 'x'")
  with pytest.raises(UserError, match=r"environment .*\(ValueError: .* 'x'\); .* set --num_processes=1"):
    cluster.start(None, None, None, timeout=100)


def test_a_warning_of_jax_is_one_line(monkeypatch, caplog, recwarn):
  def call(*args, **kwargs):
    warnings.warn('Kubernetes environment detected, but\n  no package', stacklevel=1)
    raise ValueError('coordinator_address should be defined.')

  monkeypatch.setattr(jax.distributed, 'initialize', call)
  cluster.start(None, None, None, timeout=100)
  assert caplog.messages == ['Kubernetes environment detected, but no package'] and not recwarn.list


def test_alone_everybody_agrees():
  assert cluster.agree(True) and not cluster.agree(False)
  value = [1, 'two', {'three': None}]
  assert cluster.from_first(value) is value
  cluster.leave(3)  # and nobody has to be left


@pytest.fixture
def jax_config():
  names = ('jax_compilation_cache_dir', 'jax_enable_compilation_cache')
  before = {name: getattr(jax.config, name) for name in names}
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def test_programs_are_kept_where_the_config_or_the_user_says(jax_config, monkeypatch, tmp_path):
  jax.config.update('jax_compilation_cache_dir', None)
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'user'))
  compilation.use('')
  users = tmp_path / 'user' / 'diffusion_distillation' / 'compiled'
  assert jax.config.jax_compilation_cache_dir.startswith(str(users))
  compilation.use(str(tmp_path / 'own'))
  assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path / 'own'))
  compilation.use('')  # of the environment, or set before: stays
  assert jax.config.jax_compilation_cache_dir.startswith(str(tmp_path / 'own'))
  assert jax.config.jax_enable_compilation_cache
  compilation.use('none')
  assert not jax.config.jax_enable_compilation_cache


def test_a_plan_without_measurements_writes_nothing_and_says_what_it_needs(tmp_path):
  workdir = tmp_path / 'workdir'
  code, out, err = tiny.run_cli(
    *tiny.flags(), f'--workdir={workdir}', '--mode=plan', '--config.log.measured_updates=0'
  )
  assert (code, out) == (0, '') and not workdir.exists()
  lines = err.splitlines()
  assert '8 cpu device(s)' in lines[0] and 'measuring' not in err
  for name in ('base', 'progressive_0002', 'progressive_0001'):
    assert sum(line.split()[0] == name for line in lines) == 2, name  # of the plan, and of its memory
  assert any(line.startswith('disk, GB: ') and line.endswith(' free') for line in lines)


@pytest.mark.parametrize('mode', ['plan', 'import', 'prepare', 'replay'])
def test_modes_of_one_process_refuse_several(mode, tmp_path, capsys):
  from diffusion_distillation import cli

  options = cli.Options(
    mode=mode, config=tiny.config(), default=tiny.config(), workdir=tmp_path, process_id=1
  )
  assert cli.run(options) == 2
  assert f'--mode={mode} runs in one process; remove --coordinator' in capsys.readouterr().err
  assert not list(tmp_path.iterdir())


def test_an_export_by_several_processes_of_the_environment_is_refused(tmp_path, monkeypatch, capsys):
  from diffusion_distillation import cli

  monkeypatch.setenv('SLURM_NTASKS', '4')
  monkeypatch.setenv('SLURM_PROCID', '0')
  options = cli.Options(mode='export', config=None, default=tiny.config(), workdir=tmp_path)
  assert cli.run(options) == 2
  err = capsys.readouterr().err
  assert '--mode=export runs in one process, but SLURM_NTASKS=4; start a single process' in err
  assert cli.run(dataclasses.replace(options, num_processes=1)) == 2
  assert 'needs --out' in capsys.readouterr().err


def test_modes_of_one_process_take_the_flag_that_says_so(tmp_path, capsys):
  """As the message to a process that waits for others advises."""
  from diffusion_distillation import cli

  options = cli.Options(mode='plan', config=None, default=tiny.config(), workdir=None, num_processes=1)
  assert cli.run(options) == 2
  assert '--mode=plan needs --config' in capsys.readouterr().err


SLURM = {'SLURM_NTASKS': '4', 'SLURM_PROCID': '0'}


@pytest.fixture
def waiting(initialize, monkeypatch):
  """Peers that do not come: `jax.distributed.initialize` returns when this process would have ended."""
  ended = threading.Event()
  codes = []
  monkeypatch.setattr(cluster, '_PATIENCE', 0)
  monkeypatch.setattr(os, '_exit', lambda code: (codes.append(code), ended.set()))
  monkeypatch.setattr(jax.distributed, 'initialize', lambda *args, **kwargs: ended.wait(3))
  return codes


def test_peers_are_named_at_once_and_given_up_with_exit_code_2(waiting, monkeypatch, capsys):
  """One process by hand, in the environment of four: `srun -n4 --pty bash`."""
  for name, value in SLURM.items():
    monkeypatch.setenv(name, value)
  cluster.start(None, None, None, timeout=1)
  assert waiting == [2]
  at_once, at_last = capsys.readouterr().err.splitlines()
  awaited = 'process 0 waits for 3 other process(es) of 4 (SLURM_NTASKS=4)'
  assert at_once == f'{awaited} for at most 1 s; to run a single process, set --num_processes=1'
  assert at_last.startswith(f'error: {awaited}: they did not connect within 1 s')


def test_peers_that_come_are_not_talked_about(initialize, monkeypatch, capsys):
  for name, value in SLURM.items():
    monkeypatch.setenv(name, value)
  cluster.start(None, None, None, timeout=100)
  assert len(initialize.calls) == 1 and capsys.readouterr().err == ''
  ((_, kwargs),) = initialize.calls
  assert kwargs['initialization_timeout'] > 100  # ours comes first


def test_one_process_looks_for_no_others(initialize, monkeypatch):
  for name, value in SLURM.items():
    monkeypatch.setenv(name, value)
  cluster.start(None, 1, None, timeout=100)
  assert not initialize.calls


@pytest.mark.parametrize(('index', 'seconds'), [(0, cluster._GRACE), (1, 0.0), (None, cluster._GRACE)])
def test_a_process_whose_devices_cannot_start_ends_with_its_exit_code(
  initialize, monkeypatch, index, seconds
):
  def fail():
    raise RuntimeError("Unable to initialize backend 'cuda'")

  ended, waited = [], []
  monkeypatch.setattr(cluster, '_KNOWN', {})
  monkeypatch.setattr(jax.distributed, 'is_initialized', lambda: True)
  monkeypatch.setattr(jax, 'process_index', fail)
  monkeypatch.setattr(os, '_exit', ended.append)
  monkeypatch.setattr(cluster.time, 'sleep', waited.append)
  given = (None, None, None) if index is None else ('10.0.0.1:1234', 2, index)
  cluster.start(*given, timeout=100)
  cluster.leave(2)
  assert ended == [2] and waited == [seconds]
