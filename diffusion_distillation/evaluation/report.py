"""The report: figures, a grid of samples, and a self-contained HTML page that shows them."""

import base64
import dataclasses
import io
import itertools
import pathlib
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np

from diffusion_distillation.config import Config, flatten
from diffusion_distillation.evaluation import pictures

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

_CAPTIONS = {
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
  'progressive': 'Progressive',
  'knowledge': 'Knowledge',
  'consistency': 'Consistency',
  'dmd': 'DMD',
  'dmd2': 'DMD2',
}
_STYLES = [
  # colour, marker
  ('#c2410c', 'o'),
  ('#1d4ed8', 's'),
  ('#15803d', '^'),
  ('#7e22ce', 'D'),
  ('#0e7490', 'v'),
  ('#a16207', 'P'),
  ('#be185d', 'X'),
  ('#4d7c0f', '*'),
]


@dataclasses.dataclass(frozen=True)
class Watched:
  """What was recorded during a stage's training: the lines of its metrics.jsonl, and a picture as PNG or None."""

  lines: list[dict[str, float]]
  picture: bytes | None


def write(
  config: Config,
  results: dict[str, Any],
  grid_rows: dict[str, np.ndarray],
  watched: dict[str, Watched],
  directory: pathlib.Path,
) -> None:
  """Writes `index.html`, and its figures `frechet.png`, `samples.png`, `cost.png` and `health.png`.

  `cost.png` is only written if there are students, and `health.png` if some of them were monitored during training.

  Args:
    config: the config of the run, which the report shows.
    results: the contents of `results.json`.
    grid_rows: captions and (n, H, W, C) uint8 images; all rows are drawn from the same noise.
    watched: what was recorded during the training of each stage.
    directory: directory of the report; created if necessary.
  """
  directory.mkdir(exist_ok=True)
  figures = {'frechet': _png(distance_figure(results)), 'samples': _png(samples_figure(grid_rows))}
  if any(row['stage'] != results['rows'][0]['stage'] for row in results['rows']):
    figures['cost'] = _png(cost_figure(results))
  seen = {name: w.lines for name, w in watched.items() if any('diversity' in line for line in w.lines)}
  if seen:
    figures['health'] = _png(health_figure(seen))
  for name, png in figures.items():
    (directory / f'{name}.png').write_bytes(png)
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('diffusion_distillation.evaluation', '.'), autoescape=True
  )
  html = environment.get_template('report.html').render(
    results=results,
    table=comparison(results['rows']),
    metrics=[name for name in _metrics(results['rows']) if name != 'frechet'],
    guided=any(row.get('guidance') for row in results['rows']),
    config=list(flatten(config)),
    curves=list(curves(results['rows'])),
    base_nfe=max(curves(results['rows']).get('Base, DDIM', {0: 0})),
    figures={name: _base64(png) for name, png in figures.items()},
    denoisings={name: _base64(w.picture) for name, w in watched.items() if w.picture is not None},
  )
  (directory / 'index.html').write_text(html)


def family(row: dict[str, Any]) -> str:
  """Returns the name of a student's curve; all rounds of progressive distillation share one curve."""
  name = 'progressive' if row['method'] == 'progressive' else row['stage']
  return _FAMILIES.get(name, name)


def curves(rows: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
  """Returns value by number of network calls for each family of students, and for the base with each sampler and guidance."""
  base = rows[0]['stage']
  students: dict[str, dict[int, float]] = {}
  of_base: dict[str, dict[int, float]] = {}
  for row in rows:
    if row['weights'] == 'ema' and row['stage'] == base:
      guided = f', guidance {row["guidance"]:g}' if row.get('guidance') else ''
      caption = f'Base, {_CAPTIONS.get(row["sampler"], row["sampler"])}{guided}'
      of_base.setdefault(caption, {})[row['nfe']] = row['value']
    elif row['weights'] == 'ema':
      students.setdefault(family(row), {})[row['nfe']] = row['value']
  return students | of_base


def _metrics(rows: list[dict[str, Any]]) -> list[str]:
  """Returns the metrics that any row has; rows of older versions lack some."""
  return list(dict.fromkeys(name for row in rows for name in row.get('metrics', ())))


def comparison(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Returns a line for each number of network calls, in descending order, with the value of each curve or None.

  `ratios` divide the students' values by the value of the base with DDIM at its largest number of calls.
  """
  columns = curves(rows)
  calls = sorted({nfe for curve in columns.values() for nfe in curve}, reverse=True)
  of_base = columns.get('Base, DDIM', {})
  base = of_base[max(of_base)] if of_base else None
  lines = []
  for nfe in calls:
    values = {caption: curve.get(nfe) for caption, curve in columns.items()}
    ratios = [
      value / base if base and value is not None and not caption.startswith('Base, ') else None
      for caption, value in values.items()
    ]
    lines.append({'nfe': nfe, 'values': list(values.values()), 'ratios': ratios})
  return lines


def distance_figure(results: dict[str, Any]) -> 'Figure':
  """Plots the Frechet distance over network calls, log-log (as Salimans & Ho 2022, Figure 4)."""
  figure, axes = _axes()
  ticks: set[int] = set()
  columns = curves(results['rows'])
  for (caption, curve), (colour, marker) in zip(columns.items(), itertools.cycle(_STYLES), strict=False):
    calls = sorted(curve)
    ticks.update(calls)
    values = [curve[nfe] for nfe in calls]
    axes.plot(calls, values, marker=marker, color=colour, label=caption, linewidth=1.8)
  _floor(axes, results)
  axes.set_xscale('log', base=2)
  axes.set_xticks(sorted(ticks), [str(nfe) for nfe in sorted(ticks)])
  axes.minorticks_off()
  axes.set_xlabel('network calls per image')
  axes.legend(frameon=False, fontsize=8)
  return figure


def cost_figure(results: dict[str, Any]) -> 'Figure':
  """Plots the Frechet distance over the seconds of training from the base to each student, labelled with network calls."""
  figure, axes = _axes()
  base = results['rows'][0]['stage']
  points: dict[str, list[tuple[float, float, int]]] = {}
  for row in results['rows']:
    if row['stage'] != base and row['weights'] == 'ema':
      cost = results['stages'][row['stage']]['cost']
      points.setdefault(family(row), []).append((cost, row['value'], row['nfe']))
  for (caption, curve), (colour, marker) in zip(points.items(), itertools.cycle(_STYLES), strict=False):
    costs, values, calls = zip(*sorted(curve), strict=True)
    axes.plot(costs, values, marker=marker, color=colour, label=caption, linewidth=1.0)
    for cost, value, nfe in zip(costs, values, calls, strict=True):
      axes.annotate(str(nfe), (cost, value), textcoords='offset points', xytext=(5, 5), fontsize=8)
  _floor(axes, results)
  axes.set_xlim(left=0.0)
  axes.set_xlabel('seconds of training after the base; points are labelled with network calls')
  axes.legend(frameon=False, fontsize=8)
  return figure


def health_figure(watched: dict[str, list[dict[str, float]]]) -> 'Figure':
  """Plots diversity, lag of the fake score and DM gradient of students over the share of their updates."""
  names = {
    'diversity': 'diversity relative to the data',
    'fake_score_lag': 'lag of the fake score',
    'dm_gradient': 'size of the DM gradient',
  }
  shown = [name for name in names if any(name in line for lines in watched.values() for line in lines)]
  figure = _figure(3.6 * len(shown), 3.2)
  for place, name in enumerate(shown, start=1):
    axes = figure.add_subplot(1, len(shown), place)
    for (stage, lines), (colour, _) in zip(watched.items(), itertools.cycle(_STYLES), strict=False):
      points = [(line['step'] / lines[-1]['step'], line[name]) for line in lines if name in line]
      if points:
        axes.plot(*zip(*points, strict=True), color=colour, label=stage, linewidth=1.2)
    axes.set_title(names[name], fontsize=9)
    axes.set_xlabel('share of the updates', fontsize=8)
    axes.grid(color='#e5e7eb')
    axes.spines[['top', 'right']].set_visible(False)
    axes.legend(frameon=False, fontsize=7)
  return figure


def _figure(width: float, height: float) -> 'Figure':
  """Returns an empty figure, size in inches; imports matplotlib late because that takes a third of the startup time."""
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), layout='constrained')


def _axes() -> 'tuple[Figure, Axes]':
  figure = _figure(6.4, 4.4)
  axes = figure.add_subplot()
  axes.set_yscale('log')
  axes.grid(color='#e5e7eb')
  axes.spines[['top', 'right']].set_visible(False)
  return figure, axes


def _floor(axes: 'Axes', results: dict[str, Any]) -> None:
  floor = results['floor']
  axes.axhline(floor['value'], color='#6b7280', linestyle='--', linewidth=1.2, label='Real against real')
  axes.set_ylabel(f'{results["metric"]}, up to {floor["num_samples"]} samples')


def samples_figure(grid_rows: dict[str, np.ndarray]) -> 'Figure':
  """Shows one row of images per stage; the images of a column start from the same noise."""
  columns = max((len(images) for images in grid_rows.values()), default=1)
  height = max(len(grid_rows), 1)
  figure = _figure(0.55 * columns + 1.6, 0.55 * height + 0.1)
  for place, (caption, images) in enumerate(grid_rows.items(), start=1):
    axes: Axes = figure.add_subplot(height, 1, place)
    axes.imshow(pictures.to_pil(pictures.grid(pictures.enlarge(images, 64), columns, 4)), cmap='gray')
    axes.set_ylabel(caption, rotation=0, ha='right', va='center', fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
  return figure


def _png(figure: 'Figure') -> bytes:
  file = io.BytesIO()
  figure.savefig(file, format='png', dpi=160, bbox_inches='tight')
  return file.getvalue()


def _base64(png: bytes) -> str:
  return base64.b64encode(png).decode()
