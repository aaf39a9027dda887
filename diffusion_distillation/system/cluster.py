"""The processes of a run: how they connect, synchronize and exit. A run may also be a single process.

JAX's distributed runtime does the work: the first process coordinates, heartbeats detect dead processes, and a preemption
notice to any process stops all processes at the same step.
"""

import contextlib
import json
import logging
import os
import re
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_distillation.errors import UserError
from diffusion_distillation.system import files, interrupts

_log = logging.getLogger(__name__)

_ALONE = {'SLURM_NTASKS': '1', 'OMPI_COMM_WORLD_SIZE': '1'}  # jax would use only one of the GPUs
_NOBODY = (
  'coordinator_address should be defined',
  'must be called before any JAX calls',
  'does not have a controller',  # a single Kubernetes pod
  'job-name',  # the same, as a KeyError
)
# Environment variables with the number of processes, and for each the variable with this process's index.
_ENVIRONMENTS = {
  'SLURM_NTASKS': 'SLURM_PROCID',
  'OMPI_COMM_WORLD_SIZE': 'OMPI_COMM_WORLD_RANK',
}
_PATIENCE = 60  # minimum seconds to wait for the other processes
_MARGIN = 30  # additional seconds after which jax itself would abort the process
_LATE = 5.0  # seconds after which a process other than the first prints what it waits for
_KNOWN: dict[str, int | None] = {}  # 'index': the index of this process, if it was given
_GRACE = (
  3.0  # seconds for the other processes to print their errors before the exit of the first ends them
)


def start(
  coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> None:
  """Connects to the other processes of the run; must be called before any other use of jax.

  Without arguments, jax detects the processes itself on Cloud TPU, Slurm, Open MPI and Kubernetes. If it finds none, the
  run is a single process, as it is with `num_processes=1` and no other argument. If the other processes do not connect in
  time, this process exits with code 2.

  Args:
    coordinator: HOST:PORT of process 0.
    num_processes: the number of processes in the run.
    process_id: the index of this process, from 0.
    timeout: seconds without a heartbeat after which a process counts as dead and all others exit.

  Raises:
    UserError: only some of the first three arguments are given, or they do not fit together, or the environment cannot be
      understood, or the other processes are not found.
  """
  given = (coordinator, num_processes, process_id)
  is_given = [value is not None for value in given]
  if num_processes == 1 and not process_id:
    return
  if any(is_given) and not all(is_given):
    raise UserError(
      'give all three of --coordinator, --num_processes and --process_id, or none; --num_processes=1 runs a single process'
    )
  if not any(is_given) and any(os.environ.get(name) == value for name, value in _ALONE.items()):
    return
  _check(*given)
  limit = max(timeout, _PATIENCE)
  source, count, index = given if all(is_given) else _peers()
  try:
    with _waiting(source, count, index, limit), _warnings_in_one_line():
      jax.distributed.initialize(
        *given,
        initialization_timeout=limit + _MARGIN,
        heartbeat_timeout_seconds=timeout,
        shutdown_timeout_seconds=timeout,
      )
  except (ValueError, RuntimeError, KeyError) as error:
    if not any(is_given) and any(reason in str(error) for reason in _NOBODY):
      return
    text = ' '.join(str(error).split())[:300]
    if not any(is_given):
      raise UserError(
        f'jax cannot tell from the environment which processes this run has ({source or type(error).__name__}: {text}); '
        'to run a single process, set --num_processes=1; for several, give --coordinator, --num_processes and --process_id'
      ) from error
    raise UserError(
      f'process {process_id} of {num_processes}, --coordinator={coordinator}: {text}'
    ) from error
  _KNOWN['index'] = index
  interrupts.synchronize(multihost_utils.reached_preemption_sync_point)


def several() -> str | None:
  """Returns the variable of the environment, with its value, that says that this is one of several processes, if any."""
  source, count, _ = _peers()
  return source if count is not None and count > 1 else None


def _check(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
  """Raises UserError for an address that is not HOST:PORT, or an index that is not below the number of processes."""
  if coordinator is not None and not re.fullmatch(r'\S+:\d+', coordinator):
    raise UserError(
      f'--coordinator={coordinator} must be HOST:PORT of the first process, such as 10.0.0.1:1234'
    )
  if num_processes is not None and process_id is not None and process_id >= num_processes:
    raise UserError(
      f'--process_id={process_id} must be below --num_processes={num_processes}; the first process has 0'
    )


@contextlib.contextmanager
def _warnings_in_one_line() -> Iterator[None]:
  """Logs jax's warnings, such as that of a pod without the package kubernetes, in one line each."""
  with warnings.catch_warnings(record=True) as found:
    warnings.simplefilter('always')
    try:
      yield
    finally:
      for warning in found:
        _log.warning('%s', ' '.join(str(warning.message).split())[:300])


def _peers() -> tuple[str | None, int | None, int | None]:
  """Returns a variable of the environment with its value, the number of processes and this process's index, or Nones."""
  for count, index in _ENVIRONMENTS.items():
    found = [os.environ.get(name, '') for name in (count, index)]
    if all(value.isdigit() for value in found):
      return f'{count}={found[0]}', int(found[0]), int(found[1])
  return None, None, None


@contextlib.contextmanager
def _waiting(source: str | None, count: int | None, index: int | None, limit: float) -> Iterator[None]:
  """Prints which processes this one waits for; exits with code 2 if they do not connect.

  jax's own timeout aborts the process from C++, which cannot be caught.

  Args:
    source: where the number of processes comes from: HOST:PORT of the first one, or an environment variable and its value.
    count: number of processes in the run; None if unknown.
    index: index of this process.
    limit: seconds to wait.
  """
  met = threading.Event()
  began = time.monotonic()

  def watch() -> None:
    others = 'other processes' if count is None else f'{count - 1} other process(es) of {count}'
    waits = f'process {index or 0} waits for {others} ({source or "found by jax"})'
    alone = 'to run a single process, set --num_processes=1'
    if not met.wait(_LATE if index or count is None else 0.2):
      print(f'{waits} for at most {limit:.0f} s; {alone}', file=sys.stderr, flush=True)
    if not met.wait(limit - (time.monotonic() - began)):
      message = f'error: {waits}: they did not connect within {limit:.0f} s; start all processes within this time; {alone}'
      print(message, file=sys.stderr, flush=True)
      os._exit(UserError.exit_code)

  threading.Thread(target=watch, daemon=True).start()
  try:
    yield
  finally:
    met.set()


def agree(ok: bool) -> bool:
  """Whether `ok` is True in every process; all processes must call this function."""
  if jax.process_count() == 1:
    return ok
  return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def barrier() -> None:
  """Waits for all processes, for example until the first one has written a file that the others read."""
  agree(True)


def from_first(value: Any) -> Any:
  """Returns the first process's `value` (plain JSON) in every process."""
  if jax.process_count() == 1:
    return value
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.array(len(text))))
  padded = np.resize(text, size) if files.writes() else np.zeros(size, np.uint8)
  return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def leave(code: int) -> None:
  """Exits one of several processes after an error, without waiting for the others.

  The others exit immediately if this is the first process, otherwise when its heartbeats are missed.
  """
  if jax.distributed.is_initialized():  # this starts no devices, whose start may be what failed
    time.sleep(_GRACE * _is_first())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_first() -> bool:
  """Whether this is the first process; starts the devices only if the index is unknown, and is True if they cannot start."""
  if (index := _KNOWN.get('index')) is not None:
    return index == 0
  try:
    return files.writes()
  except RuntimeError:
    return True
