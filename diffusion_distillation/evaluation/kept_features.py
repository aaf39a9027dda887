"""What is computed of the features of real images: in one pass over the images, and kept in files.

A `Summary` says which images it needs and what it makes of their features. `load_or_compute` reads those summaries whose files
were made from the same images and the same extractor, and computes all others together, so that the network sees each image once.

directory/NAME.safetensors   the arrays of the summary NAME, what they were made from, and their digest
"""

import abc
import contextlib
import json
import logging
import math
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import safetensors
import safetensors.numpy

from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.evaluation.extracted import Extracted, Extractor
from diffusion_distillation.evaluation.features import batch_size
from diffusion_distillation.evaluation.frechet import Moments
from diffusion_distillation.evaluation.metrics import Features, RunningFeatures, some_of
from diffusion_distillation.system import cluster, files, interrupts, sharding
from diffusion_distillation.system.checkpoints import digest
from diffusion_distillation.system.progress import Progress

_log = logging.getLogger(__name__)

FORMAT = 4  # version of the files; increase it when features are summarized in another way

Arrays = dict[str, np.ndarray]


class Summary(abc.ABC):
  """Something that is computed of the features of real images.

  Attributes:
    name: the name of its file, without the suffix.
  """

  name: str

  def described(self) -> dict[str, Any]:
    """Returns what it depends on beside the images and the extractor."""
    return {}

  def begin(self, count: int) -> np.ndarray | None:
    """Prepares for the features of a set of `count` images; returns the indices that it needs, ascending; None: all."""
    del count
    return None

  @abc.abstractmethod
  def add(self, found: Extracted, places: np.ndarray, labels: np.ndarray | None) -> None:
    """Adds what was extracted of n intact images that it needs, with their indices (n,) and labels (n,), -1 if unknown."""

  @abc.abstractmethod
  def arrays(self) -> Arrays:
    """Returns the result as arrays, after the last batch."""

  @abc.abstractmethod
  def load(self, arrays: Arrays) -> None:
    """Takes the result from `arrays`; raises KeyError if one is missing."""


class OfAll(Summary):
  """The features of all images, with the root of their covariance; `result` is set by `load`."""

  def __init__(self, name: str) -> None:
    self.name = name
    self.result: Features

  def begin(self, count: int) -> np.ndarray | None:
    self._running = RunningFeatures(count)
    return None

  def add(self, found: Extracted, places: np.ndarray, labels: np.ndarray | None) -> None:
    del places, labels
    self._running.take(found, slice(None))

  def arrays(self) -> Arrays:
    return to_arrays(self._running.result(), with_root=True)

  def load(self, arrays: Arrays) -> None:
    self.result = from_arrays(arrays)


class OfDraw(Summary):
  """The features of `size` images that are drawn with replacement, like the samples of a model that repeats the images.

  Each image counts as often as it is drawn; the features are in the order of the images.
  """

  def __init__(self, name: str, size: int, seed: int) -> None:
    self.name, self._size, self._seed = name, size, seed
    self.result: Features

  def described(self) -> dict[str, Any]:
    return {'size': self._size, 'seed': self._seed}

  def begin(self, count: int) -> np.ndarray | None:
    chosen = np.random.Generator(np.random.Philox(self._seed)).integers(count, size=self._size)
    self._times = np.bincount(chosen, minlength=count)
    self._running = RunningFeatures(self._size)
    return np.flatnonzero(self._times)

  def add(self, found: Extracted, places: np.ndarray, labels: np.ndarray | None) -> None:
    del labels
    self._running.take(found, np.repeat(np.arange(len(places)), self._times[places]))

  def arrays(self) -> Arrays:
    return to_arrays(self._running.result())

  def load(self, arrays: Arrays) -> None:
    self.result = from_arrays(arrays)


class OfEach(Summary):
  """The features of at most `most` individual images, those of `some_of`.

  Attributes:
    features: (n, D) float32, of the intact ones.
    places: (n,), their indices, ascending.
  """

  def __init__(self, name: str, most: int) -> None:
    self.name, self._most = name, most
    self.features: np.ndarray
    self.places: np.ndarray

  def described(self) -> dict[str, Any]:
    return {'most': self._most}

  def begin(self, count: int) -> np.ndarray | None:
    self._parts: list[tuple[np.ndarray, np.ndarray]] = []
    return some_of(count, self._most)

  def add(self, found: Extracted, places: np.ndarray, labels: np.ndarray | None) -> None:
    del labels
    self._parts.append((np.asarray(found.features), places))

  def arrays(self) -> Arrays:
    features, places = zip(*self._parts, strict=True)
    return {'features': np.concatenate(features), 'places': np.concatenate(places).astype(np.int64)}

  def load(self, arrays: Arrays) -> None:
    self.features, self.places = arrays['features'], arrays['places']


def load_or_compute(
  directory: pathlib.Path, extractor: Extractor, images: Loader, summaries: Sequence[Summary]
) -> None:
  """Loads summaries from their files, or computes them in one pass over the images and writes the files.

  Args:
    directory: the directory of the files; created if necessary.
    extractor: the feature extractor.
    images: the images; unreadable ones are left out.
    summaries: the summaries; each has its result afterwards.
  """
  missing, common = [], _describe(extractor, images)
  for summary in summaries:
    found = read(directory, summary.name, common | summary.described())
    if cluster.agree(found is not None) and found is not None:
      summary.load(found)
    else:
      missing.append(summary)
  if missing:
    compute(extractor, images, missing)
  for summary in missing:
    arrays = summary.arrays()
    write(directory, summary.name, common | summary.described(), arrays)
    summary.load(arrays)


def compute(extractor: Extractor, images: Loader, summaries: Sequence[Summary]) -> None:
  """Adds the features of all images that a summary needs, in one pass."""
  needed = [summary.begin(len(images)) for summary in summaries]
  some = [places for places in needed if places is not None]
  order = np.arange(len(images)) if len(some) < len(needed) else np.unique(np.concatenate(some))
  size = batch_size(extractor, len(order))
  batches, name = images.in_order(size, order), f'features of {images.images.name}'
  steps = math.ceil(len(order) / size)
  with contextlib.closing(batches), Progress(name, steps, images_per_step=size) as progress:
    for k, batch in enumerate(batches):
      interrupts.check()
      known = {'mask': batch['mask'], 'label': (batch['cond'] or {}).get('label')}
      here: dict[str, Any] = sharding.gather_batch(known)
      mask, labels = here['mask'], here['label']
      if mask.any():
        places = order[k * size : (k + 1) * size]
        intact = np.flatnonzero(mask)  # padding lies beyond the places
        found: Any = sharding.to_host(extractor.of(sharding.put(batch['image'])))
        chosen = _rows(found, intact)
        for summary, own in zip(summaries, needed, strict=True):
          _add(summary, own, chosen, places[intact], None if labels is None else labels[intact])
      progress.advance()


def _add(
  summary: Summary,
  needed: np.ndarray | None,
  found: Extracted,
  places: np.ndarray,
  labels: np.ndarray | None,
) -> None:
  """Adds to a summary those of a batch of images that it needs."""
  mine = slice(None) if needed is None else np.isin(places, needed)
  labels = None if labels is None else labels[mine]
  if len(places[mine]):
    summary.add(_rows(found, mine), places[mine], labels)


def _rows(found: Extracted, chosen: np.ndarray | slice) -> Extracted:
  rows: Extracted = jax.tree.map(lambda x: np.asarray(x)[chosen], found)
  return rows


def of_all(extractor: Extractor, images: Loader) -> Features:
  """Computes the features of all images and keeps nothing; unreadable images are left out."""
  summary = OfAll('')
  compute(extractor, images, [summary])
  return from_arrays(summary.arrays())


def _describe(extractor: Extractor, images: Loader) -> dict[str, Any]:
  """Returns the cache key: everything that the features depend on."""
  return {
    'format': FORMAT,
    'extractor': extractor.digest,
    'images': images.images.identity,
    'image_shape': list(images.images.image_shape),
  }


# Files.


def read(directory: pathlib.Path, name: str, described: Mapping[str, Any]) -> Arrays | None:
  """Reads the arrays in a file; returns None if it is missing, does not match, or is damaged, which is logged."""
  path = directory / f'{name}.safetensors'
  if not path.is_file():
    return None
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      meta = file.metadata()
      if json.loads(meta['of']) != described:
        return None
      arrays = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    if digest(arrays) != meta['digest']:
      raise ValueError('its digest differs')
    return arrays
  except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
    _log.warning('%s is damaged (%s); computing its features again', path, error)
    return None


def write(directory: pathlib.Path, name: str, described: Mapping[str, Any], arrays: Arrays) -> None:
  """Writes arrays with what they were made from."""
  if files.writes():
    directory.mkdir(parents=True, exist_ok=True)
    meta, path = (
      {'of': json.dumps(described), 'digest': digest(arrays)},
      directory / f'{name}.safetensors',
    )
    temporary = path.with_suffix('.tmp')
    safetensors.numpy.save_file(arrays, temporary, meta)
    os.replace(temporary, path)


def to_arrays(features: Features, prefix: str = '', with_root: bool = False) -> Arrays:
  """Returns the arrays of features by name; those of the spatial features begin with 'spatial_'."""
  found = {'mean': features.moments.mean, 'cov': features.moments.cov}
  found |= {'root': features.moments.root} if with_root else {}
  found |= {} if features.count is None else {'count': np.array([features.count])}
  found |= {} if features.some is None else {'some': features.some}
  found |= {} if features.posterior is None else {'posterior': features.posterior}
  found = {prefix + key: array for key, array in found.items()}
  spatial = features.spatial
  return found | ({} if spatial is None else to_arrays(spatial, 'spatial_', with_root))


def from_arrays(arrays: Arrays, prefix: str = '') -> Features:
  """The inverse of `to_arrays`; raises KeyError if there are no moments."""
  spatial = None if prefix or 'spatial_mean' not in arrays else from_arrays(arrays, 'spatial_')
  count = arrays.get(prefix + 'count')
  return Features(
    Moments.with_root(arrays[prefix + 'mean'], arrays[prefix + 'cov'], arrays.get(prefix + 'root')),
    arrays.get(prefix + 'some'),
    None if count is None else int(count[0]),
    arrays.get(prefix + 'posterior'),
    spatial,
  )
