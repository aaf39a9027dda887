"""Checkpoints of one stage, by orbax: written whole or not at all, digested, checked when read.

    workdir/<stage>/checkpoints/<step>/   orbax's
    workdir/<stage>/damaged/<step>/       set aside: failed its check when it was read
    workdir/<stage>/stage.json            the stage's lineage

Orbax notices a truncated or missing file but not a flipped byte, so a sha256 over the state travels in
each checkpoint's metadata.
"""

import hashlib
import json
import logging
import os
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.sharding import replicated, to_host

_log = logging.getLogger(__name__)


def digest(tree: Any) -> str:
  """sha256 over the names, types, shapes and bytes of a tree's leaves."""
  sha = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    array = np.ascontiguousarray(leaf)
    sha.update(f'{jax.tree_util.keystr(path)}{array.dtype}{array.shape}'.encode())
    sha.update(array.tobytes())
  return sha.hexdigest()


def structure(tree: Any) -> str:
  """sha256 over the names, types and shapes of a tree's leaves, whatever their values."""
  sha = hashlib.sha256()
  for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
    sha.update(f'{jax.tree_util.keystr(path)}{leaf.dtype}{tuple(leaf.shape)}'.encode())
  return sha.hexdigest()


def _seal(metadata: dict[str, Any]) -> str:
  sealed = [metadata.get(key) for key in ('sha256', 'structure', 'seconds')]
  return hashlib.sha256(json.dumps(sealed).encode()).hexdigest()


class _OtherStructureError(UserError):
  """A whole checkpoint of something else."""


class Checkpoints:
  """The checkpoints of one stage; the newest two are kept."""

  def __init__(self, stage_dir: pathlib.Path) -> None:
    self.stage_dir = stage_dir
    self._directory = stage_dir / 'checkpoints'
    self._writer: ocp.training.Checkpointer | None = None

  def steps(self) -> list[int]:
    """Steps there are checkpoints of, oldest first, whole or not."""
    if not self._directory.is_dir():
      return []
    return sorted(int(path.name) for path in self._directory.iterdir() if path.name.isdigit())

  def save(self, step: int, state: Any, seconds: float) -> None:
    """Saves in the background, with the wall-clock seconds that the stage has taken so far."""
    if self._writer is None:
      self._writer = ocp.training.Checkpointer(
        self._directory,
        preservation_policy=ocp.training.preservation_policies.LatestN(2),
        cleanup_tmp_directories=True,
      )
    state = to_host(state)
    metadata = {'sha256': digest(state), 'structure': structure(state), 'seconds': seconds}
    metadata['seal'] = _seal(metadata)
    self._writer.save_async(step, state, custom_metadata=metadata, force=True)

  def wait(self) -> None:
    """Waits until everything is written."""
    if self._writer is not None:
      self._writer.wait()

  def close(self) -> None:
    """Waits, and lets the directory go."""
    if self._writer is not None:
      self._writer.close()
      self._writer = None

  def restore(self, like: Any, set_aside: bool) -> tuple[Any, float] | None:
    """The newest whole state and its seconds, or None if there is none.

    Args:
      like: a tree of the state's shapes and types.
      set_aside: whether a damaged checkpoint is moved to `damaged/`, from where it does not come back. If
        not, the directory is only read.

    Raises:
      UserError: a checkpoint is whole, but of a state of another structure.
      PermissionError, MemoryError: the machine's fault, not the checkpoint's; nothing is set aside.
    """
    for step in reversed(self.steps()):
      try:
        return self._load(step, like)
      except (_OtherStructureError, MemoryError, PermissionError):
        raise
      except Exception as error:  # orbax raises whatever the damaged file made it raise
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        _log.warning('damaged checkpoint %s: %s', self._directory / str(step), reason[:200])
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
    sharding = replicated()
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), like)
    state = ocp.load(path, abstract)
    if digest(state) != metadata['sha256']:
      raise DamagedError('its digest is not the one that was saved with it')
    return state, float(metadata['seconds'])

  def _set_aside(self, step: int) -> None:
    self.close()  # the writer has the step on its list and would not write it again
    target = self.stage_dir / 'damaged' / str(step)
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(exist_ok=True)
    os.replace(self._directory / str(step), target)
    _log.warning('moved it to %s', target)
