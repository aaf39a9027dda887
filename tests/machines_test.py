"""Machines as they are: no home, other devices, signals of schedulers, closed pipes, threads."""

import contextlib
import errno
import os
import pathlib
import signal
import sys
import threading
import time

import jax
import pytest

from configs import default
from diffusion_distillation import cli, command
from diffusion_distillation.errors import Preempted, UserError
from diffusion_distillation.system import announcing, compilation, interrupts, platforms
from diffusion_distillation.system.progress import Progress
from tests import tiny


@pytest.fixture
def signals():
  """Whatever a test does with signals is undone."""
  yield
  interrupts.uninstall()
  interrupts._received.clear()


@contextlib.contextmanager
def unread():
  """Standard output and error, whose reader has gone."""
  with contextlib.ExitStack() as stack:
    for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
      reader, writer = os.pipe()
      os.close(reader)
      stack.enter_context(redirect(os.fdopen(writer, 'w')))
    yield


def options(mode, config=None, **fields):
  return cli.Options(mode, config, default.get_config(), None, **fields)


@pytest.fixture
def jax_config(monkeypatch):
  """As if nothing had said where compiled programs are kept."""
  before = jax.config.jax_compilation_cache_dir
  jax.config.update('jax_compilation_cache_dir', None)
  compilation._tell_of_none.cache_clear()
  yield
  jax.config.update('jax_compilation_cache_dir', before)
  compilation._tell_of_none.cache_clear()


@pytest.mark.parametrize('home', [None, '/proc/none'])
def test_without_a_home_that_can_be_written_programs_are_not_kept(jax_config, monkeypatch, caplog, home):
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  monkeypatch.setattr(os.path, 'expanduser', lambda path: path if home is None else f'{home}/.cache')
  for _ in range(2):
    compilation.use('')
  assert not compilation.is_cached()
  (record,) = caplog.records  # told once
  assert (
    'compiled programs are not cached' in record.getMessage() and 'compute.cache' in record.getMessage()
  )


def test_a_cache_that_cannot_be_had_is_no_error(jax_config, caplog):
  compilation.use('/proc/none')
  assert not compilation.is_cached() and 'cannot write to /proc/none' in caplog.text


@pytest.mark.parametrize(
  'error', [AssertionError(), RuntimeError('no such\n  driver (set JAX_PLATFORMS=)')]
)
def test_devices_that_do_not_start_are_one_line(monkeypatch, capsys, error):
  def fail():
    raise error

  monkeypatch.setattr(jax, 'local_device_count', fail)
  monkeypatch.setattr(platforms, 'installed', lambda: ['cpu', 'tpu'])
  assert cli.run(options('plan', tiny.config())) == 2
  text = capsys.readouterr().err
  assert text.startswith('error: ') and text.count('\n') == 1 and 'installed platforms: cpu, tpu' in text
  assert ('no such driver)' if str(error) else '(AssertionError)') in text


def test_what_to_install_is_told(monkeypatch):
  monkeypatch.setattr(jax, 'local_device_count', lambda: 1 / 0)
  monkeypatch.setattr(platforms, '_wanted', lambda: 'cuda,cpu')
  with pytest.raises(UserError, match=r'JAX_PLATFORMS=cuda,cpu: .* pip install "jax\[cuda13\]"'):
    platforms.start()


def test_this_jax_has_a_cpu():
  assert platforms.installed()[0] == 'cpu'


@pytest.mark.parametrize('number', interrupts.SIGNALS)
def test_every_signal_to_stop_is_noticed_between_two_steps(signals, number):
  before = signal.getsignal(number)
  interrupts.install()
  os.kill(os.getpid(), number)
  with pytest.raises(Preempted, match=f'stopped by {signal.Signals(number).name}'):
    interrupts.check()
  assert Preempted.exit_code == 75
  interrupts.uninstall()
  assert signal.getsignal(number) == before


def test_a_terminal_that_goes_says_so_more_than_once(signals):
  interrupts.install()
  handler = signal.getsignal(signal.SIGHUP)
  for _ in range(3):
    assert signal.getsignal(signal.SIGHUP) is handler  # by default it ends the process
    os.kill(os.getpid(), signal.SIGHUP)
  assert interrupts.pending()


def test_what_is_printed_to_a_terminal_that_is_gone_is_lost_and_no_error(signals, monkeypatch):
  gone, terminal = os.openpty()
  interrupts.install()
  monkeypatch.setattr(interrupts, '_terminals', [terminal])
  os.close(gone)
  with pytest.raises(OSError):
    os.write(terminal, b'x')
  os.kill(os.getpid(), signal.SIGHUP)
  assert interrupts.pending() and os.write(terminal, b'x') == 1
  os.close(terminal)


def test_nohup_stays_in_force(signals):
  before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
  try:
    interrupts.install()
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
  finally:
    signal.signal(signal.SIGHUP, before)


def test_a_run_gives_the_signals_back(capsys):
  before = [signal.getsignal(number) for number in interrupts.SIGNALS]
  assert cli.run(options('keys')) == 0
  assert [signal.getsignal(number) for number in interrupts.SIGNALS] == before


def test_a_thread_may_run_too(capsys):
  codes = []
  thread = threading.Thread(target=lambda: codes.append(cli.run(options('keys'))))
  thread.start()
  thread.join()
  assert codes == [0] and '# Configuration' in capsys.readouterr().out


def test_a_signal_while_something_compiles_ends_the_process_at_once(signals, monkeypatch, capfd):
  ended = threading.Event()
  codes = []
  monkeypatch.setattr(os, '_exit', lambda code: (codes.append(code), ended.set()))
  interrupts.install()
  with interrupts.cleaning(lambda: codes.append('cleaned')), interrupts.at_once('compiling stage base'):
    os.kill(os.getpid(), signal.SIGUSR1)
    assert ended.wait(10) and codes == ['cleaned', 75]
  assert 'stopped by SIGUSR1 while compiling stage base; nothing is lost' in capfd.readouterr().err
  interrupts._received.clear()
  ended.clear()
  os.kill(os.getpid(), signal.SIGUSR1)  # afterwards it waits for the next look
  assert not ended.wait(0.2) and interrupts.pending()


@pytest.mark.parametrize('known', ['not in the cache', 'in the cache', 'no cache'])
def test_what_compiles_is_told_with_whether_the_cache_has_it(monkeypatch, capsys, known):
  monkeypatch.setattr(announcing, '_MOMENT', 0.2)
  monkeypatch.setattr(announcing, '_LOOKED_UP', 0.1)
  monkeypatch.setattr(compilation, 'is_cached', lambda: known != 'no cache')
  requests = announcing._Requests()
  monkeypatch.setattr(announcing, '_requests', lambda: requests)
  with announcing.compiling('stage base'):
    requests.listen('/jax/compilation_cache/compile_requests_use_cache')
    if known == 'in the cache':
      requests.listen('/jax/compilation_cache/cache_hits')
    time.sleep(0.6)
  lines = capsys.readouterr().err.splitlines()
  said = {
    'not in the cache': 'it is not in the cache of compiled programs',
    'in the cache': 'stage base: the compiled program was in the cache',
    'no cache': 'compiled programs are not cached',
  }[known]
  assert said in lines[0] and len(lines) == (1 if known == 'in the cache' else 2)
  assert known == 'in the cache' or 'stage base: compiling since ' in lines[0]


def test_jax_tells_of_its_cache_what_the_lines_rely_on(jax_config, tmp_path):
  jax.config.update('jax_compilation_cache_dir', str(tmp_path))
  requests = announcing._requests()
  asked = requests.asked
  jax.jit(lambda x: x * 3.25 - 11.0)(2.5)
  assert requests.asked > asked and not requests.last


def test_what_is_quick_is_not_told_of(capsys):
  with announcing.compiling('stage base'):
    pass
  assert capsys.readouterr().err == ''


@pytest.mark.parametrize('mode', ['keys', 'plan'])
def test_a_closed_pipe_is_a_quiet_end(mode):
  given = cli.Options(mode, tiny.config(log__measured_updates=0), default.get_config(), 'nowhere')
  with unread():
    assert cli.run(given) == 0
    print('this is lost, and no error', flush=True)


def test_an_error_keeps_its_exit_code_though_nobody_reads_it():
  with unread():
    assert cli.run(options('sample')) == 2


def test_a_bad_flag_keeps_its_exit_code_though_nobody_reads_it():
  with unread():
    with pytest.raises(SystemExit) as end:
      command.parse_flags(['main.py', '--mode=smaple'])
    assert end.value.code == 2
    print('this is lost, and no error', flush=True)


def test_streams_that_are_closed_lead_nowhere(monkeypatch):
  """As of `>&- 2>&-`, and of some daemons."""
  for name in ('stdin', 'stdout', 'stderr'):
    monkeypatch.setattr(sys, name, None)
  command._open_streams()
  streams = [sys.stdin, sys.stdout, sys.stderr]
  print('nothing', flush=True)
  assert sys.stdin.read() == '' and cli.leave_quietly(3) == 3
  command._open_streams()
  assert streams == [sys.stdin, sys.stdout, sys.stderr]
  for stream in streams:
    stream.close()


def test_an_output_that_takes_nothing_is_named(monkeypatch, capsys):
  def full(options):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setitem(cli.MODES, 'keys', full)
  assert cli.run(options('keys')) == 5
  assert capsys.readouterr().err.startswith('error: the output: No space left on device; ')


def test_a_run_that_nobody_reads_any_more_is_saved_and_left(signals):
  with unread(), Progress('base', 10, line_seconds=0.0) as progress:
    progress.advance()
  with pytest.raises(Preempted, match='SIGPIPE'):
    interrupts.check()


def test_training_that_nobody_reads_asks_to_be_run_again(monkeypatch):
  monkeypatch.setitem(cli.MODES, 'train', lambda options: print('x', flush=True))
  with unread():
    assert cli.run(options('train')) == 75


@pytest.mark.slow
@pytest.mark.parametrize('number', [signal.SIGHUP, signal.SIGUSR1])
def test_what_a_scheduler_warns_of_saves_and_leaves(tmp_path, number):
  given = tiny.flags(train__num_updates='1e5', checkpoint__every=100_000)
  process = tiny.start_main(*given, f'--workdir={tmp_path / "run"}')
  assert process.stderr is not None
  for line in process.stderr:
    if line.startswith('base: ') and '/100000' in line:
      break
  process.send_signal(number)
  _, err = process.communicate(timeout=300)
  assert process.returncode == 75 and f'stopped by {signal.Signals(number).name}' in err
  assert [path.name for path in (tmp_path / 'run' / 'base' / 'checkpoints').iterdir()]


@pytest.mark.slow
def test_a_platform_that_jax_does_not_have_is_one_line(monkeypatch):
  monkeypatch.setenv('JAX_PLATFORMS', 'cuda')
  code, out, err = tiny.run_main('--config=digits', '--workdir=nowhere', '--mode=plan')
  assert (code, out) == (2, '') and err.count('\n') == 1
  assert err.startswith('error: JAX_PLATFORMS=cuda: jax cannot start its devices')
  assert 'pip install "jax[cuda13]"' in err
  assert not pathlib.Path('nowhere').exists()
