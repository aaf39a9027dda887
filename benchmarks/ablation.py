"""The ablations of Salimans & Ho (2022) on digits: python benchmarks/ablation.py --workdir=runs/ablation

Four parts, each with several seeds (of parameters, batches and noise; the spread is over these):

  outputs      Table 1: what the network predicts x weighting of the loss x sampler
  integrators  appendix D: integrators of one undistilled model by network calls
  updates      Figure 6: updates a round, 64 steps halved to 1
  factor       Figure 7: a quarter of the steps each round, against half of them

Every model is a run of the package in a directory of its own, every measurement a row of rows.json: the same
command goes on where it was stopped. tables.md and a picture a part are written after each seed.
"""

import argparse
import dataclasses
import pathlib
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import ml_collections
from matplotlib.figure import Figure

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from configs import digits
from diffusion_distillation import datasets, interrupts, sharding, stages, train
from diffusion_distillation.checkpoints import read_json, write_json
from diffusion_distillation.errors import NumericalError, UserError
from diffusion_distillation.evaluation import features, measure
from diffusion_distillation.workdir import Model, lock_workdir

START = 64  # steps that rounds begin at
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
UPDATES = (25, 50, 100, 200)  # a round; twice as many for those to 2 and to 1
PARTS = ('outputs', 'integrators', 'updates', 'factor')


def make_config(seed: int, scale: float, **changes: Any) -> ml_collections.ConfigDict:
  """A network of a quarter of the demo's parameters, trained for `scale` times 1000 updates."""
  config = digits.get_config()
  config.seed = seed
  config.model.ch, config.model.emb_ch = 16, 64
  config.train.num_updates = round(1000 * scale)
  config.train.learning_rate, config.train.ema_decay = 2e-3, (0.995,)
  config.distill.start_steps = START
  config.distill.learning_rate = (1e-3,)
  config.checkpoint.every = 10_000
  config.log.every = 25
  config.evaluation.num_samples, config.evaluation.batch_size = 2000, 500
  config.evaluation.seed = seed + 1
  config.update_from_flattened_dict({key.replace('__', '.'): v for key, v in changes.items()})
  return config


@dataclasses.dataclass
class Bench:
  """What all parts share; rows are kept in `workdir`/rows.json as soon as they are measured."""

  workdir: pathlib.Path
  scale: float

  def __post_init__(self) -> None:
    jax.config.update('jax_compilation_cache_dir', str(self.workdir / 'compiled'))
    self.images = datasets.load('digits', 8, 'train')
    held_out = datasets.load('digits', 8, 'test')
    self.extractor = features.load_or_train(
      self.workdir / 'extractor.safetensors', self.images, held_out
    )
    self.reference = self.extractor.moments(self.images.images)
    self.step = sharding.compile_step(train.train_step)
    self.path = self.workdir / 'rows.json'
    stored = read_json(self.path) if self.path.exists() else {'scale': self.scale, 'rows': []}
    if stored['scale'] != self.scale:
      raise UserError(f'{self.path} is of --scale={stored["scale"]}; use that, or another --workdir')
    self.rows: list[dict[str, Any]] = stored['rows']

  def fit(self, name: str, config: ml_collections.ConfigDict, base: Model | None = None) -> list[Model]:
    """The base of a config, or the rounds that start from `base`; finished ones are only restored."""
    planned = stages.plan(config, (8, 8, 1), 10)
    workdir = self.workdir / f'seed_{config.seed}' / name
    workdir.mkdir(parents=True, exist_ok=True)
    if base is None:
      return [train.fit(self.step, planned[0], None, self.images, workdir, config)]
    models = [base]
    for stage in planned[1:]:
      models.append(train.fit(self.step, stage, models[-1], self.images, workdir, config))
    return models[1:]

  def has(self, part: str, seed: int, **key: Any) -> bool:
    """Whether the row is there."""
    wanted = {'part': part, 'seed': seed, **key}
    return any(all(row.get(k) == v for k, v in wanted.items()) for row in self.rows)

  def measure(
    self,
    part: str,
    config: ml_collections.ConfigDict,
    model: Callable[[], Model],
    sampler: str,
    num_steps: int,
    **key: Any,
  ) -> None:
    """Adds a row unless it is there; None where training diverged."""
    if self.has(part, config.seed, sampler=sampler, num_steps=num_steps, **key):
      return
    try:
      setting = measure.Setting(model(), sampler, num_steps)
      measured = measure.measure_setting(config, setting, self.extractor, self.reference)
      nfe, value = measured['nfe'], measured['value']
    except NumericalError:
      nfe, value = num_steps, None
    fields = {'sampler': sampler, 'num_steps': num_steps, **key, 'nfe': nfe, 'value': value}
    self.rows.append({'part': part, 'seed': config.seed, **fields})
    write_json(self.path, {'scale': self.scale, 'rows': self.rows})
    shown = ' '.join(f'{k}={v}' for k, v in fields.items() if k != 'value')
    print(f'{part} seed={config.seed} {shown}: {value}', file=sys.stderr, flush=True)

  def base(self, config: ml_collections.ConfigDict) -> Model:
    """The undistilled model that all parts but the first look at: v, truncated SNR."""
    return self.fit(f'{config.model.output}-{config.weighting}', config)[0]


def run_outputs(bench: Bench, seed: int) -> None:
  """Table 1, at 32 steps."""
  for output in OUTPUTS:
    for weighting in WEIGHTINGS:
      config = make_config(seed, bench.scale, model__output=output, weighting=weighting)
      for sampler in ('ancestral', 'ddim'):
        bench.measure(
          'outputs',
          config,
          lambda config=config: bench.base(config),
          sampler,
          32,
          output=output,
          weighting=weighting,
        )


def run_integrators(bench: Bench, seed: int) -> None:
  """Every integrator at as many network calls."""
  for caption, sampler, gamma in INTEGRATORS:
    config = make_config(seed, bench.scale, evaluation__gamma=gamma)
    per_step = measure.make(config, sampler).calls_per_step
    for calls in CALLS:
      bench.measure(
        'integrators',
        config,
        lambda config=config: bench.base(config),
        sampler,
        calls // per_step,
        caption=caption,
      )


def _rounds(bench: Bench, part: str, seed: int, caption: str, factor: int, updates: tuple) -> None:
  updates = tuple(max(1, round(bench.scale * count)) for count in updates)
  config = make_config(seed, bench.scale, distill__factor=(factor,), distill__num_updates=updates)
  counts = [steps for steps, _ in stages.rounds(START, 1, (factor,))]
  if all(bench.has(part, seed, num_steps=n, caption=caption) for n in counts):
    return
  base = bench.base(make_config(seed, bench.scale))
  for model in bench.fit(caption.replace(' ', '_'), config, base):
    bench.measure(
      part, config, lambda model=model: model, 'ddim', model.stage.num_steps, caption=caption
    )


def run_updates(bench: Bench, seed: int) -> None:
  """The base under DDIM, and students of rounds of several lengths."""
  config = make_config(seed, bench.scale)
  for num_steps in (1, 2, 4, 8, 16, 32, 64):
    bench.measure('updates', config, lambda: bench.base(config), 'ddim', num_steps, caption='base')
  for count in UPDATES:
    _rounds(bench, 'updates', seed, f'{count} updates', 2, (count, 2 * count, 2 * count))


def run_factor(bench: Bench, seed: int) -> None:
  """Rounds that quarter the number of steps; the halving ones are those of `updates`."""
  most = UPDATES[-1]
  _rounds(bench, 'factor', seed, 'quarter', 4, (most, 2 * most))


RUN = {
  'outputs': run_outputs,
  'integrators': run_integrators,
  'updates': run_updates,
  'factor': run_factor,
}


def spread(values: Iterable[float | None]) -> str:
  """'mean ± standard deviation' over seeds."""
  known = [value for value in values if value is not None]
  if not known:
    return 'diverges'
  deviation = statistics.stdev(known) if len(known) > 1 else 0.0
  return f'{statistics.mean(known):.3g} ± {deviation:.2g}'


def select(rows: list[dict[str, Any]], part: str, **key: Any) -> list[float | None]:
  """Values of the rows of a part that have these fields, one a seed."""
  wanted = {'part': part, **key}
  return [row['value'] for row in rows if all(row.get(k) == v for k, v in wanted.items())]


def markdown(header: list[str], body: list[list[str]]) -> str:
  """A table."""
  lines = [header, ['---'] * len(header), *body]
  return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def tables(rows: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
  """(part, table) for every part."""
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
  yield 'integrators', markdown(['integrator', *(f'{nfe} calls' for nfe in CALLS)], body)

  counts = (32, 16, 8, 4, 2, 1)
  body = [
    [caption, *(spread(select(rows, part, caption=caption, num_steps=n)) for n in counts)]
    for part, caption in _curves('updates')
  ]
  yield 'updates', markdown(['a round', *(f'{n} steps' for n in counts)], body)

  counts = (16, 4, 1)
  body = [
    [caption, *(spread(select(rows, part, caption=caption, num_steps=n)) for n in counts)]
    for part, caption in _curves('factor')
  ]
  yield 'factor', markdown(['steps left by a round', *(f'{n} steps' for n in counts)], body)


def _curves(part: str) -> list[tuple[str, str]]:
  """(part of the row, caption) of the lines to show."""
  if part == 'factor':
    return [('updates', f'{UPDATES[-1]} updates'), ('factor', 'quarter')]
  return [('updates', 'base'), *(('updates', f'{count} updates') for count in UPDATES)]


def figures(rows: list[dict[str, Any]]) -> Iterator[tuple[str, Figure]]:
  """(part, figure) for every part: mean over seeds, bars from the least to the greatest."""
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

  figure, axes = _figure('network calls an image')
  for k, (caption, *_) in enumerate(INTEGRATORS):
    columns = [select(rows, 'integrators', caption=caption, nfe=nfe) for nfe in CALLS]
    _bars(axes, list(CALLS), columns, f'C{k}', 'o', caption)
  _log2(axes, CALLS)
  yield 'integrators', figure

  for part, counts in (('updates', (1, 2, 4, 8, 16, 32)), ('factor', (1, 4, 16))):
    figure, axes = _figure('network calls an image')
    for k, (source, caption) in enumerate(_curves(part)):
      columns = [select(rows, source, caption=caption, num_steps=n) for n in counts]
      _bars(axes, list(counts), columns, f'C{k}', 'o', caption)
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
  """Means, with bars from the least to the greatest; columns without values are left out."""
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


def write(bench: Bench) -> None:
  """tables.md and the pictures, of the rows that there are."""
  text = '\n\n'.join(f'## {part}\n\n{table}' for part, table in tables(bench.rows))
  (bench.workdir / 'tables.md').write_text(text + '\n')
  for part, figure in figures(bench.rows):
    figure.savefig(bench.workdir / f'ablation_{part}.png', dpi=130)


def main() -> None:
  """Runs the parts, seed by seed."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument('--scale', type=float, default=1.0, help='times the updates of every stage')
  parser.add_argument('--parts', default=','.join(PARTS))
  options = parser.parse_args()
  parts = options.parts.split(',')
  unknown = [part for part in parts if part not in RUN]
  if unknown or options.seeds < 1 or options.scale <= 0:
    parser.error(f'--parts are some of {",".join(PARTS)}; --seeds and --scale are positive')
  interrupts.install()
  began = time.monotonic()
  try:
    with lock_workdir(options.workdir):
      bench = Bench(options.workdir.absolute(), options.scale)
      for seed in range(options.seeds):
        for part in parts:
          RUN[part](bench, seed)
        write(bench)
        minutes = (time.monotonic() - began) / 60
        print(f'seed {seed}: {minutes:.0f} minutes since the start', file=sys.stderr, flush=True)
  except UserError as error:
    sys.exit(f'error: {error}')
  print((options.workdir / 'tables.md').read_text())


if __name__ == '__main__':
  main()
