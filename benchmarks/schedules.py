"""The cost of the rounds relative to the base model, on digits: python benchmarks/schedules.py --workdir=runs/schedules

Every schedule consists of a base model and its rounds, and is run with several seeds of parameters, batches and noise.
Models and measurements are kept, as in `benchmarks/ablation.py`, so that the same command resumes an interrupted run.
schedules.md and schedules.png are written after each seed. Compare seconds only within one run.
"""

import dataclasses
import functools
import pathlib
import sys
from collections.abc import Iterator
from statistics import mean, stdev
from typing import Any

import ml_collections
from matplotlib.figure import Figure

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks.ablation import Bench, main
from benchmarks.ablation_report import markdown, spread
from configs import digits
from diffusion_distillation.errors import NumericalError
from diffusion_distillation.run import forecast
from diffusion_distillation.stages.provenance import Model
from diffusion_distillation.system.files import write_json

STEPS = (32, 8, 4, 2, 1)


@dataclasses.dataclass(frozen=True)
class Schedule:
  """The differences from configs/digits.py; None for no difference.

  Attributes:
    base: number of updates of the base model.
    ramp: `train.ema_ramp`.
    factor: `distill.factor`.
    updates: number of updates of each round.
    rates: peak learning rate of each round.
    end: number of steps of the last student.
    gate: `gate.factor`; the rounds then begin with `updates` and are trained for as long as the gate asks.
  """

  base: int | None = None
  ramp: float = 0.0
  factor: tuple[int, ...] | None = None
  updates: tuple[int, ...] | None = None
  rates: tuple[float, ...] | None = None
  end: int = 1
  gate: float = 0.0

  def config(self, seed: int, scale: float = 1.0) -> ml_collections.ConfigDict:
    """Returns the config of a run with this schedule; all numbers of updates are multiplied by `scale`."""
    config = digits.get_config()
    config.seed, config.evaluation.seed, config.evaluation.tolerance = seed, seed + 1, 0.0
    config.checkpoint.every = 10_000
    base = self.base or config.train.num_updates
    config.train.num_updates = max(1, round(scale * base))
    config.train.ema_ramp = self.ramp
    config.distill.end_steps = self.end
    config.distill.factor = self.factor or config.distill.factor
    config.distill.learning_rate = self.rates or config.distill.learning_rate
    config.gate.factor, config.gate.limit, config.gate.stop = self.gate, 16.0, False
    updates = self.updates or config.distill.num_updates
    config.distill.num_updates = tuple(max(1, round(scale * count)) for count in updates)
    return config


SCHEDULES = {
  'halves': Schedule(factor=(2,), updates=(200, 200, 750), rates=(1e-3,), end=4),
  'demo': Schedule(),
  'gated': Schedule(updates=(150,), gate=1.25),
  'short': Schedule(base=1400, ramp=0.05, updates=(150, 300, 300, 400), rates=(5e-4,)),
}


def run(name: str, bench: Bench, seed: int) -> None:
  """Trains and measures the missing parts of a schedule; adds a row for each number of steps in `STEPS`."""
  schedule = SCHEDULES[name]
  config = schedule.config(seed, bench.scale)
  if all(bench.has(name, seed, num_steps=n) for n in STEPS if n >= schedule.end):
    return
  of_base = Schedule(schedule.base, schedule.ramp).config(seed, bench.scale)
  try:
    base = bench.fit(f'base_{config.train.num_updates}', of_base)[0]
    models = [base, *bench.fit(name, config, base)]
  except NumericalError as error:
    print(f'{name}, seed {seed}: {error}', file=sys.stderr, flush=True)
    return
  for k, model in enumerate(models):
    if model.stage.num_steps in STEPS and not bench.has(name, seed, num_steps=model.stage.num_steps):
      # Schedules share base models.
      same = [row['value'] for row in bench.rows if row.get('digest') == model.digest]
      row = {'part': name, 'seed': seed, 'num_steps': model.stage.num_steps, 'digest': model.digest}
      value = same[0] if same else bench.value(config, model)
      bench.rows.append(row | costs(models[: k + 1]) | {'value': value})
      write_json(bench.path, {'scale': bench.scale, 'rows': bench.rows})
      print(' '.join(f'{key}={x}' for key, x in bench.rows[-1].items()), file=sys.stderr, flush=True)


def costs(models: list[Model]) -> dict[str, float]:
  """Updates, network evaluations per image, and seconds: of the base model, and of all later rounds together."""
  base, *rounds = models
  return {
    'base_updates': base.stage.num_updates,
    'base_calls': forecast.network_calls(base.stage),
    'base_seconds': base.seconds,
    'updates': sum(model.stage.num_updates for model in rounds),
    'calls': sum(forecast.network_calls(model.stage) for model in rounds),
    'seconds': sum(model.seconds for model in rounds),
  }


def _of(rows: list[dict[str, Any]], name: str, num_steps: int) -> list[dict[str, Any]]:
  """The rows of a schedule and a number of steps, one per seed."""
  return [row for row in rows if (row['part'], row['num_steps']) == (name, num_steps)]


def tables(rows: list[dict[str, Any]]) -> Iterator[str]:
  """Tables of quality by number of steps, and of the cost of the rounds to 4 steps and to 1, relative to the base model."""
  names = [name for name in SCHEDULES if any(row['part'] == name for row in rows)]
  body = [[name, *(spread(row['value'] for row in _of(rows, name, n)) for n in STEPS)] for name in names]
  yield markdown(['schedule', *(f'{n} step{"s" * (n > 1)}' for n in STEPS)], body)
  for num_steps in (4, 1):
    body = []
    for name in names:
      found = _of(rows, name, num_steps)
      if not found:
        continue
      updates = [f'{mean(row[key] for row in found):,.0f}' for key in ('base_updates', 'updates')]
      shares = [  # these depend on the seed only where there is a gate
        f'{mean(row[key] / row[f"base_{key}"] for row in found):.2f}' for key in ('updates', 'calls')
      ]
      seconds = spread(row['seconds'] / row['base_seconds'] for row in found)
      minutes = spread((row['seconds'] + row['base_seconds']) / 60 for row in found)
      body.append([name, *updates, *shares, seconds, minutes])
    header = ['base updates', 'round updates', 'rounds / base: updates', 'network evaluations']
    yield f'Rounds to {num_steps} step{"s" * (num_steps > 1)}:\n\n' + markdown(
      ['schedule', *header, 'seconds', 'minutes in total'], body
    )


def figure(rows: list[dict[str, Any]]) -> Figure:
  """Figure of quality against the evaluations and the minutes of training: one line per schedule, one point per number of steps.

  Points are means over seeds, and bars standard deviations.
  """
  drawing = Figure(figsize=(10, 4.4), layout='constrained')
  left, right = drawing.subplots(1, 2, sharey=True)
  for axes, unit, key, label in (
    (left, 1e3, 'calls', 'network evaluations in training, each of one image, in thousands'),
    (right, 60, 'seconds', 'minutes of training'),
  ):
    for k, name in enumerate(SCHEDULES):
      columns = [_of(rows, name, n) for n in STEPS if _of(rows, name, n)]
      if not columns:
        continue
      x = [[(row[key] + row[f'base_{key}']) / unit for row in column] for column in columns]
      y = [[row['value'] for row in column] for column in columns]
      (x, x_bars), (y, y_bars) = _means_and_deviations(x), _means_and_deviations(y)
      axes.errorbar(x, y, y_bars, x_bars, f'C{k}o-', markersize=4, capsize=2, alpha=0.8, label=name)
      for column, at in zip(columns, zip(x, y, strict=True), strict=True):
        text = str(column[0]['num_steps'])
        axes.annotate(text, at, xytext=(3, 4), textcoords='offset points', fontsize=7)
    axes.set(xlabel=label, yscale='log')
    axes.yaxis.set_major_formatter('{x:g}')
    axes.yaxis.set_minor_formatter('{x:g}')
    axes.grid(color='#e5e7eb', which='both')
    axes.spines[['top', 'right']].set_visible(False)
  left.set_ylabel('FD-digits')
  left.legend(frameon=False, fontsize=8)
  return drawing


def _means_and_deviations(columns: list[list[float]]) -> tuple[list[float], list[float]]:
  """The mean and the standard deviation of each column; 0 if it has one value."""
  deviations = [stdev(column) if len(column) > 1 else 0.0 for column in columns]
  return [mean(column) for column in columns], deviations


def write(bench: Bench) -> str:
  """Writes schedules.md and schedules.png from the rows so far; returns the tables."""
  text = '\n\n'.join(tables(bench.rows))
  (bench.workdir / 'schedules.md').write_text(text + '\n')
  figure(bench.rows).savefig(bench.workdir / 'schedules.png', dpi=130)
  return text


if __name__ == '__main__':
  main(__doc__.splitlines()[0], {name: functools.partial(run, name) for name in SCHEDULES}, write)
