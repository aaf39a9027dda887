"""The processes of a run: how they find each other, how they agree, how they end. Alone, one is all there is.

JAX's distributed runtime does the work: the first process coordinates, heartbeats find out who is dead, and a notice of
preemption to one process stops all at the same step.
"""

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from diffusion_distillation.errors import UserError
from diffusion_distillation.system import files, interrupts

_ALONE = {'SLURM_NTASKS': '1', 'OMPI_COMM_WORLD_SIZE': '1'}  # jax would take one GPU of all
_NOBODY = (
  'coordinator_address should be defined',
  'must be called before any JAX calls',
  'does not have a controller',  # a pod of Kubernetes by itself
  'job-name',  # the same, as a KeyError
)
# What says that there are others, by the variable with their number, and that with the number of this one.
_ENVIRONMENTS = {
  'SLURM_NTASKS': 'SLURM_PROCID',
  'OMPI_COMM_WORLD_SIZE': 'OMPI_COMM_WORLD_RANK',
}
_PATIENCE = 60  # seconds that the others are given at least
_MARGIN = 30  # seconds after which jax would end the process in its own way
_LATE = 5.0  # seconds after which a process other than the first says whom it waits for
_KNOWN: dict[str, int | None] = {}  # 'index': which process this is, where it was told
_GRACE = 3.0  # seconds that the first process leaves the others, whom its end ends, for their last words


def start(
  coordinator: str | None, num_processes: int | None, process_id: int | None, timeout: int
) -> None:
  """Joins the other processes of the run, before anything else of jax is used.

  Without arguments jax looks for them itself: on Cloud TPU, under Slurm, Open MPI and Kubernetes. Where it finds none,
  this process is alone.

  Args:
    coordinator: HOST:PORT of process 0.
    num_processes: of the run.
    process_id: of this one, from 0.
    timeout: seconds without a sign of life after which a process is dead, and all others end.

  Raises:
    UserError: some, but not all of the first three are given, or the others are not found.

  With `num_processes=1` alone nobody is looked for. A process whose peers do not come ends with exit code 2.
  """
  given = (coordinator, num_processes, process_id)
  told = [value is not None for value in given]
  if num_processes == 1 and not process_id:
    return
  if any(told) and not all(told):
    raise UserError(
      '--coordinator, --num_processes and --process_id: give all three, or none; --num_processes=1 looks for no others'
    )
  if not any(told) and any(os.environ.get(name) == value for name, value in _ALONE.items()):
    return
  limit = max(timeout, _PATIENCE)
  source, count, index = given if all(told) else _peers()
  try:
    with _waiting(source, count, index, limit):
      jax.distributed.initialize(
        *given,
        initialization_timeout=limit + _MARGIN,
        heartbeat_timeout_seconds=timeout,
        shutdown_timeout_seconds=timeout,
      )
  except (ValueError, RuntimeError, KeyError) as error:
    if not any(told) and any(reason in str(error) for reason in _NOBODY):
      return
    text = ' '.join(str(error).split())[:300]
    raise UserError(
      f'process {process_id} of {num_processes}, --coordinator={coordinator}: {text}'
    ) from error
  _KNOWN['index'] = index
  interrupts.synchronize(multihost_utils.reached_preemption_sync_point)


def _peers() -> tuple[str | None, int | None, int | None]:
  """What the environment says: the variable that has the number of processes, this number, and which one this is."""
  for count, index in _ENVIRONMENTS.items():
    found = [os.environ.get(name, '') for name in (count, index)]
    if all(value.isdigit() for value in found):
      return f'{count}={found[0]}', int(found[0]), int(found[1])
  return None, None, None


@contextlib.contextmanager
def _waiting(source: str | None, count: int | None, index: int | None, limit: float) -> Iterator[None]:
  """Prints which processes this one waits for, and ends it with exit code 2 if they do not join.

  jax's own limit ends the process from C++, which cannot be caught.

  Args:
    source: what says that there are others: HOST:PORT of the first, or a variable and its value.
    count: processes of the run; None where this is not known.
    index: which one this is.
    limit: seconds.
  """
  met = threading.Event()
  began = time.monotonic()

  def watch() -> None:
    others = 'other processes' if count is None else f'{count - 1} other process(es) of {count}'
    waits = f'process {index or 0} waits for {others} ({source or "found by jax"})'
    alone = 'to run alone: --num_processes=1'
    if not met.wait(_LATE if index or count is None else 0.2):
      print(f'{waits}, for {limit:.0f} s at most; {alone}', file=sys.stderr, flush=True)
    if not met.wait(limit - (time.monotonic() - began)):
      message = f'error: {waits}: they have not joined within {limit:.0f} s; start all of them within that time, or, {alone}'
      print(message, file=sys.stderr, flush=True)
      os._exit(UserError.exit_code)

  threading.Thread(target=watch, daemon=True).start()
  try:
    yield
  finally:
    met.set()


def agree(ok: bool) -> bool:
  """Whether it is so in every process; all have to ask."""
  if jax.process_count() == 1:
    return ok
  return bool(np.all(multihost_utils.process_allgather(np.array(ok))))


def barrier() -> None:
  """Waits for all processes: what the first one wrote before is there for the others after."""
  agree(True)


def from_first(value: Any) -> Any:
  """What the first process has for `value`, plain JSON, in every process."""
  if jax.process_count() == 1:
    return value
  text = np.frombuffer(json.dumps(value).encode(), np.uint8)
  size = int(multihost_utils.broadcast_one_to_all(np.array(len(text))))
  padded = np.resize(text, size) if files.writes() else np.zeros(size, np.uint8)
  return json.loads(np.asarray(multihost_utils.broadcast_one_to_all(padded)).tobytes())


def leave(code: int) -> None:
  """Ends one of several processes with this exit code, without waiting for the others, when it cannot go on.

  They end by themselves: when this was the first, at once, else when its heartbeats are missed.
  """
  if jax.distributed.is_initialized():  # which starts no devices; it may be these that failed
    time.sleep(_GRACE * _is_first())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _is_first() -> bool:
  """Whether this is the first process. Starts no devices where its number was told; where they cannot start, True."""
  if (index := _KNOWN.get('index')) is not None:
    return index == 0
  try:
    return files.writes()
  except RuntimeError:
    return True
