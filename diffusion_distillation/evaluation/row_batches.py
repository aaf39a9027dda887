"""What a row of `results.json` is computed from, batch by batch: in memory, and on disk while the row is being measured.

WORKDIR/row.partial/row.json    the description of the row
WORKDIR/row.partial/000000.npz  what is kept of its first batch, and so on

An interrupted evaluation reads these batches instead of drawing their images again.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import pathlib
import shutil
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from diffusion_distillation.errors import DamagedError
from diffusion_distillation.evaluation.by_class import Tally
from diffusion_distillation.evaluation.clip_score import RunningScore
from diffusion_distillation.evaluation.extracted import Extracted
from diffusion_distillation.evaluation.metrics import RunningFeatures
from diffusion_distillation.networks.conditioning import Cond
from diffusion_distillation.system import cluster, files, sharding

_log = logging.getLogger(__name__)

FOLDER = 'row.partial'


@dataclasses.dataclass(frozen=True, eq=False)
class Batch:
  """A batch of a row's samples, as NumPy arrays without padding.

  Attributes:
    found: what the extractors compute of the images.
    images: (m, H, W, C) uint8, those that the report may show: the first ones of the row.
    scores: (n,) float64, the CLIP score of each image; None without a CLIP model.
  """

  found: Extracted
  images: np.ndarray
  scores: np.ndarray | None = None

  def __len__(self) -> int:
    return len(self.found.features)


def clear(workdir: pathlib.Path) -> None:
  """Removes the batches of whichever row is there."""
  if files.writes():
    shutil.rmtree(workdir / FOLDER, ignore_errors=True)


class RowBatches:
  """The batches of a row that is being measured, in a folder of the workdir; those of any other row are removed.

  The first process writes, and all read.

  Args:
    workdir: the directory of the run; None keeps nothing.
    description: everything that the batches depend on, as JSON.
  """

  def __init__(self, workdir: pathlib.Path | None, description: dict[str, Any]) -> None:
    self._workdir = workdir
    self._description = json.loads(json.dumps(description))
    self._count = self._known()

  def _known(self) -> int:
    """Returns the number of batches of this row that are there."""
    if self._workdir is None:
      return 0
    known = 0
    with contextlib.suppress(OSError, DamagedError):
      if files.read_json(self._workdir / FOLDER / 'row.json') == self._description:
        known = next(k for k in itertools.count() if not _path(self._workdir, k).is_file())
    known = int(cluster.from_first(known))
    if not known:
      clear(self._workdir)
    return known

  def read(self) -> Iterator[Batch]:
    """Yields the batches of an earlier start, in order.

    Raises:
      DamagedError: a file is damaged; it is removed, along with the others.
    """
    for k in range(self._count):
      assert self._workdir is not None  # or else there are none
      path = _path(self._workdir, k)
      try:
        with np.load(path, allow_pickle=False) as arrays:
          known = dict(arrays)
          images, scores = known.pop('images'), known.pop('scores', None)
          yield Batch(Extracted(**known), images, scores)
      except (OSError, EOFError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as error:
        self.remove()
        raise DamagedError(
          f'{path} is damaged ({error}) and was removed; run the same command again'
        ) from error

  def write(self, batch: Batch) -> None:
    """Adds a batch, atomically. If the disk is full, nothing more is kept of the row, with a warning."""
    if self._workdir is not None and files.writes():
      folder = self._workdir / FOLDER
      try:
        self._write(folder, batch)
      except OSError as error:
        _log.warning('%s: %s; if this row is interrupted, it begins again', folder, error.strerror)
        self.remove()
        self._workdir = None
    self._count += 1

  def _write(self, folder: pathlib.Path, batch: Batch) -> None:
    if not self._count:
      folder.mkdir(exist_ok=True)
      files.write_json(folder / 'row.json', self._description)
    arrays = {**batch.found._asdict(), 'images': batch.images, 'scores': batch.scores}
    temporary = folder / 'batch.tmp'
    with temporary.open('wb') as file:
      np.savez(file, **{name: value for name, value in arrays.items() if value is not None})
    os.replace(temporary, _path(folder.parent, self._count))

  def remove(self) -> None:
    """Removes all batches, because the row is finished."""
    if self._workdir is not None:
      clear(self._workdir)
    self._count = 0


def _path(workdir: pathlib.Path, k: int) -> pathlib.Path:
  """Returns the path of batch k of the row that is being measured."""
  return workdir / FOLDER / f'{k:06}.npz'


class RunningRow:
  """Accumulates the samples of a row; `first` holds the images that the report may show.

  Args:
    size: maximum number of samples.
    shown: number of images that the report may show.
    tally: accumulates what the row says about classes.
    cond: returns the conditioning of the samples at an index (n,), of which `label` is used.
    score: accumulates the CLIP score; None without a CLIP model.
  """

  def __init__(
    self,
    size: int,
    shown: int,
    tally: Tally,
    cond: Callable[[np.ndarray], Cond],
    score: RunningScore | None,
  ) -> None:
    self.features, self.tally, self.score = RunningFeatures(size), tally, score
    self.first = list[np.ndarray]()
    self._shown, self._cond = shown, cond

  @property
  def seen(self) -> int:
    """Number of samples so far."""
    return self.features.seen

  def fetch(self, found: Extracted, images: jax.Array, count: int) -> Batch:
    """Returns the next batch, of which `count` samples are not padding, on the host."""
    extracted, drawn = sharding.to_host(found), np.asarray(sharding.to_host(images))[:count]
    scores = None
    if self.score is not None:
      scores = self.score.of(range(self.seen, self.seen + count), drawn)
    on_host = Extracted(*(None if x is None else np.asarray(x)[:count] for x in extracted))  # type: ignore[arg-type]
    return Batch(on_host, drawn[: max(0, self._shown - self.seen)], scores)

  def add(self, batch: Batch) -> None:
    """Adds the next batch."""
    cond = self._cond(np.arange(self.seen, self.seen + len(batch)))
    self.tally.add(np.asarray(batch.found.features), cond)
    if self.score is not None:
      assert batch.scores is not None  # because the description of the row names the CLIP model
      self.score.add_scores(batch.scores)
    self.first.append(batch.images)
    self.features.take(batch.found, slice(None))
