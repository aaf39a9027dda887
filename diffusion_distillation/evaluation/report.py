"""The report: a figure, a grid of samples, and one self-contained page that shows both."""

import base64
import io
import pathlib
from typing import Any

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffusion_distillation.configuration import Config, flatten
from diffusion_distillation.evaluation import pictures

_CAPTIONS = {
  'ddim': 'DDIM',
  'ancestral': 'ancestral',
  'euler': 'Euler',
  'heun': 'Heun',
  'rk4': 'RK4',
  'dpm_solver_2m': 'DPM-Solver++(2M)',
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
]


def write(
  config: Config, results: dict[str, Any], grid_rows: dict[str, np.ndarray], directory: pathlib.Path
) -> None:
  """Writes `frechet.png`, `samples.png` and `index.html`.

  Args:
    config: of the run, to be shown.
    results: what `results.json` holds.
    grid_rows: captions and (n, H, W, C) uint8 images, all rows from the same noise.
    directory: made if need be.
  """
  directory.mkdir(exist_ok=True)
  figures = {'frechet': _png(distance_figure(results)), 'samples': _png(samples_figure(grid_rows))}
  for name, png in figures.items():
    (directory / f'{name}.png').write_bytes(png)
  environment = jinja2.Environment(
    loader=jinja2.PackageLoader('diffusion_distillation.evaluation', '.'), autoescape=True
  )
  html = environment.get_template('report.html').render(
    results=results,
    table=comparison(results['rows']),
    config=list(flatten(config)),
    curves=list(curves(results['rows'])),
    base_nfe=max(curves(results['rows']).get('Base, DDIM', {0: 0})),
    figures={name: base64.b64encode(png).decode() for name, png in figures.items()},
  )
  (directory / 'index.html').write_text(html)


def curves(rows: list[dict[str, Any]]) -> dict[str, dict[int, float]]:
  """Values by network calls: what was distilled, then the first stage under each sampler."""
  base = rows[0]['stage']
  found: dict[str, dict[int, float]] = {'Distilled': {}}
  for row in rows:
    if row['weights'] != 'ema':
      continue
    caption = f'Base, {_CAPTIONS[row["sampler"]]}' if row['stage'] == base else 'Distilled'
    found.setdefault(caption, {})[row['nfe']] = row['value']
  return found


def comparison(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """A line for each number of network calls, most first: the value of each curve or None.

  `ratio` is distilled to the base under DDIM at the most calls that it was measured with.
  """
  columns = curves(rows)
  calls = sorted({nfe for curve in columns.values() for nfe in curve}, reverse=True)
  of_base = columns.get('Base, DDIM', {})
  base = of_base[max(of_base)] if of_base else None
  lines = []
  for nfe in calls:
    distilled = columns['Distilled'].get(nfe)
    ratio = distilled / base if distilled is not None and base else None
    values = [curve.get(nfe) for curve in columns.values()]
    lines.append({'nfe': nfe, 'values': values, 'ratio': ratio})
  return lines


def distance_figure(results: dict[str, Any]) -> Figure:
  """Frechet distance by network calls, log-log (as Salimans & Ho 2022, Figure 4)."""
  figure = Figure(figsize=(6.4, 4.4), layout='constrained')
  axes = figure.add_subplot()
  ticks: set[int] = set()
  columns = curves(results['rows'])
  for (caption, curve), (colour, marker) in zip(columns.items(), _STYLES, strict=False):
    calls = sorted(curve)
    ticks.update(calls)
    values = [curve[nfe] for nfe in calls]
    axes.plot(calls, values, marker=marker, color=colour, label=caption, linewidth=1.8)
  floor = results['floor']['value']
  axes.axhline(floor, color='#6b7280', linestyle='--', linewidth=1.2, label='Real against real')
  axes.set_xscale('log', base=2)
  axes.set_yscale('log')
  axes.set_xticks(sorted(ticks), [str(nfe) for nfe in sorted(ticks)])
  axes.minorticks_off()
  axes.set_xlabel('network calls an image')
  axes.set_ylabel(f'{results["metric"]}, {results["floor"]["num_samples"]} samples')
  axes.grid(color='#e5e7eb')
  axes.spines[['top', 'right']].set_visible(False)
  axes.legend(frameon=False)
  return figure


def samples_figure(grid_rows: dict[str, np.ndarray]) -> Figure:
  """One row of images a stage; a column starts from one noise."""
  columns = max((len(images) for images in grid_rows.values()), default=1)
  height = max(len(grid_rows), 1)
  figure = Figure(figsize=(0.55 * columns + 1.6, 0.55 * height + 0.1), layout='constrained')
  for place, (caption, images) in enumerate(grid_rows.items(), start=1):
    axes: Axes = figure.add_subplot(height, 1, place)
    axes.imshow(pictures.to_pil(pictures.grid(pictures.enlarge(images, 64), columns, 4)), cmap='gray')
    axes.set_ylabel(caption, rotation=0, ha='right', va='center', fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
  return figure


def _png(figure: Figure) -> bytes:
  file = io.BytesIO()
  figure.savefig(file, format='png', dpi=160, bbox_inches='tight')
  return file.getvalue()
