"""The contents of `results.json` apart from its rows, and the reuse of rows from an earlier evaluation."""

import importlib.metadata
import logging
import math
import pathlib
import platform
from collections.abc import Collection
from typing import Any

from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.errors import DamagedError
from diffusion_distillation.evaluation.clip_score import NAME, RunningScore
from diffusion_distillation.evaluation.extracted import Extractors
from diffusion_distillation.evaluation.metrics import Features, entry, measure_all
from diffusion_distillation.evaluation.reference import Real
from diffusion_distillation.stages.model import add_metrics
from diffusion_distillation.stages.provenance import Model
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system.files import read_json

_log = logging.getLogger(__name__)

_USUAL = 10_000  # number of samples below which distances are not compared with published ones
_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'scikit-learn')


def measured(
  samples: Features, reference: Features | None, score: RunningScore | None = None
) -> dict[str, Any]:
  """Returns what a row says of the samples: the metrics that its inputs allow, of which there is at least one.

  Args:
    samples: the features of the samples.
    reference: those of real images; None if there are none to compare with.
    score: the CLIP score of the samples; None if it is not measured.

  Returns:
    `value`, the first metric, which is the Frechet distance if there is a reference, with its standard error `error` and its
    `bias` (None if unknown); `metrics`, all metrics by name; `errors`, the errors of those metrics that have one.
  """
  found = {} if reference is None else measure_all(samples, reference)
  if score is not None:
    found[NAME] = score.result()
  first = next(iter(found.values()))
  return {
    'value': first.value,
    'error': first.error,
    'bias': first.bias,
    'metrics': {name: estimate.value for name, estimate in found.items()},
    'errors': {name: e.error for name, e in found.items() if e.error is not None},
  }


def empty(metric: str, dataset: str, labels: str | None) -> dict[str, Any]:
  """Returns what all `results.json` have, without rows.

  Args:
    metric: the name of the rows' `value`.
    dataset: the name of the dataset.
    labels: distribution of the samples' labels, one of `conditioning.LABELS`; None for unconditional models.

  Returns:
    The contents; `metrics` names the metrics that apply, each with its better direction, and `warnings` holds sentences.
  """
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
  return {
    'rows': [],
    'metric': metric,
    'dataset': dataset,
    'metrics': {},
    'labels': labels,
    'warnings': [],
    'versions': {'python': platform.python_version(), **versions},
  }


def header(
  extractors: Extractors,
  real: Real,
  described: dict[str, Any],
  train: Loader,
  held_out: Loader,
  seed: int,
  labels: str | None,
) -> dict[str, Any]:
  """Returns the contents of `results.json` of an evaluation with images, without rows; see `empty`.

  Args:
    extractors: the feature extractors.
    real: features of real images.
    described: the reference, see `reference.describe`.
    train: the training images.
    held_out: the held-out images.
    seed: seed of the draw of the floor.
    labels: see `empty`.
  """
  extractor = extractors.main
  reference, unseen, floor = real
  of_floor, of_unseen = measured(floor, reference), measured(unseen, reference)
  names = {**of_floor['metrics'], **of_unseen['metrics']}
  return empty(extractor.metric, train.images.name, labels) | {
    'metrics': {name: {'better': entry(name).better} for name in names},
    'floor': of_floor | {'num_samples': floor.count, 'seed': seed},
    'held_out': of_unseen | {'num_samples': unseen.count},
    'extractor': {
      'name': extractor.name,
      'digest': extractor.digest,
      'task': getattr(extractor, 'task', None),
      'held_out_accuracy': getattr(extractor, 'accuracy', None),
    },
    **_described_dinov2(extractors),
    'reference': described,
    'skipped': {
      'train': len(train) - (reference.count or 0) if 'split' in described else len(train.skipped),
      'held_out': len(held_out) - (unseen.count or 0),
    },
    'warnings': warnings(floor),
  }


def sampling_floor(results: dict[str, Any]) -> float:
  """Returns the part of the floor that decreases as 1/n with the number n of images.

  That is all of it, or its bias if the reference is a file, whose images may lie at a distance from the training images.
  """
  floor = results['floor']
  from_file = 'file' in results['reference'] and floor['bias'] is not None
  return float(floor['bias' if from_file else 'value'])


def _described_dinov2(extractors: Extractors) -> dict[str, Any]:
  """Returns what `results.json` says of the extractor of `fd_dinov2`, if there is one."""
  found = extractors.dinov2
  return {} if found is None else {'dinov2': {'name': found.name, 'digest': found.digest}}


def warnings(samples: Features) -> list[str]:
  """Returns what a reader of a table with this many samples should know, as sentences."""
  count, size = samples.count or 0, len(samples.moments.mean)
  found = []
  if count < _USUAL:
    found.append(
      f'{count} samples per row; published figures are taken with {_USUAL} and more, and fewer samples give larger distances.'
    )
  sizes = [size] if samples.dinov2 is None else [size, len(samples.dinov2.moments.mean)]
  for size in sizes:
    if count <= size:
      found.append(
        f'{count} samples have a singular covariance in {size} dimensions: distances of so few are mostly bias.'
      )
  return found


def origins(
  stages: list[Stage], seconds: dict[str, float], workdir: pathlib.Path
) -> dict[str, dict[str, Any]]:
  """Returns the method and the parents of each stage, and its cost: the seconds of training after the first stage.

  The cost is the time to train the stage, its teacher and the stage that it starts from, with all of their own parents, and
  to draw the stored pairs. Each is counted once; the first stage is not counted.
  """
  path = workdir / 'pairs' / 'pairs.json'
  drawing = read_json(path)['seconds'] if path.is_file() else 0.0
  found: dict[str, dict[str, Any]] = {}
  needs: dict[str, set[str]] = {}
  for stage in stages:
    own = {stage.name} if stage.parent else set()
    from_pairs = {'pairs'} if stage.pairs else set()
    before = [needs.get(name or '', set()) for name in (stage.parent, stage.start)]
    needs[stage.name] = own | from_pairs | set().union(*before)
    cost = sum(drawing if name == 'pairs' else seconds[name] for name in needs[stage.name])
    origin = {'method': stage.method, 'parent': stage.parent, 'start': stage.starts_from}
    found[stage.name] = origin | {'cost': cost}
  return found


_MEASURED = (
  *('metric', 'value', 'error', 'bias', 'metrics', 'errors', 'reference'),
  *('num_drawn', 'seconds_per_image', 'class_accuracy', 'by_class'),
)


def key_of(row: dict[str, Any]) -> tuple:
  """Returns a key that identifies a row.

  Rows of older versions lack labels, which were balanced, guidance, which was 0, the guiding model, of which there was none,
  and dtype, which counts as float32.
  """
  described = {k: v for k, v in row.items() if k not in _MEASURED}
  if described.get('labels') != 'data':
    described.pop('labels', None)
  if not described.get('guidance'):
    described.pop('guidance', None)
  if not described.get('guiding_model'):
    described.pop('guiding_model', None)
  if described.get('dtype') == 'float32':
    described.pop('dtype')
  interval = described.pop('guidance_interval', None)
  return (*sorted(described.items()), tuple(interval or ()))


def known_rows(path: pathlib.Path, results: dict[str, Any]) -> dict[tuple, dict[str, Any]]:
  """Returns earlier rows of the same extractor and reference, or CLIP model, by key; logs a warning and returns none if the file is damaged.

  Args:
    path: the file of the earlier rows.
    results: those of the present evaluation, without rows.
  """
  if not path.exists():
    return {}
  try:
    old = read_json(path)
    by = 'extractor' if 'extractor' in results else 'clip'  # what the rows' values come from
    same = old[by]['digest'] == results[by]['digest']
    same = same and _identity(old.get('reference', {})) == _identity(results.get('reference', {}))
    same = same and len({found['dinov2']['digest'] for found in (old, results) if 'dinov2' in found}) < 2
    if 'dinov2' in results and 'dinov2' not in old:  # nobody knows with which weights
      old['rows'] = [_without_dinov2(row) for row in old['rows']]
    return {key_of(row): row for row in old['rows'] if not math.isnan(row['value'])} if same else {}
  except (DamagedError, KeyError, TypeError, AttributeError) as error:
    _log.warning('%s is damaged (%r); measuring its rows again', path, error)
    return {}


def _without_dinov2(row: dict[str, Any]) -> dict[str, Any]:
  """Returns a row without what was measured with the features of DINOv2."""
  kept = {
    name: {metric: value for metric, value in row[name].items() if metric != 'fd_dinov2'}
    for name in ('metrics', 'errors')
    if name in row
  }
  return row | kept


def _identity(reference: dict[str, Any]) -> str | None:
  """Returns the digest of a reference file; None for the training images, which a workdir never changes."""
  return reference['digest'] if 'file' in reference else None


def note_missing(results: dict[str, Any], kept: Collection[int]) -> None:
  """Logs which metrics some rows lack, and why.

  Rows that are kept are not measured again because of a new metric. New rows lack a metric if they have too few samples for it,
  because `evaluation.tolerance` ended them early or `evaluation.num_samples` is small.

  Args:
    results: the contents of `results.json`.
    kept: the places of the rows that an earlier evaluation has measured.
  """
  lacking = [results['metrics'].keys() - row.get('metrics', {'frechet'}) for row in results['rows']]
  reasons: dict[str, list[set[str]]] = {
    'were measured by an earlier evaluation and lack %s; --mode=evaluate measures all rows again': [],
    'have too few samples for %s, because evaluation.tolerance ended them early': [],
    'have too few samples for %s; raise evaluation.num_samples': [],
  }
  earlier, ended, few = reasons.values()
  for place, (names, row) in enumerate(zip(lacking, results['rows'], strict=True)):
    if names:
      is_early = row.get('num_drawn', row['num_samples']) < row['num_samples']
      (earlier if place in kept else ended if is_early else few).append(names)
  for reason, found in reasons.items():
    if found:
      listed = [name for name in results['metrics'] if any(name in names for names in found)]
      _log.warning(f'%d of %d rows {reason}', len(found), len(lacking), ', '.join(listed))


def record(rows: list[dict[str, Any]], models: list[Model], workdir: pathlib.Path) -> None:
  """Writes the rows of each model to its folder."""
  for m in models:
    own = [row for row in rows if row['stage'] == m.stage.name and row['digest'] == m.digest]
    add_metrics(workdir / m.stage.name / 'model', own)
