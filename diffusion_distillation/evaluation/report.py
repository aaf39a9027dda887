"""The report: a self-contained HTML page with figures, samples and tables, for light and dark screens of any width."""

import functools
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import numpy as np

from diffusion_distillation.config import Config, flatten
from diffusion_distillation.evaluation import curves, figures, pictures
from diffusion_distillation.evaluation.figures import Picture
from diffusion_distillation.evaluation.neighbours import Neighbours
from diffusion_distillation.evaluation.report_contents import ByGuidance, ByText, ReportContents
from diffusion_distillation.evaluation.themes import LIGHT

_FIGURES = (
  *('frechet', 'clip_score', 'seconds', 'cost', 'guidance', 'nearest', 'samples'),
  *('health', 'health_diversity', 'health_fake_score_lag', 'health_dm_gradient'),
)
_CLASSES = 20  # with more classes than this, only the worst are listed
_WORST = 10
_SIDE = 128  # height in pixels to which large images are reduced where many stand side by side
_LETTERS = 100  # of a text above its images


def environment() -> jinja2.Environment:
  """Returns the templates of the report and of the comparison, which escape what they are given."""
  found = jinja2.Environment(
    loader=jinja2.PackageLoader('diffusion_distillation.evaluation', '.'),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  found.filters['number'] = number
  found.filters['measured'] = measured
  found.filters['signed'] = signed
  found.filters['metric_name'] = curves.metric_name
  return found


def number(value: float | None) -> str:
  """Formats a number with four digits; '' for None."""
  return '' if value is None else f'{value:.4g}'


def measured(value: float | None, error: float | None = None) -> str:
  """Formats a value with its standard error, if that is known, to two digits of the error; '' for None."""
  if value is None or not error:
    return number(value)
  digits = _digits(error)
  return f'{value:.{digits}f} ± {error:.{digits}f}'


def _digits(error: float) -> int:
  """Returns the number of decimals that show two significant digits of an error."""
  return max(0, 1 - math.floor(math.log10(error)))


def signed(difference: tuple[float, float | None] | None) -> str:
  """Formats a difference and its standard error with a sign; '' for None."""
  if difference is None:
    return ''
  value, error = difference
  return f'{value:+.{_digits(error)}f} ± {error:.{_digits(error)}f}' if error else f'{value:+.3g}'


def write(
  config: Config, results: Mapping[str, Any], contents: ReportContents, directory: pathlib.Path
) -> None:
  """Writes `index.html`, its figures as .png files, and the samples of each stage as `samples.npz`.

  A figure is only written if it has something to show: `seconds.png` needs rows that were timed, `cost.png` students,
  `guidance.png` models that were measured with several weights, `health_*.png` students that were checked at least twice.

  Args:
    config: the config of the run, which the report shows.
    results: the contents of `results.json`.
    contents: what the report shows beside the rows.
    directory: directory of the report; created if necessary.
  """
  directory.mkdir(exist_ok=True)
  drawn, table = _figures(results, contents), curves.comparison(results['rows'])
  value = curves.value_name(results['metric'])
  lines = {stage: watched.lines for stage, watched in contents.watched.items()}
  html = (
    environment()
    .get_template('report.html')
    .render(
      results=results,
      table=table,
      metrics=other_metrics(results),
      value=value,
      label='Frechet distance' if value == 'frechet' else results['metric'],
      upwards=value != 'frechet',
      guided=any(row.get('guidance') for row in results['rows']),
      accuracy=any(row.get('class_accuracy') is not None for row in results['rows']),
      barred=any(row.get('error') for row in results['rows']),
      config=list(flatten(config)),
      curves=list(curves.curves(results['rows'])),
      ratios=any(r is not None for line in table for r in line['ratios']),
      left_out=len(curves.few(results['rows'])) < len(results['rows']),
      figures=drawn,
      samples=[strips(caption, images) for caption, images in contents.samples.items()],
      neighbours=_neighbours(contents.neighbours),
      neighbours_of=contents.neighbours_of,
      classes=class_table(results, contents.class_names),
      texts=_texts(contents.by_text),
      grids=[_grid(found, contents.class_names) for found in contents.by_guidance],
      health=curves.last_health(lines),
      denoisings={k: figures.encode(w.picture) for k, w in contents.watched.items() if w.picture},
    )
  )
  for name in _FIGURES:  # one of an earlier evaluation may have nothing to show any more
    (directory / f'{name}.png').unlink(missing_ok=True)
  for name, picture in drawn.items():
    (directory / f'{name}.png').write_bytes(picture.png)
  if contents.samples:
    (directory / 'samples.png').write_bytes(figures.to_png(figures.samples(contents.samples), LIGHT))
    arrays: dict[str, Any] = {
      caption.replace('\n', ', '): images for caption, images in contents.samples.items()
    }
    np.savez_compressed(directory / 'samples.npz', **arrays)
  (directory / 'index.html').write_text(html)


def _figures(results: Mapping[str, Any], contents: ReportContents) -> dict[str, Picture]:
  """Draws the figures that have something to show, by name."""
  rows = curves.few(results['rows'])
  by_calls, by_seconds, by_cost = curves.by_calls(rows), curves.by_seconds(rows), curves.by_cost(results)
  value = curves.value_name(results['metric'])
  found = {value: figures.render(lambda theme: figures.by_calls(by_calls, results, theme))}
  if sum(map(len, by_seconds.values())) > 1:
    found['seconds'] = figures.render(lambda theme: figures.by_seconds(by_seconds, results, theme))
  if by_cost:
    found['cost'] = figures.render(lambda theme: figures.by_cost(by_cost, results, theme))
  if panels := curves.by_weight(results['rows'], results['metric']):
    logarithmic = frozenset({results['metric']} if value == 'frechet' else ())
    found['guidance'] = figures.render(lambda theme: figures.by_weight(panels, logarithmic, theme))
  if near := contents.neighbours:
    sets = {
      name: {'samples': d.samples, 'held-out images': d.held_out}
      for name, d in (('in features', near.features), ('in pixels', near.pixels))
    }
    found['nearest'] = figures.render(lambda theme: figures.distances(sets, theme))
  watched = {stage: w.lines for stage, w in contents.watched.items()}
  for name, (title, lines) in curves.health(watched).items():
    found[f'health_{name}'] = figures.render(functools.partial(figures.health, title, lines))
  return found


def other_metrics(results: Mapping[str, Any]) -> list[str]:
  """Returns the names of all metrics of the rows apart from the one that is their value."""
  names = dict.fromkeys(name for row in results['rows'] for name in row.get('metrics', ()))
  return [name for name in names if name != curves.value_name(results['metric'])]


def strips(caption: str, images: np.ndarray) -> dict[str, Any]:
  """Returns a caption and its images in two halves, which stand below each other on a narrow screen."""
  half, images = -(-len(images) // 2), pictures.reduced(images, _SIDE)
  halves = [images[:half], images[half:]]
  return {
    'caption': caption.replace('\n', ', '),
    'halves': [figures.encode(pictures.strip(part, half)) for part in halves if len(part)],
  }


def _neighbours(near: Neighbours | None) -> dict[str, Any] | None:
  """Returns the sheets of images, and how the samples' distances compare with those of held-out images."""
  if near is None:
    return None
  nearest = near.by_features.shape[1]
  sheets = [
    (near.samples, 1),
    *((found.reshape(-1, *found.shape[2:]), nearest) for found in (near.by_features, near.by_pixels)),
  ]
  pngs = [pictures.strip(images, columns) for images, columns in sheets]
  return {
    'sheets': [figures.encode(png) for png in pngs],
    'widths': [pictures.width(png) for png in pngs],
    'measures': [
      {'name': name, 'samples': np.median(d.samples), 'held_out': np.median(d.held_out), 'of': d}
      for name, d in (('features', near.features), ('pixels', near.pixels))
    ],
    'compared': (len(near.features.samples), len(near.features.held_out)),
    'searched': near.searched,
  }


def _grid(found: ByGuidance, class_names: Sequence[str]) -> dict[str, Any]:
  names = [class_names[k] if k < len(class_names) else str(k) for k in found.labels]
  return {
    'stage': found.stage,
    'weights': found.weights,
    'lines': [
      (name, [figures.encode(pictures.strip(image[None], 1)) for image in images])
      for name, images in zip(names, found.images, strict=True)
    ],
  }


def _texts(found: ByText | None) -> list[dict[str, Any]]:
  """Returns each text, cut to one or two lines, with the image that each model drew for it."""
  if found is None:
    return []
  lines = []
  for text, images in zip(found.texts, found.images, strict=True):
    small = pictures.reduced(images, _SIDE)
    pngs = [figures.encode(pictures.strip(image[None], 1)) for image in small]
    cut = text if len(text) <= _LETTERS else f'{text[: _LETTERS - 1].rstrip()}…'
    lines.append({'text': text, 'cut': cut, 'images': list(zip(found.models, pngs, strict=True))})
  return lines


def class_table(results: Mapping[str, Any], class_names: Sequence[str]) -> dict[str, Any] | None:
  """Returns the quality of each stage at its largest number of steps, class by class; None if no row has it.

  Returns:
    `columns`, the captions; `lines`, the name of a class, the share of real images of it or None, and a cell for each column:
    `accuracy` or `share`, with the standard `error`, and `frechet`, each of which may be None; `left_out`, the number of
    classes that are not listed, because others are worse in the last column.
  """
  chosen: dict[str, Mapping[str, Any]] = {}
  for row in results['rows']:
    before = chosen.get(row['stage'], row)
    shown = row.get('by_class') and row['weights'] == 'ema'
    if shown and (before is row or row['num_steps'] > before['num_steps']):
      chosen[row['stage']] = row
  if not chosen:
    return None
  columns = [
    f'{row["stage"]}, {row["num_steps"]} step{"s" * (row["num_steps"] > 1)}' for row in chosen.values()
  ]
  number_of = max(len(next(iter(row['by_class'].values()))) for row in chosen.values())
  real = results.get('class_shares') or []
  lines: list[dict[str, Any]] = []
  for k in range(number_of):
    cells = [_cell(row, k) for row in chosen.values()]
    name = class_names[k] if k < len(class_names) else str(k)
    lines.append({'name': name, 'real': real[k] if k < len(real) else None, 'cells': cells})
  kept = lines
  if number_of > _CLASSES:
    last = [line['cells'][-1] for line in lines]
    kept = [lines[k] for k in sorted(range(number_of), key=lambda k: _quality(last[k]))[:_WORST]]
  return {
    'columns': columns,
    'lines': kept,
    'left_out': number_of - len(kept),
    'conditional': any('accuracy' in row['by_class'] for row in chosen.values()),
    'shares': any('share' in row['by_class'] for row in chosen.values()),
    'distances': any('frechet' in row['by_class'] for row in chosen.values()),
  }


def _quality(cell: Mapping[str, float | None]) -> float:
  """Returns a number that is lower for a class of worse samples: accuracy or share, else the negative distance, if known."""
  shown = cell['accuracy'] if cell['accuracy'] is not None else cell['share']
  if shown is not None:
    return shown
  return math.inf if cell['frechet'] is None else -cell['frechet']


def _cell(row: Mapping[str, Any], label: int) -> dict[str, float | None]:
  """Returns what a row says about one class."""

  def of(name: str) -> float | None:
    values = row['by_class'].get(name, ())
    return values[label] if label < len(values) else None

  count = of('count') if of('accuracy') is not None else row.get('num_drawn')
  shown = of('accuracy') if of('accuracy') is not None else of('share')
  error = curves.accuracy_error(shown, int(count or 0))
  return {'accuracy': of('accuracy'), 'share': of('share'), 'frechet': of('frechet'), 'error': error}
