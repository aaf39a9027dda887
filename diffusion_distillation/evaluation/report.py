"""The report: a figure, a grid of samples, and one self-contained page that shows both."""

import base64
import io
import pathlib
from typing import Any

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffusion_distillation.evaluation import pictures
from diffusion_distillation.stages import Config, flatten

_CURVES = (
  # caption, distilled or not, sampler, colour, marker
  ('Distilled', True, 'ddim', '#c2410c', 'o'),
  ('Base, DDIM', False, 'ddim', '#1d4ed8', 's'),
  ('Base, ancestral', False, 'ancestral', '#15803d', '^'),
)


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
    curves=[caption for caption, *_ in _CURVES],
    figures={name: base64.b64encode(png).decode() for name, png in figures.items()},
  )
  (directory / 'index.html').write_text(html)


def _curve(rows: list[dict[str, Any]], distilled: bool, sampler: str) -> dict[int, float]:
  return {
    row['nfe']: row['value']
    for row in rows
    if row['sampler'] == sampler and distilled == (row['method'] != 'denoising')
  }


def comparison(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """A line for each number of network calls, most first: the value of each curve or None."""
  curves = [_curve(rows, distilled, sampler) for _, distilled, sampler, *_ in _CURVES]
  calls = sorted({nfe for curve in curves for nfe in curve}, reverse=True)
  base = curves[1].get(calls[0]) if calls else None
  lines = []
  for nfe in calls:
    values = [curve.get(nfe) for curve in curves]
    ratio = values[0] / base if values[0] is not None and base else None
    lines.append({'nfe': nfe, 'values': values, 'ratio': ratio})
  return lines


def distance_figure(results: dict[str, Any]) -> Figure:
  """Frechet distance by network calls, log-log (as Salimans & Ho 2022, Figure 4)."""
  figure = Figure(figsize=(6.4, 4.4), layout='constrained')
  axes = figure.add_subplot()
  ticks: set[int] = set()
  for caption, distilled, sampler, colour, marker in _CURVES:
    curve = _curve(results['rows'], distilled, sampler)
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
