"""The command line behind `command.py`: runs a mode, and turns errors into one line and an exit code."""

import contextlib
import os
import sys

from diffusion_distillation.errors import Preempted, UserError, of_disk
from diffusion_distillation.modes import MODES
from diffusion_distillation.options import Options
from diffusion_distillation.system import cluster, interrupts


def run(options: Options) -> int:
  """Runs the mode and returns the exit code."""
  interrupts.install()
  try:
    return leave_quietly(_run(options))
  except BrokenPipeError:  # the reader of the output has exited, as with `| head`
    return leave_quietly(Preempted.exit_code if options.mode == 'train' else 0, unread=True)
  finally:
    interrupts.uninstall()


def leave_quietly(code: int, unread: bool = False) -> int:
  """Flushes stdout and stderr. If their reader has exited, drops this and all later output instead of raising an error."""
  for stream in (sys.stdout, sys.stderr):
    try:
      stream.flush()
    except BrokenPipeError:
      unread = True
  for stream in (sys.stdout, sys.stderr) if unread else ():
    with contextlib.suppress(OSError):  # the stream is not a file, as in a notebook
      os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
  return code


def _run(options: Options) -> int:
  try:
    options = options.on_disk()
    if options.rest:
      raise UserError(f'unexpected arguments {list(options.rest)}; flags begin with --')
    _join(options)
    MODES[options.mode](options)
  except UserError as error:
    return _fail(str(error), error.exit_code)
  except BrokenPipeError:
    raise
  except OSError as error:
    translated = of_disk(error, options.workdir)
    return _fail(str(translated), translated.exit_code)
  return 0


def _fail(message: str, code: int) -> int:
  with contextlib.suppress(BrokenPipeError):
    print(f'error: {message}', file=sys.stderr)
  cluster.leave(code)
  return code


def _join(options: Options) -> None:
  """Connects to the other processes of the run."""
  given = (options.coordinator, options.num_processes, options.process_id)
  if options.mode in ('train', 'evaluate', 'sample'):
    cluster.start(*given, timeout=options.peer_timeout)
  elif any(value is not None for value in given) and (options.num_processes != 1 or options.process_id):
    raise UserError(
      f'--mode={options.mode} runs in one process; remove --coordinator, --num_processes and --process_id'
    )
  elif options.mode == 'export' and options.num_processes is None and (source := cluster.several()):
    raise UserError(
      f'--mode=export runs in one process, but {source}; start a single process, or set --num_processes=1 if this is the '
      'only one'
    )
