"""Tables and figures of the measurements of `benchmarks/ablation.py`, and the settings that they contain."""

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from matplotlib.figure import Figure

OUTPUTS = ('both', 'x', 'eps', 'v')
WEIGHTINGS = ('snr', 'snr_trunc', 'snr_plus_one')
NAMES = {'both': '(x, ε)', 'eps': 'ε', 'snr': 'SNR', 'snr_trunc': 'truncated', 'snr_plus_one': 'SNR+1'}
INTEGRATORS = (
  # caption, sampler, gamma
  ('Stochastic, small', 'ancestral', 0.0),
  ('Stochastic, large', 'ancestral', 1.0),
  ('Euler', 'euler', 0.0),
  ('DDIM', 'ddim', 0.0),
  ('Heun', 'heun', 0.0),
  ('RK4', 'rk4', 0.0),
  ('DPM-Solver++(2M)', 'dpm_solver_2m', 0.0),
)
CALLS = (8, 16, 32, 64)
UPDATES = (25, 50, 100, 200)  # updates per round; twice as many for the rounds to 2 steps and to 1


def spread(values: Iterable[float | None]) -> str:
  """'mean ± standard deviation' over seeds; a value of None stands for a run that diverged."""
  values = list(values)
  if not values:
    return 'not measured'
  known = [value for value in values if value is not None]
  lost = len(values) - len(known)
  text = f'{statistics.mean(known):.3g}' if known else ''
  if len(known) > 1:
    text += f' ± {statistics.stdev(known):.2g}'
  if lost:
    text += f' ({lost} of {len(values)} diverged)'
  return text.strip()


def select(rows: list[dict[str, Any]], part: str, **key: Any) -> list[float | None]:
  """Values of the rows of a part with these fields, one per seed."""
  wanted = {'part': part, **key}
  return [row['value'] for row in rows if all(row.get(k) == v for k, v in wanted.items())]


def markdown(header: list[str], body: list[list[str]]) -> str:
  """A markdown table."""
  lines = [header, ['---'] * len(header), *body]
  return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def tables(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
  """Yields (part, table) for every part."""
  body = []
  for output in OUTPUTS:
    for weighting in WEIGHTINGS:
      cells = [
        spread(select(rows, 'outputs', output=output, weighting=weighting, sampler=sampler))
        for sampler in ('ancestral', 'ddim')
      ]
      body.append([NAMES.get(output, output), NAMES[weighting], *cells])
  yield 'outputs', markdown(['output', 'weighting', 'stochastic', 'DDIM'], body)

  body = [
    [caption, *(spread(select(rows, 'integrators', caption=caption, nfe=nfe)) for nfe in CALLS)]
    for caption, *_ in INTEGRATORS
  ]
  yield 'integrators', markdown(['integrator', *(f'NFE {nfe}' for nfe in CALLS)], body)

  counts = (32, 16, 8, 4, 2, 1)
  body = [
    [shown, *(spread(select(rows, part, caption=caption, num_steps=n)) for n in counts)]
    for part, caption, shown in _curves('updates')
  ]
  yield 'updates', markdown(['updates per round', *(f'{n} step{"s" * (n > 1)}' for n in counts)], body)

  counts = (16, 4, 1)
  body = [
    [shown, *(spread(select(rows, part, caption=caption, num_steps=n)) for n in counts)]
    for part, caption, shown in _curves('factor')
  ]
  yield (
    'factor',
    markdown(['each round keeps', *(f'{n} step{"s" * (n > 1)}' for n in counts)], body),
  )


def _curves(part: str) -> list[tuple[str, str, str]]:
  """Yields (fields of the row, caption, values) for the lines of a table."""
  if part == 'factor':
    return [('updates', f'{UPDATES[-1]} updates', 'half'), ('factor', 'quarter', 'quarter')]
  captions = ['base', *(f'{count} updates' for count in UPDATES)]
  return [('updates', caption, caption) for caption in captions]


def figures(rows: list[dict[str, Any]]) -> Iterator[tuple[str, Figure]]:
  """Yields (part, figure) for every part: means over seeds, with bars from the smallest to the largest value."""
  figure, axes = _figure('weighting')
  for k, output in enumerate(OUTPUTS):
    for sampler, marker in (('ancestral', '^'), ('ddim', 'o')):
      for j, weighting in enumerate(WEIGHTINGS):
        values = select(rows, 'outputs', output=output, weighting=weighting, sampler=sampler)
        label = f'{NAMES.get(output, output)}, {"stochastic" if marker == "^" else "DDIM"}'
        x = j + 0.18 * (k - 1.5) + (0.04 if marker == 'o' else -0.04)
        _bars(axes, [x], [values], f'C{k}', marker, label if j == 0 else None, line=False)
  axes.set_xticks(range(len(WEIGHTINGS)), [NAMES[w] for w in WEIGHTINGS])
  axes.legend(frameon=False, ncols=2, fontsize=8)
  yield 'outputs', figure

  figure, axes = _figure('network evaluations per image')
  for k, (caption, *_) in enumerate(INTEGRATORS):
    columns = [select(rows, 'integrators', caption=caption, nfe=nfe) for nfe in CALLS]
    _bars(axes, list(CALLS), columns, f'C{k}', 'o', caption)
  _log2(axes, CALLS)
  yield 'integrators', figure

  for part, counts in (('updates', (1, 2, 4, 8, 16, 32)), ('factor', (1, 4, 16))):
    figure, axes = _figure('network evaluations per image')
    for k, (source, caption, shown) in enumerate(_curves(part)):
      columns = [select(rows, source, caption=caption, num_steps=n) for n in counts]
      _bars(axes, list(counts), columns, f'C{k}', 'o', shown)
    _log2(axes, counts)
    yield part, figure


def _figure(xlabel: str) -> tuple[Figure, Any]:
  figure = Figure(figsize=(6.4, 4.4), layout='constrained')
  axes = figure.add_subplot(yscale='log', xlabel=xlabel, ylabel='FD-digits, 2000 samples')
  axes.grid(color='#e5e7eb')
  axes.spines[['top', 'right']].set_visible(False)
  return figure, axes


def _log2(axes: Any, ticks: Iterable[int]) -> None:
  axes.set_xscale('log', base=2)
  axes.set_xticks(list(ticks), [str(tick) for tick in ticks])
  axes.legend(frameon=False, fontsize=8)


def _bars(
  axes: Any,
  xs: list[float],
  columns: list[list[float | None]],
  colour: str,
  marker: str,
  label: str | None,
  line: bool = True,
) -> None:
  """Plots means, with bars from the smallest to the largest value; columns without values are left out."""
  known = [(x, [v for v in values if v is not None]) for x, values in zip(xs, columns, strict=True)]
  known = [(x, values) for x, values in known if values]
  if not known:
    return
  means = [statistics.mean(values) for _, values in known]
  below = [mean - min(values) for mean, (_, values) in zip(means, known, strict=True)]
  above = [max(values) - mean for mean, (_, values) in zip(means, known, strict=True)]
  style = '-' if line else 'none'
  axes.errorbar(
    [x for x, _ in known],
    means,
    yerr=[below, above],
    color=colour,
    marker=marker,
    markersize=4,
    linestyle=style,
    label=label,
    capsize=2,
  )
