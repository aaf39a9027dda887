"""Stored (noise, image) pairs: noise and the images that a teacher's deterministic sampler draws from it. Drawn only once.

workdir/pairs/pairs.json   the teacher and settings that the pairs were drawn with, and a digest of each file
workdir/pairs/00000.npy    a batch: records of noise, image (float32; x of its space) and the teacher's conditioning: label (int32),
                           the text's place in the dataset (int64) and, if the teacher takes it, the weight of guidance (float32)
"""

import dataclasses
import hashlib
import logging
import os
import pathlib
import time
from collections.abc import Generator, Sequence
from typing import Any

import numpy as np

from diffusion_distillation.config import NOT_NEGATIVE, POSITIVE, key
from diffusion_distillation.datasets.encoded import Encoded
from diffusion_distillation.datasets.orders import Shuffled
from diffusion_distillation.diffusion import times
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation.sampling import Drawer
from diffusion_distillation.networks.conditioning import LABELS, Cond, classes
from diffusion_distillation.stages.parts import DETERMINISTIC
from diffusion_distillation.stages.provenance import Model
from diffusion_distillation.stages.stage import Pairs
from diffusion_distillation.stages.workdir import label_counts
from diffusion_distillation.system import cluster, files, interrupts, sharding
from diffusion_distillation.system.files import read_json, write_json
from diffusion_distillation.system.progress import Progress

_log = logging.getLogger(__name__)

PROMPT = 'prompt'  # the column of a text's place; its embeddings are not stored again


@dataclasses.dataclass(frozen=True)
class PairsSection:
  """Stored pairs of noise and the image that the base model draws from it, for `knowledge` and `dmd.regression`."""

  num_pairs: int = key(100_000, 'Number of pairs.', POSITIVE)
  sampler: str = key('heun', 'Deterministic sampler that draws the images.', choices=DETERMINISTIC)
  num_steps: int = key(18, 'Number of sampling steps per image.', POSITIVE)
  grid: str = key('uniform', 'Spacing of the sampling steps in t.', choices=times.GRIDS)
  clip_x: bool = key(True, 'Whether the predicted x is clipped to [-1, 1] at each sampling step.')
  batch_size: int = key(512, 'Number of images drawn at a time, over all devices.', POSITIVE)
  labels: str = key(
    'data',
    'Class labels that a conditional model is given: in the proportions of the training images, or balanced.',
    choices=LABELS,
  )
  guidance: float = key(
    0.0,
    'Weight W of classifier-free guidance with which the images are drawn; 0: none. Weights above 0 need a base that was '
    'trained with `dataset.label_dropout`.',
    NOT_NEGATIVE,
  )
  guiding_model: str = key(
    '',
    'Folder of a weaker model, or directory of its stage or run, that guides the base model in place of its unconditional '
    'predictions (autoguidance); empty: none.',
    path='disk',
  )


class StoredPairs:
  """The pairs of a workdir, read by index.

  Attributes:
    digest: sha256 over the digests of all files.
    seconds: time that it took to draw them.
  """

  def __init__(
    self, paths: list[pathlib.Path], digest: str, seconds: float, texts: Encoded | None = None
  ) -> None:
    self._parts = [np.load(path, mmap_mode='r') for path in paths]
    self._texts = texts
    self.digest, self.seconds = digest, seconds

  def __len__(self) -> int:
    return sum(map(len, self._parts))

  def read(self, indices: np.ndarray) -> dict[str, Any]:
    """Returns `noise` and `image` (n, ...), and their `cond`."""
    parts, places = np.divmod(indices, len(self._parts[0]))
    found = np.stack([self._parts[part][place] for part, place in zip(parts, places, strict=True)])
    keys = [name for name in found.dtype.names or () if name not in ('noise', 'image', PROMPT)]
    cond = {key: found[key] for key in keys}
    if self._texts is not None:
      cond |= self._texts.texts(found[PROMPT])
    return {'noise': found['noise'], 'image': found['image'], 'cond': cond or None}

  def shuffled(self, seed: int, batch_size: int, start: int, stop: int) -> Generator[dict[str, Any]]:
    """Yields this process's part of batches `start` to `stop` of an endless stream of shuffled epochs."""
    order, (index, count) = Shuffled(len(self), seed, batch_size), sharding.part()
    for i in range(start, stop):
      size = batch_size // count
      yield self.read(order(i)[0][index * size : (index + 1) * size])


def ensure(
  workdir: pathlib.Path, pairs: Pairs, teacher: Model, texts: Encoded | None = None
) -> StoredPairs:
  """Returns the pairs in `workdir`. Draws missing files, and draws files that do not match their digests again.

  Pairs of a teacher that takes texts have `texts`, in an order that depends on the seed.

  Raises:
    UserError: the existing pairs come from another teacher, or were drawn with other settings.
    Preempted: a signal was received; the files drawn so far are kept.
  """
  directory = workdir / 'pairs'
  directory.mkdir(exist_ok=True)
  counts = label_counts(workdir) if pairs.labels == 'data' else ()
  path, lineage = directory / 'pairs.json', describe(pairs, teacher, counts, texts)
  stored = read_json(path) if path.exists() else lineage | {'digests': [], 'seconds': 0.0}
  if 'labels' not in stored:  # older versions always drew balanced labels
    stored['labels'] = lineage['labels'] and 'balanced'
  stored.setdefault('guidance', 0.0)
  stored.setdefault('guiding_model', None)
  differing = [key for key in lineage if stored.get(key) != lineage[key]]
  if differing:
    key = differing[0]
    raise UserError(
      f'{path}: these pairs do not belong to this run: {key} was {stored.get(key)}, is {lineage[key]}; remove '
      f'{directory} to have them drawn again'
      + (f', or set pairs.labels={stored["labels"]}' if key == 'labels' else '')
    )
  stage = teacher.stage
  draw = Drawer(
    denoise=stage.denoise,
    sampler=pairs.sampler,
    schedule=stage.schedule,
    space=stage.space,
    image_shape=stage.image_shape,
    batch_size=pairs.batch_size,
    clip_x=pairs.clip_x,
    label_counts=counts,
    guidance=pairs.guidance,
    guiding=pairs.guiding,
    spread=True,
    texts=texts,
  )
  grid = times.make_grid(pairs.grid, pairs.num_steps, stage.schedule)
  count = -(-pairs.count // pairs.batch_size)
  paths = [directory / f'{k:05d}.npy' for k in range(count)]
  digests = stored['digests']
  cluster.barrier()  # before the first process writes pairs.json anew
  with Progress('pairs', count, images_per_step=pairs.batch_size) as progress:
    for k, file in enumerate(paths):
      interrupts.check()
      known = digests[k] if k < len(digests) else None
      if known is None or not cluster.agree(_digest(file) == known):
        if known is not None:
          _log.warning('%s is damaged or missing: drawn again', file)
        began = time.monotonic()
        index = np.arange(k * pairs.batch_size, min((k + 1) * pairs.batch_size, pairs.count))
        noise, image, cond = draw.pairs(teacher.params, grid, pairs.seed, index)
        if texts is not None:
          cond = {key: values for key, values in (cond or {}).items() if key not in ('text', 'no_text')}
          cond[PROMPT] = texts.places(index, pairs.seed)
        if files.writes():
          _save(file, noise, image, cond)
        cluster.barrier()
        digests[k : k + 1] = [_digest(file)]
        stored['seconds'] += time.monotonic() - began
        write_json(path, stored)
      progress.advance()
  digest = hashlib.sha256(''.join(digests).encode()).hexdigest()
  return StoredPairs(paths, digest, stored['seconds'], texts)


def describe(
  pairs: Pairs, teacher: Model, label_counts: Sequence[int] = (), texts: Encoded | None = None
) -> dict[str, Any]:
  """Returns everything that determines the pairs; without `label_counts`, labels are balanced."""
  return {
    'teacher': {'stage': teacher.stage.name, 'weights': teacher.weights, 'digest': teacher.digest},
    'num_pairs': pairs.count,
    'sampler': type(pairs.sampler).__name__,
    'clip_x': pairs.clip_x,
    'num_steps': pairs.num_steps,
    'grid': pairs.grid,
    'seed': pairs.seed,
    'batch_size': pairs.batch_size,
    'labels': ('data' if label_counts else 'balanced')
    if classes(teacher.stage.denoise.conditioning)
    else None,
    'guidance': pairs.guidance.weight,
    'guiding_model': pairs.guiding and pairs.guiding.digest,
  } | ({} if texts is None else {'texts': texts.identity})


def _save(path: pathlib.Path, noise: np.ndarray, image: np.ndarray, cond: Cond) -> None:
  """Writes a file atomically."""
  columns = {'noise': noise, 'image': image, **(cond or {})}
  records = np.empty(
    len(noise), [(name, values.dtype, values.shape[1:]) for name, values in columns.items()]
  )
  for name, values in columns.items():
    records[name] = values
  temporary = path.with_suffix('.tmp')
  with temporary.open('wb') as file:
    np.save(file, records, allow_pickle=False)
  os.replace(temporary, path)


def _digest(path: pathlib.Path) -> str:
  """Returns the sha256 of a file; '' if it does not exist."""
  if not path.is_file():
    return ''
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()
