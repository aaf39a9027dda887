"""Checkpoints of one stage: written atomically by Orbax, and verified by a digest when they are read.

    workdir/<stage>/checkpoints/<step>/   a checkpoint in Orbax's format
    workdir/<stage>/damaged/<step>/       a checkpoint that failed verification and was moved here
    workdir/<stage>/stage.json            the stage's lineage

Several processes save and restore together, each its own shards; a checkpoint can be restored on any number of processes
and devices. Orbax detects truncated and missing files but not flipped bytes, so each checkpoint's metadata contains a digest
of the state: with one process, a sha256 that is computed in the background; with several, a checksum that they compute
together on their devices without gathering arrays (`system/checksum.py`).
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import logging
import os
import pathlib
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from diffusion_distillation.config import POSITIVE, key
from diffusion_distillation.errors import DamagedError, StorageError, UserError
from diffusion_distillation.system import cluster, files, sharding
from diffusion_distillation.system.checksum import checksum

_log = logging.getLogger(__name__)

_starting = (
  threading.Lock()
)  # Orbax numbers the saves of a process; two that begin at the same time would deadlock
_SLOW = 5.0  # seconds that training may wait for a checkpoint without a warning


@dataclasses.dataclass(frozen=True)
class CheckpointSection:
  """Checkpoints of the training state."""

  every: int = key(1000, 'Number of updates between two checkpoints.', POSITIVE)


def silence_background_errors() -> None:
  """Suppresses tracebacks of failed writes from threads of Orbax and TensorStore; the StorageError reports them in one line."""

  def keep(record: logging.LogRecord) -> bool:
    return not (record.exc_info and (record.name == 'asyncio' or 'orbax' in record.pathname))

  def unraisable(what: Any) -> None:
    # Orbax closes its event loop at the first failed write while other writes are still running.
    if str(what.exc_value) != 'Event loop is closed':
      sys.__unraisablehook__(what)

  for name in ('absl', 'asyncio'):
    logging.getLogger(name).addFilter(keep)
  sys.unraisablehook = unraisable


def digest(tree: Any) -> str:
  """Returns the sha256 of the names, types, shapes and bytes of a tree's leaves."""
  sha = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    array = np.ascontiguousarray(sharding.to_host(leaf))
    sha.update(f'{jax.tree_util.keystr(path)}{array.dtype}{array.shape}'.encode())
    sha.update(array.tobytes())
  return sha.hexdigest()


def structure(tree: Any) -> str:
  """Returns the sha256 of the names, types and shapes of a tree's leaves, regardless of their values."""
  sha = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    sha.update(f'{jax.tree_util.keystr(path)}{leaf.dtype}{tuple(leaf.shape)}'.encode())
  return sha.hexdigest()


def _first_line(error: Exception) -> str:
  text = str(error).strip()
  return text.splitlines()[0][:300] if text else repr(error)


def _seal(metadata: dict[str, Any]) -> str:
  sealed = [metadata.get(key) for key in ('sha256', 'structure', 'seconds')]
  sealed += [metadata[key] for key in ('checksum',) if key in metadata]
  return hashlib.sha256(json.dumps(sealed).encode()).hexdigest()


class _OtherStructureError(UserError):
  """The checkpoint is intact, but contains a state of another structure."""


class Checkpoints:
  """The checkpoints of one stage; the newest two are kept."""

  def __init__(self, stage_dir: pathlib.Path) -> None:
    self.stage_dir = stage_dir
    self._directory = stage_dir / 'checkpoints'
    self._writer: ocp.training.Checkpointer | None = None
    self._begun: concurrent.futures.Future[None] | None = None
    self._saving = 0

  def steps(self) -> list[int]:
    """Returns the steps that have a checkpoint, intact or damaged, oldest first."""
    if not self._directory.is_dir():
      return []
    return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdigit())

  def save(self, step: int, state: Any, seconds: float) -> None:
    """Saves the state in the background, with the wall-clock seconds that the stage has taken so far.

    While saving, the devices hold a second copy of the state. A single process copies it to the host, digests it and writes
    it in a thread. With several processes, each copies its shards to the host before this method returns, because Orbax
    synchronizes the processes.

    Raises:
      StorageError: this checkpoint or the previous one could not be written; older ones are unchanged.
    """
    began = time.monotonic()
    self.wait()
    if (waited := time.monotonic() - began) > _SLOW:
      _log.warning(
        'slow disk: training waited %.0f s for the checkpoint before step %d of %s; raise checkpoint.every',
        *(waited, step, self._directory),
      )
    if not self.stage_dir.is_dir():
      raise StorageError(f'{self.stage_dir} has vanished; restore it, and run the same command again')
    self._saving, state = step, sharding.snapshot(state)
    if sharding.part()[1] == 1:
      thread = concurrent.futures.ThreadPoolExecutor(1, 'checkpoint')
      self._begun = thread.submit(self._digest_and_write, step, state, seconds)
      thread.shutdown(wait=False)
    else:
      with self._told_of_failure(step):
        self._write(step, state, {'checksum': checksum(state), 'seconds': seconds})

  def _digest_and_write(self, step: int, state: Any, seconds: float) -> None:
    on_host = jax.device_get(state)
    del state  # the devices' copy
    self._write(step, on_host, {'sha256': digest(on_host), 'seconds': seconds})

  def _write(self, step: int, state: Any, metadata: dict[str, Any]) -> None:
    metadata = metadata | {'structure': structure(state)}
    sealed = metadata | {'seal': _seal(metadata)}
    with _starting:
      if self._writer is None:
        self._writer = ocp.training.Checkpointer(
          self._directory,
          preservation_policy=ocp.training.preservation_policies.LatestN(2),
          cleanup_tmp_directories=True,
        )
      self._writer.save_async(step, state, custom_metadata=sealed, force=True)

  def discard(self, step: int) -> None:
    """Removes the checkpoint of a step, which can then be saved again; an older one is left if there is one."""
    self.close()  # as in `_set_aside`
    if files.writes():
      shutil.rmtree(self._directory / str(step))
    cluster.barrier()

  def wait(self) -> None:
    """Waits until all checkpoints are written; raises StorageError as `save` does."""
    with self._told_of_failure(self._saving):
      self._wait()

  def _wait(self) -> None:
    begun, self._begun = self._begun, None
    if begun is not None:
      begun.result()
    if self._writer is not None:
      self._writer.wait()

  def close(self) -> None:
    """Waits for pending writes and releases the directory; only logs a write that failed."""
    try:
      self._wait()
      if self._writer is not None:
        self._writer.close()
    except Exception as error:  # from a save in the background
      _log.warning('%s: the last checkpoint may be missing: %s', self._directory, _first_line(error))
    self._writer = None

  @contextlib.contextmanager
  def _told_of_failure(self, step: int) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # with a bad disk, Orbax and TensorStore may raise anything
      self._writer = None
      whole = [known for known in self.steps() if known != step]
      kept = (
        f'the last checkpoint is from step {whole[-1]}' if whole else 'there is no earlier checkpoint'
      )
      raise StorageError(
        f'cannot write checkpoint {step} of {self.stage_dir}; {kept}; free up space or repair the disk, and run the '
        f'same command again: {_first_line(error)}'
      ) from error

  def restore(self, like: Any, set_aside: bool, upto: int | None = None) -> tuple[Any, float] | None:
    """Returns the newest intact state and its seconds, or None if there is none.

    Args:
      like: a tree of the state's shapes and types.
      set_aside: whether to move damaged checkpoints to `damaged/`, where they are ignored; otherwise the directory is only
        read.
      upto: the last step to consider; None for any step.

    Raises:
      UserError: a checkpoint is intact, but its state has another structure.
      PermissionError, MemoryError: reading failed although the checkpoint may be intact; nothing is moved.
    """
    for step in cluster.from_first(self.steps()[::-1]):
      if upto is not None and step > upto:
        continue
      found = None
      try:
        found = self._load(step, like)
      except (_OtherStructureError, MemoryError, PermissionError):
        raise
      except Exception as error:  # with a damaged file, Orbax may raise anything
        _log.warning('damaged checkpoint %s: %s', self._directory / str(step), _first_line(error))
      if cluster.agree(found is not None):
        return found
      if set_aside:
        self._set_aside(step)
    return None

  def _load(self, step: int, like: Any) -> tuple[Any, float]:
    path = self._directory / str(step)
    metadata = ocp.metadata(path).custom_metadata or {}
    if metadata.get('seal') != _seal(metadata):
      raise DamagedError('its metadata was changed after it was saved')
    if metadata['structure'] != structure(like):
      raise _OtherStructureError(
        f'{path} was written by another version of this program, or for another network; use the same version and network'
      )
    state = ocp.load(path, sharding.abstract(like))
    kind, compute = ('checksum', checksum) if 'checksum' in metadata else ('sha256', digest)
    if compute(state) != metadata[kind]:
      raise DamagedError('its digest differs from the one that was saved with it')
    return state, float(metadata['seconds'])

  def _set_aside(self, step: int) -> None:
    self.close()  # the writer still lists the step and would not write it again
    if files.writes():
      target = self.stage_dir / 'damaged' / str(step)
      shutil.rmtree(target, ignore_errors=True)
      target.parent.mkdir(exist_ok=True)
      os.replace(self._directory / str(step), target)
      _log.warning('moved it to %s', target)
    cluster.barrier()
