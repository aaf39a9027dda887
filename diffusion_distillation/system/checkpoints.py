"""Checkpoints of one stage, by orbax: written whole or not at all, digested, checked when read.

    workdir/<stage>/checkpoints/<step>/   orbax's
    workdir/<stage>/damaged/<step>/       set aside: failed its check when it was read
    workdir/<stage>/stage.json            the stage's lineage

Several processes save and restore together, each its share of arrays that are split over devices; a checkpoint is
restored on any number of both. Orbax notices a truncated or missing file but not a flipped byte, so a digest of the state travels in
each checkpoint's metadata: of one process a sha256, made in the background; of several a checksum that they compute
together on their devices, which gathers nothing (`system/checksum.py`).
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
)  # orbax numbers the saves of a process: two that begin at once would wait for each other
_SLOW = 5.0  # seconds that training waits for a checkpoint until it says so


@dataclasses.dataclass(frozen=True)
class CheckpointSection:
  """Checkpoints of the training state."""

  every: int = key(1000, 'Number of updates between two checkpoints.', POSITIVE)


def hush() -> None:
  """Leaves a failed write to the one line of its StorageError: orbax and tensorstore print tracebacks from threads."""

  def keep(record: logging.LogRecord) -> bool:
    return not (record.exc_info and (record.name == 'asyncio' or 'orbax' in record.pathname))

  def unraisable(what: Any) -> None:
    # Orbax leaves its loop at the first write that fails, with others under way.
    if str(what.exc_value) != 'Event loop is closed':
      sys.__unraisablehook__(what)

  for name in ('absl', 'asyncio'):
    logging.getLogger(name).addFilter(keep)
  sys.unraisablehook = unraisable


def digest(tree: Any) -> str:
  """sha256 over the names, types, shapes and bytes of a tree's leaves."""
  sha = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    array = np.ascontiguousarray(sharding.to_host(leaf))
    sha.update(f'{jax.tree_util.keystr(path)}{array.dtype}{array.shape}'.encode())
    sha.update(array.tobytes())
  return sha.hexdigest()


def structure(tree: Any) -> str:
  """sha256 over the names, types and shapes of a tree's leaves, whatever their values."""
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
  """A whole checkpoint of something else."""


class Checkpoints:
  """The checkpoints of one stage; the newest two are kept."""

  def __init__(self, stage_dir: pathlib.Path) -> None:
    self.stage_dir = stage_dir
    self._directory = stage_dir / 'checkpoints'
    self._writer: ocp.training.Checkpointer | None = None
    self._begun: concurrent.futures.Future[None] | None = None
    self._saving = 0

  def steps(self) -> list[int]:
    """Steps there are checkpoints of, oldest first, whole or not."""
    if not self._directory.is_dir():
      return []
    return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdigit())

  def save(self, step: int, state: Any, seconds: float) -> None:
    """Saves in the background, with the wall-clock seconds that the stage has taken so far.

    Meanwhile the devices hold a second copy of the state. One process copies it to the host, digests and writes it in a
    thread. Of several, each copies its own shards to the host before this returns, for orbax talks to the others.

    Raises:
      StorageError: this checkpoint or the one before could not be written; those before it are as they were.
    """
    began = time.monotonic()
    self.wait()
    if (waited := time.monotonic() - began) > _SLOW:
      _log.warning(
        'slow disk: training waited %.0f s for the checkpoint before step %d of %s; raise checkpoint.every',
        *(waited, step, self._directory),
      )
    if not self.stage_dir.is_dir():
      raise StorageError(f'{self.stage_dir} has vanished; bring it back, and run the same command again')
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

  def wait(self) -> None:
    """Waits until everything is written; raises StorageError as `save` does."""
    with self._told_of_failure(self._saving):
      self._wait()

  def _wait(self) -> None:
    begun, self._begun = self._begun, None
    if begun is not None:
      begun.result()
    if self._writer is not None:
      self._writer.wait()

  def close(self) -> None:
    """Waits, and lets the directory go; what could not be written has been told, or is no error any more."""
    try:
      self._wait()
      if self._writer is not None:
        self._writer.close()
    except Exception as error:  # of a save in the background
      _log.warning('%s: the last checkpoint may be missing: %s', self._directory, _first_line(error))
    self._writer = None

  @contextlib.contextmanager
  def _told_of_failure(self, step: int) -> Iterator[None]:
    try:
      yield
    except Exception as error:  # orbax and tensorstore raise whatever the disk made them raise
      self._writer = None
      whole = [known for known in self.steps() if known != step]
      kept = f'the last one there is of step {whole[-1]}' if whole else 'there is none yet'
      raise StorageError(
        f'cannot write checkpoint {step} of {self.stage_dir}, {kept}; make room or mend the disk, and run the '
        f'same command again: {_first_line(error)}'
      ) from error

  def restore(self, like: Any, set_aside: bool, upto: int | None = None) -> tuple[Any, float] | None:
    """The newest whole state and its seconds, or None if there is none.

    Args:
      like: a tree of the state's shapes and types.
      set_aside: whether a damaged checkpoint is moved to `damaged/`, from where it does not come back. If
        not, the directory is only read.
      upto: the last step that will do; None: any.

    Raises:
      UserError: a checkpoint is whole, but of a state of another structure.
      PermissionError, MemoryError: the machine's fault, not the checkpoint's; nothing is set aside.
    """
    for step in cluster.from_first(self.steps()[::-1]):
      if upto is not None and step > upto:
        continue
      found = None
      try:
        found = self._load(step, like)
      except (_OtherStructureError, MemoryError, PermissionError):
        raise
      except Exception as error:  # orbax raises whatever the damaged file made it raise
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
      raise DamagedError('its metadata is not what was saved with it')
    if metadata['structure'] != structure(like):
      raise _OtherStructureError(
        f'{path} was written by another version of this program, or for another network; use that one'
      )
    state = ocp.load(path, sharding.abstract(like))
    kind, compute = ('checksum', checksum) if 'checksum' in metadata else ('sha256', digest)
    if compute(state) != metadata[kind]:
      raise DamagedError('its digest is not the one that was saved with it')
    return state, float(metadata['seconds'])

  def _set_aside(self, step: int) -> None:
    self.close()  # the writer has the step on its list and would not write it again
    if files.writes():
      target = self.stage_dir / 'damaged' / str(step)
      shutil.rmtree(target, ignore_errors=True)
      target.parent.mkdir(exist_ok=True)
      os.replace(self._directory / str(step), target)
      _log.warning('moved it to %s', target)
    cluster.barrier()
