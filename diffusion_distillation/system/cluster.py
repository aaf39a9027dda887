"""The processes of a run: how they find each other, how they agree, how they end. Alone, one is all there is.

JAX's distributed runtime does the work: the first process coordinates, heartbeats find out who is dead, and a notice of
preemption to one process stops all at the same step.
"""

import json
import os
import sys
import time
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
  """
  given = (coordinator, num_processes, process_id)
  told = [value is not None for value in given]
  if any(told) and not all(told):
    raise UserError('--coordinator, --num_processes and --process_id: give all three, or none')
  if not any(told) and any(os.environ.get(name) == value for name, value in _ALONE.items()):
    return
  try:
    jax.distributed.initialize(
      *given,
      initialization_timeout=max(timeout, 60),
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
  interrupts.synchronize(multihost_utils.reached_preemption_sync_point)


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
  """Ends a process of several, that cannot go on, with this exit code, without waiting for the others.

  They end by themselves: when this was the first, at once, else when its heartbeats are missed.
  """
  if jax.process_count() > 1:
    time.sleep(_GRACE * files.writes())
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
