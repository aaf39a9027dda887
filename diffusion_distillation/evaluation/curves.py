"""The rows of `results.json` as curves and tables: quality by network evaluations, by time, by guidance and by class."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Rows = Sequence[Mapping[str, Any]]

_SAMPLERS = {
  'ddim': 'DDIM',
  'ddim_keep_eps': 'DDIM, eps kept',
  'ancestral': 'ancestral',
  'euler': 'Euler',
  'heun': 'Heun',
  'rk4': 'RK4',
  'edm_heun': "EDM's Heun",
  'dpm_solver_2m': 'DPM-Solver++(2M)',
  'multistep_consistency': 'multistep consistency',
}
_FAMILIES = {
  'guided': 'Guided',
  'progressive': 'Progressive',
  'knowledge': 'Knowledge',
  'consistency': 'Consistency',
  'dmd': 'DMD',
  'dmd2': 'DMD2',
}
_METRICS = {
  'kid': 'KID',
  'precision': 'precision',
  'recall': 'recall',
  'inception_score': 'IS',
  'sfid': 'sFID',
  'fd_dinov2': 'FD-DINOv2',
  'clip_score': 'CLIP score',
  'class_accuracy': 'class accuracy',
}
_MOST = 8  # curves that can be told apart in one figure


class Point(NamedTuple):
  """A point of a curve.

  Attributes:
    x: its place.
    value: the measured value.
    error: the standard error of the value; None if it is not known.
    calls: network evaluations per image.
  """

  x: float
  value: float
  error: float | None = None
  calls: int = 0


def value_name(metric: str | None) -> str:
  """Returns the name in `metrics` of the rows' `value`, which the figures show, by what the rows call it in `metric`.

  It is the Frechet distance, or the CLIP score if there were no images to compare with.
  """
  return 'clip_score' if metric == _METRICS['clip_score'] else 'frechet'


def metric_name(name: str) -> str:
  """Returns a metric's name for people."""
  return _METRICS.get(name, name)


def family(row: Mapping[str, Any]) -> str:
  """Returns the name of a student's curve; all rounds of progressive distillation share one curve."""
  name = 'progressive' if row['method'] == 'progressive' else row['stage']
  return _FAMILIES.get(name, name)


def _caption(row: Mapping[str, Any], base: str) -> str:
  """Returns the curve that a row belongs to."""
  kind = 'autoguidance' if row.get('guiding_model') else 'guidance'
  guided = f', {kind} {row["guidance"]:g}' if row.get('guidance') else ''
  if row['stage'] == base:
    return f'Base, {_SAMPLERS.get(row["sampler"], row["sampler"])}{guided}'
  return family(row) + guided


def grouped(rows: Rows) -> dict[str, list[Mapping[str, Any]]]:
  """Returns the rows of each curve: of each family of students, then of the base with each sampler and guidance.

  Only the first moving average of a stage belongs to a curve.
  """
  base = rows[0]['stage']
  students: dict[str, list[Mapping[str, Any]]] = {}
  of_base: dict[str, list[Mapping[str, Any]]] = {}
  for row in rows:
    if row['weights'] == 'ema':
      kind = of_base if row['stage'] == base else students
      kind.setdefault(_caption(row, base), []).append(row)
  return students | of_base


def curves(rows: Rows) -> dict[str, dict[int, float]]:
  """Returns value by number of network evaluations for each curve of `grouped`."""
  return {caption: {r['nfe']: r['value'] for r in found} for caption, found in grouped(rows).items()}


def comparison(rows: Rows) -> list[dict[str, Any]]:
  """Returns a line for each number of network evaluations, in descending order, with the value of each curve or None.

  `errors` are the standard errors, or None; `ratios` divide the students' distances by the distance of the base with DDIM at its
  largest number of evaluations, with the student's guidance if the base was measured with it. CLIP scores have no ratios.
  """
  columns, is_distance = curves(rows), value_name(rows[0].get('metric')) == 'frechet'
  barred = {
    caption: {r['nfe']: r.get('error') for r in found} for caption, found in grouped(rows).items()
  }
  calls = sorted({nfe for curve in columns.values() for nfe in curve}, reverse=True)
  bases = {caption: _base_of(caption, columns) if is_distance else None for caption in columns}
  lines = []
  for nfe in calls:
    values = {caption: curve.get(nfe) for caption, curve in columns.items()}
    ratios = [
      value / base if value is not None and (base := bases[caption]) else None
      for caption, value in values.items()
    ]
    errors = [barred[caption].get(nfe) for caption in columns]
    lines.append({'nfe': nfe, 'values': list(values.values()), 'ratios': ratios, 'errors': errors})
  return lines


def _base_of(caption: str, columns: Mapping[str, Mapping[int, float]]) -> float | None:
  """Returns the value that those of a student's curve are divided by; None for a curve of the base, or without DDIM."""
  if caption.startswith('Base, '):
    return None
  guidance = ''.join(caption.partition(', guidance ')[1:])
  found = columns.get(f'Base, DDIM{guidance}') or columns.get('Base, DDIM') or {}
  return found[max(found)] if found else None


def few(rows: Rows) -> Rows:
  """Returns rows of so few curves that a figure can show them.

  If there are too many, only one weight of guidance is kept of each stage that was measured with several: the one at which the
  base is best.
  """
  if len(grouped(rows)) <= _MOST:
    return rows
  base = rows[0]['stage']
  choose = min if value_name(rows[0].get('metric')) == 'frechet' else max
  best = choose((r for r in rows if r['stage'] == base), key=lambda r: r['value']).get('guidance') or 0.0
  several = {stage for stage in (r['stage'] for r in rows) if len(_weights(rows, stage)) > 1}
  return [r for r in rows if r['stage'] not in several or (r.get('guidance') or 0.0) == best]


def _weights(rows: Rows, stage: str) -> set[float]:
  return {r.get('guidance') or 0.0 for r in rows if r['stage'] == stage}


def by_calls(rows: Rows) -> dict[str, list[Point]]:
  """Returns each curve over network evaluations."""
  return _by(rows, lambda row: row['nfe'])


def by_seconds(rows: Rows) -> dict[str, list[Point]]:
  """Returns each curve over the seconds per image, without rows that were not timed."""
  timed = [row for row in rows if (row.get('seconds_per_image') or 0.0) > 0.0]
  return _by(timed, lambda row: row['seconds_per_image']) if timed else {}


def by_cost(results: Mapping[str, Any]) -> dict[str, list[Point]]:
  """Returns the curve of each family of students over the seconds of training after the base."""
  rows, stages = results['rows'], results['stages']
  students = [row for row in few(rows) if row['stage'] != rows[0]['stage']]
  if not students:
    return {}
  found: dict[str, list[Point]] = {}
  for row in students:
    if row['weights'] == 'ema':
      place = Point(stages[row['stage']]['cost'], row['value'], row.get('error'), row['nfe'])
      found.setdefault(_caption(row, rows[0]['stage']), []).append(place)
  return {caption: sorted(points) for caption, points in found.items()}


def _by(rows: Rows, place: Any) -> dict[str, list[Point]]:
  return {
    caption: sorted(Point(place(r), r['value'], r.get('error'), r['nfe']) for r in found)
    for caption, found in grouped(rows).items()
  }


def time_unit(seconds: float) -> tuple[str, float]:
  """Returns the unit in which a time is easy to read, and its length in seconds."""
  for unit, length in (('hours', 3600.0), ('minutes', 60.0)):
    if seconds >= 3 * length:
      return unit, length
  return 'seconds', 1.0


def by_weight(rows: Rows, distance: str) -> dict[str, dict[str, list[Point]]]:
  """Returns, for each metric by name, the curve over the weight of guidance of each stage that was measured with several.

  A stage is shown at its largest number of steps, the base with its first sampler. Metrics without a curve are left out.

  Args:
    rows: the rows.
    distance: the name of the rows' `value`.
  """
  found: dict[str, list[Mapping[str, Any]]] = {}
  for stage in dict.fromkeys(row['stage'] for row in rows):
    own = [row for row in rows if row['stage'] == stage and row['weights'] == 'ema']
    most = max((row['num_steps'] for row in own), default=0)
    own = [row for row in own if row['num_steps'] == most and row['sampler'] == own[0]['sampler']]
    if len(_weights(own, stage)) > 1:
      found[f'{stage}, {most} step{"s" * (most > 1)}'] = own
  panels: dict[str, dict[str, list[Point]]] = {}
  for name in (distance, 'precision', 'recall', 'class_accuracy', 'clip_score'):
    lines = {}
    for caption, own in found.items():
      known = []
      for row in own:
        value, error = _value(row, name, distance)
        if value is not None:
          known.append(Point(row.get('guidance') or 0.0, value, error, row['nfe']))
      if len(known) > 1:
        lines[caption] = sorted(known)
    if lines:
      panels[metric_name(name)] = lines
  return panels


def _value(row: Mapping[str, Any], name: str, distance: str) -> tuple[float | None, float | None]:
  """Returns a metric of a row and its standard error."""
  if name == distance:
    return row['value'], row.get('error')
  if name == 'class_accuracy':
    return row.get(name), accuracy_error(row.get(name), row.get('num_drawn'))
  return row.get('metrics', {}).get(name), row.get('errors', {}).get(name)


def accuracy_error(accuracy: float | None, count: int | None) -> float | None:
  """Returns the standard error of a share of `count` independent samples; None if it is not known."""
  if accuracy is None or not count:
    return None
  return float((accuracy * (1.0 - accuracy) / count) ** 0.5)


_HEALTH = {
  'diversity': 'diversity relative to the data',
  'fake_score_lag': 'lag of the fake score',
  'dm_gradient': 'size of the DM gradient',
}


def health(
  watched: Mapping[str, Sequence[Mapping[str, float]]],
) -> dict[str, tuple[str, dict[str, list[Point]]]]:
  """Returns each measure of health with its title, as curves over the share of updates.

  A stage that was checked once has no curve, and a measure without curves is left out.
  """
  found: dict[str, tuple[str, dict[str, list[Point]]]] = {}
  for name, title in _HEALTH.items():
    for stage, lines in watched.items():
      points = [Point(line['step'] / lines[-1]['step'], line[name]) for line in lines if name in line]
      if len(points) > 1:
        found.setdefault(name, (title, {}))[1][stage] = points
  return found


def last_health(watched: Mapping[str, Sequence[Mapping[str, float]]]) -> list[dict[str, Any]]:
  """Returns the last value of each measure of health of every stage whose samples were checked."""
  found = []
  for stage, lines in watched.items():
    if any('diversity' in line for line in lines):
      last = {name: next((ln[name] for ln in reversed(lines) if name in ln), None) for name in _HEALTH}
      found.append({'stage': stage, **last})
  return found
