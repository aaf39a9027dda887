"""The figures of the report, each drawn for a light and for a dark page, and small enough for a telephone."""

import base64
import io
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diffusion_distillation.evaluation import curves as curves_module
from diffusion_distillation.evaluation import pictures
from diffusion_distillation.evaluation.curves import Point
from diffusion_distillation.evaluation.themes import DARK, LIGHT, Theme

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.axis import Axis
  from matplotlib.figure import Figure

_WIDTH = 4.8  # inches; at 370 pixels, the width of a telephone, 9 points are then 10 pixels
_DPI = 200
_MARKERS = 'os^DvPX*'

Lines = Mapping[str, Sequence[Point]]


class Picture(NamedTuple):
  """A figure as PNG in base64, for a light and for a dark page."""

  light: str
  dark: str

  @property
  def png(self) -> bytes:
    """The light one, as the bytes of a file."""
    return base64.b64decode(self.light)


def render(draw: Callable[[Theme], 'Figure']) -> Picture:
  """Draws a figure in both themes."""
  return Picture(*(encode(to_png(draw(theme), theme)) for theme in (LIGHT, DARK)))


def encode(png: bytes) -> str:
  """Returns a PNG as text for a data URL."""
  return base64.b64encode(png).decode()


def to_png(figure: 'Figure', theme: Theme) -> bytes:
  """Returns a figure as PNG on the theme's background."""
  file = io.BytesIO()
  figure.savefig(file, format='png', dpi=_DPI, facecolor=theme.paper)
  return file.getvalue()


def _figure(theme: Theme, height: float, width: float = _WIDTH) -> 'Figure':
  """Returns an empty figure, size in inches; imports matplotlib late because that takes a third of the startup time."""
  from matplotlib.figure import Figure

  return Figure(figsize=(width, height), layout='constrained', facecolor=theme.paper)


def _dress(axes: 'Axes', theme: Theme) -> None:
  """Gives axes the colours of a theme."""
  axes.set_facecolor(theme.paper)
  axes.grid(color=theme.grid)
  axes.set_axisbelow(True)
  axes.spines[['top', 'right']].set_visible(False)
  axes.spines[['left', 'bottom']].set_color(theme.faint)
  axes.tick_params(which='both', colors=theme.ink, labelsize=8.5)
  for label in (axes.xaxis.label, axes.yaxis.label, axes.title):
    label.set_color(theme.ink)
    label.set_fontsize(9)


def _legend(figure: 'Figure', axes: 'Axes', theme: Theme) -> None:
  """Puts the legend below the axes, where it covers no curve, in one or two columns."""
  handles, labels = axes.get_legend_handles_labels()
  figure.legend(
    handles,
    labels,
    loc='outside lower center',
    ncols=_columns(labels),
    frameon=False,
    fontsize=8.5,
    labelcolor=theme.ink,
  )


def _draw_curves(axes: 'Axes', lines: Lines, theme: Theme, **style: Any) -> None:
  """Draws a curve with markers, and error bars where points have them, for each caption."""
  styles = itertools.cycle(zip(theme.curves, _MARKERS, strict=True))
  for (caption, points), (colour, marker) in zip(lines.items(), styles, strict=False):
    x, y = [p.x for p in points], [p.value for p in points]
    axes.plot(x, y, marker=marker, color=colour, label=caption, linewidth=1.6, markersize=5, **style)
    barred = [p for p in points if p.error]
    if barred:
      axes.errorbar(
        [p.x for p in barred],
        [p.value for p in barred],
        yerr=[p.error or 0.0 for p in barred],
        fmt='none',
        ecolor=colour,
        capsize=2.5,
        linewidth=1.2,
      )


def _value_axes(results: Mapping[str, Any], theme: Theme, height: float) -> 'tuple[Figure, Axes]':
  """Returns axes for the rows' `value`, logarithmic for a distance."""
  figure = _figure(theme, height)
  axes = figure.add_subplot()
  if curves_module.value_name(results['metric']) == 'frechet':
    axes.set_yscale('log')
  axes.margins(x=0.08, y=0.12)
  axes.set_ylabel(results['metric'])
  _dress(axes, theme)
  return figure, axes


def _finish(figure: 'Figure', axes: 'Axes', results: Mapping[str, Any], theme: Theme) -> None:
  """Draws the floor, if there is one, and the legend, and writes the numbers of a logarithmic y axis plainly."""
  if 'floor' in results:
    floor, label = results['floor']['value'], 'Real against real'
    axes.axhline(floor, color=theme.faint, linestyle='--', linewidth=1.2, label=label)
  if axes.get_yscale() == 'log':
    _plain_numbers(axes.yaxis)
  _legend(figure, axes, theme)


def _plain_numbers(axis: 'Axis') -> None:
  """Writes the numbers of a logarithmic axis without powers, and so many that a short axis has some."""
  from matplotlib import ticker

  low, high = axis.get_view_interval()
  ratio = high / max(low, 1e-12)
  steps = (1, 2, 5) if ratio < 200 else (1,)
  few = ticker.MaxNLocator(5, steps=[1, 2, 2.5, 5, 10])  # of a range that may have a single power of ten
  axis.set_major_locator(few if ratio < 6 else ticker.LogLocator(subs=steps))
  axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f'{value:g}'))
  axis.set_minor_formatter(ticker.NullFormatter())


def _height(captions: Iterable[str]) -> float:
  """Returns the height of a figure with a legend of these captions, in inches."""
  names = list(captions)
  return 3.2 + 0.18 * (-(-(len(names) + 1) // _columns(names)))


def _columns(captions: Sequence[str]) -> int:
  return 2 if max(map(len, captions), default=0) < 28 else 1


def by_calls(lines: Lines, results: Mapping[str, Any], theme: Theme = LIGHT) -> 'Figure':
  """Plots the rows' `value` over network evaluations, log-log (as Salimans & Ho 2022, Figure 4)."""
  figure, axes = _value_axes(results, theme, _height(lines))
  _draw_curves(axes, lines, theme)
  _finish_by_calls(figure, axes, lines, results, theme)
  return figure


def side_by_side(
  runs: Sequence[tuple[str, Lines]], results: Mapping[str, Any], theme: Theme = LIGHT
) -> 'Figure':
  """Plots the curves of several runs, given with their names, by method (colour) and run (kind of line)."""
  captions = dict.fromkeys(caption for _, lines in runs for caption in lines)
  colours = dict(zip(captions, itertools.cycle(theme.curves), strict=False))
  named = {f'{caption}, {name}': points for name, lines in runs for caption, points in lines.items()}
  figure, axes = _value_axes(results, theme, _height(named))
  styles = itertools.cycle(zip(('-', '--', ':', '-.'), 'os^D', strict=True))
  for (name, lines), (line, marker) in zip(runs, styles, strict=False):
    for caption, points in lines.items():
      axes.errorbar(
        [p.x for p in points],
        [p.value for p in points],
        yerr=[p.error or 0.0 for p in points],
        color=colours[caption],
        label=f'{caption}, {name}',
        linestyle=line,
        marker=marker,
        markersize=5,
        markerfacecolor=colours[caption] if line == '-' else theme.paper,
        capsize=2.5 if any(p.error for p in points) else 0,
        linewidth=1.6,
      )
  _finish_by_calls(figure, axes, named, results, theme)
  return figure


def _finish_by_calls(
  figure: 'Figure', axes: 'Axes', lines: Lines, results: Mapping[str, Any], theme: Theme
) -> None:
  """Makes the x axis one of network evaluations, and finishes the figure."""
  calls = _spread(sorted({int(p.x) for points in lines.values() for p in points}))
  if len(calls) == 1:  # limits of their own, because matplotlib warns of an axis without a width
    axes.set_xlim(calls[0] / 2, calls[0] * 2)
  axes.set_xscale('log', base=2)
  axes.set_xticks(calls, list(map(str, calls)))
  axes.minorticks_off()
  axes.set_xlabel('network evaluations per image')
  _finish(figure, axes, results, theme)


def _spread(calls: list[int]) -> list[int]:
  """Returns the numbers that can be written along a logarithmic axis without touching each other."""
  kept: list[int] = []
  for n in calls:
    if not kept or n >= 1.4 * kept[-1]:
      kept.append(n)
  return kept


def by_seconds(lines: Lines, results: Mapping[str, Any], theme: Theme = LIGHT) -> 'Figure':
  """Plots the rows' `value` over the seconds that drawing an image takes; points are labelled with network evaluations."""
  figure, axes = _value_axes(results, theme, _height(lines))
  milli = {k: [p._replace(x=1000 * p.x) for p in points] for k, points in lines.items()}
  _draw_curves(axes, milli, theme)
  axes.set_xscale('log')
  axes.set_xlabel('milliseconds per image; labels: network evaluations')
  _finish(figure, axes, results, theme)
  _plain_numbers(axes.xaxis)
  _label_calls(axes, milli, theme)
  return figure


def by_cost(lines: Lines, results: Mapping[str, Any], theme: Theme = LIGHT) -> 'Figure':
  """Plots the rows' `value` over the training time from the base to each student, labelled with network evaluations."""
  figure, axes = _value_axes(results, theme, _height(lines))
  unit, seconds = curves_module.time_unit(max((p.x for ps in lines.values() for p in ps), default=0.0))
  scaled = {caption: [p._replace(x=p.x / seconds) for p in points] for caption, points in lines.items()}
  _draw_curves(axes, scaled, theme)
  axes.set_xlim(left=0.0)
  axes.set_xlabel(f'{unit} of training after the base; labels: network evaluations')
  _finish(figure, axes, results, theme)
  _label_calls(axes, scaled, theme)
  return figure


def _label_calls(axes: 'Axes', lines: Lines, theme: Theme) -> None:
  """Labels points with their network evaluations, except where two labels would cover each other."""
  placed: list[np.ndarray] = []
  for p in (p for points in lines.values() for p in points):
    place = axes.transData.transform((p.x, p.value))
    if all(abs(place - other)[0] > 14 or abs(place - other)[1] > 11 for other in placed):
      placed.append(place)
      axes.annotate(
        str(p.calls),
        (p.x, p.value),
        textcoords='offset points',
        xytext=(4, 4),
        fontsize=7.5,
        color=theme.faint,
      )


def by_weight(
  panels: Mapping[str, Lines], logarithmic: frozenset[str], theme: Theme = LIGHT
) -> 'Figure':
  """Plots each metric in a panel of its own over the weight of guidance.

  Args:
    panels: for each metric by name, the curve of each model.
    logarithmic: the metrics whose axis is logarithmic.
    theme: the colours.
  """
  rows, names = -(-len(panels) // 2), {caption for lines in panels.values() for caption in lines}
  figure = _figure(theme, 2.0 * rows + 0.2 * len(names) / 2 + 0.4)
  for place, (name, lines) in enumerate(panels.items(), start=1):
    axes = figure.add_subplot(rows, min(2, len(panels)), place)
    _draw_curves(axes, lines, theme)
    if name in logarithmic:
      axes.set_yscale('log')
      _plain_numbers(axes.yaxis)
    axes.set_title(name)
    axes.set_xlabel('guidance weight W')
    _dress(axes, theme)
  _legend(figure, axes, theme)
  return figure


def health(title: str, lines: Lines, theme: Theme = LIGHT) -> 'Figure':
  """Plots one measure of students' health over the share of their updates."""
  figure = _figure(theme, 2.4 + 0.18 * -(-len(lines) // 2), 3.8)
  axes = figure.add_subplot()
  for (stage, points), colour in zip(lines.items(), itertools.cycle(theme.curves), strict=False):
    axes.plot([p.x for p in points], [p.value for p in points], color=colour, label=stage, linewidth=1.4)
  axes.set_title(title)
  axes.set_xlabel('share of the updates')
  _dress(axes, theme)
  _legend(figure, axes, theme)
  return figure


def distances(panels: Mapping[str, Mapping[str, np.ndarray]], theme: Theme = LIGHT) -> 'Figure':
  """Shows how far images are from the nearest training image, as histograms over one set of bins per panel.

  Args:
    panels: for each measure of distance by name, the distances (n,) of each set of images.
    theme: the colours.
  """
  figure = _figure(theme, 2.6)
  for place, (name, sets) in enumerate(panels.items(), start=1):
    axes = figure.add_subplot(1, len(panels), place)
    bins = np.linspace(0.0, 1.02 * max(float(d.max()) for d in sets.values()) or 1.0, 25)
    for (caption, found), colour in zip(sets.items(), (theme.curves[0], theme.curves[1]), strict=True):
      share = np.full(len(found), 100.0 / len(found))
      axes.hist(
        found, list(bins), weights=share, histtype='step', color=colour, label=caption, linewidth=1.5
      )
    axes.set_title(name)
    axes.set_xlabel('distance to the nearest')
    axes.set_ylabel('% of images' if place == 1 else '')
    _dress(axes, theme)
  _legend(figure, axes, theme)
  return figure


def samples(grid_rows: Mapping[str, np.ndarray]) -> 'Figure':
  """Shows one row of images per stage; the images of a column start from the same noise."""
  columns = max((len(images) for images in grid_rows.values()), default=1)
  height = max(len(grid_rows), 1)
  figure = _figure(LIGHT, 0.55 * height + 0.1, 0.55 * columns + 1.6)
  for place, (caption, images) in enumerate(grid_rows.items(), start=1):
    axes: Axes = figure.add_subplot(height, 1, place)
    axes.imshow(pictures.to_pil(pictures.grid(pictures.enlarge(images, 64), columns, 4)), cmap='gray')
    axes.set_ylabel(caption, rotation=0, ha='right', va='center', fontsize=8)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
  return figure
