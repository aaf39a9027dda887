"""The contents of `results.json` apart from its rows, and the reuse of rows from an earlier evaluation."""

import importlib.metadata
import logging
import pathlib
import platform
from typing import Any

from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.errors import DamagedError
from diffusion_distillation.evaluation.features import FeatureExtractor
from diffusion_distillation.evaluation.metrics import METRICS, frechet
from diffusion_distillation.evaluation.reference import Real
from diffusion_distillation.stages.model import add_metrics
from diffusion_distillation.stages.provenance import Model
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system.files import read_json

_log = logging.getLogger(__name__)

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'orbax-checkpoint', 'numpy', 'scikit-learn')


def header(
  extractor: FeatureExtractor, real: Real, train: Loader, held_out: Loader, seed: int, labels: str | None
) -> dict[str, Any]:
  """Returns the contents of `results.json` with an empty list of rows.

  Args:
    extractor: the feature extractor.
    real: features of real images.
    train: the training images.
    held_out: the held-out images.
    seed: seed of the draw of the floor.
    labels: distribution of the samples' labels, one of `conditioning.LABELS`; None for unconditional models.
  """
  versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
  reference, unseen, floor = real
  return {
    'rows': [],
    'metric': f'FD-{extractor.name}',
    'floor': {'value': frechet(floor, reference), 'num_samples': floor.count, 'seed': seed},
    'held_out': {'value': frechet(unseen, reference), 'num_samples': unseen.count},
    'labels': labels,
    'extractor': {
      'name': extractor.name,
      'digest': extractor.digest,
      'task': extractor.task,
      'held_out_accuracy': extractor.accuracy,
    },
    'reference': {'split': 'train', 'num_images': reference.count},
    'skipped': {
      'train': len(train) - reference.count,
      'held_out': len(held_out) - unseen.count,
    },
    'versions': {'python': platform.python_version(), **versions},
  }


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
    start = None if stage.starts_anew else stage.start or stage.parent
    origin = {'method': stage.method, 'parent': stage.parent, 'start': start}
    found[stage.name] = origin | {'cost': cost}
  return found


_MEASURED = ('metric', 'value', 'metrics', 'num_drawn', 'seconds_per_image')


def key_of(row: dict[str, Any]) -> tuple:
  """Returns a key that identifies a row.

  Rows of older versions lack labels, which were balanced, guidance, which was 0, and dtype, which counts as float32.
  """
  described = {k: v for k, v in row.items() if k not in _MEASURED}
  if described.get('labels') != 'data':
    described.pop('labels', None)
  if not described.get('guidance'):
    described.pop('guidance', None)
  if described.get('dtype') == 'float32':
    described.pop('dtype')
  interval = described.pop('guidance_interval', None)
  return (*sorted(described.items()), tuple(interval or ()))


def known_rows(path: pathlib.Path, extractor: FeatureExtractor) -> dict[tuple, dict[str, Any]]:
  """Returns earlier rows of the same extractor, by key; logs a warning and returns none if the file is damaged."""
  if not path.exists():
    return {}
  try:
    old = read_json(path)
    same = old['extractor']['digest'] == extractor.digest
    return {key_of(row): row for row in old['rows'] if _is_whole(row)} if same else {}
  except (DamagedError, KeyError, TypeError, AttributeError) as error:
    _log.warning('%s is damaged (%r); measuring its rows again', path, error)
    return {}


def _is_whole(row: dict[str, Any]) -> bool:
  """Whether a row has a value for every metric; rows without `metrics` are older and only have the Frechet distance."""
  known = row.get('metrics', {'frechet': row['value']})
  return bool(row['value'] >= 0.0) and METRICS.keys() <= known.keys()


def record(rows: list[dict[str, Any]], models: list[Model], workdir: pathlib.Path) -> None:
  """Writes the rows of each model to its folder."""
  for m in models:
    own = [row for row in rows if row['stage'] == m.stage.name and row['digest'] == m.digest]
    add_metrics(workdir / m.stage.name / 'model', own)
