"""The ablations of Salimans & Ho (2022) on digits: python benchmarks/ablation.py --workdir=runs/ablation

There are four parts, each run with several seeds (of parameters, batches and noise):

  outputs      Table 1: network output x loss weighting x sampler
  integrators  appendix D: integrators of one undistilled model, by number of network evaluations
  updates      Figure 6: updates per round, 64 steps halved to 1
  factor       Figure 7: quartering the number of steps in each round, compared with halving it

Every model is a run of the package in its own directory, and every measurement is a row of rows.json, so that the same
command resumes an interrupted run. tables.md and one figure per part are written after each seed.
"""

import argparse
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import ml_collections

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks.ablation_report import CALLS, INTEGRATORS, OUTPUTS, UPDATES, WEIGHTINGS, figures, tables
from configs import digits
from diffusion_distillation import datasets
from diffusion_distillation.datasets import loading
from diffusion_distillation.errors import NumericalError, UserError
from diffusion_distillation.evaluation import features, kept_features, measure
from diffusion_distillation.evaluation.extracted import Extractors
from diffusion_distillation.evaluation.yardstick import Yardstick
from diffusion_distillation.run import gate, loop
from diffusion_distillation.run.inputs import Inputs
from diffusion_distillation.stages import extending, plan
from diffusion_distillation.stages.provenance import Model
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.stages.workdir import lock_workdir
from diffusion_distillation.system import interrupts, platforms, sharding
from diffusion_distillation.system.files import read_json, write_json
from diffusion_distillation.training import step

START = 64  # number of steps before the first round


def make_config(seed: int, scale: float, **changes: Any) -> ml_collections.ConfigDict:
  """A config with a quarter of the demo's parameters and `scale` times 1000 updates."""
  config = digits.get_config()
  config.seed = seed
  config.model.ch, config.model.emb_ch = 16, 64
  config.train.num_updates = round(1000 * scale)
  config.train.learning_rate, config.train.ema_decay = 2e-3, (0.995,)
  config.train.decay, config.time.stratified = 'none', False
  config.distill.start_steps, config.distill.factor = START, (2,)
  config.distill.learning_rate = (1e-3,)
  config.checkpoint.every = 10_000
  config.log.every = 25
  config.evaluation.num_samples, config.evaluation.batch_size = 2000, 500
  config.evaluation.seed, config.evaluation.tolerance = seed + 1, 0.0
  config.update_from_flattened_dict({key.replace('__', '.'): v for key, v in changes.items()})
  return config


@dataclasses.dataclass
class Bench:
  """Shared by all parts; rows are written to `workdir`/rows.json as soon as they are measured."""

  workdir: pathlib.Path
  scale: float

  def __post_init__(self) -> None:
    jax.config.update('jax_compilation_cache_dir', str(self.workdir / 'compiled'))
    settings = datasets.Settings.of(digits.get_config().dataset)
    self.images, held_out = (
      loading.Loader(datasets.open_split(settings, role)) for role in datasets.ROLES
    )
    self.extractor = features.load_or_train(
      self.workdir / 'extractor.safetensors', self.images, held_out
    )
    self.reference = kept_features.of_all(self.extractor, self.images)
    self.step = sharding.compile_step(step.train_steps)
    self.path = self.workdir / 'rows.json'
    stored = read_json(self.path) if self.path.exists() else {'scale': self.scale, 'rows': []}
    if stored['scale'] != self.scale:
      raise UserError(
        f'{self.path} was made with --scale={stored["scale"]}; use that, or another --workdir'
      )
    self.rows: list[dict[str, Any]] = stored['rows']

  def fit(
    self,
    name: str,
    config: ml_collections.ConfigDict,
    base: Model | None = None,
    down_to: int = 1,
  ) -> list[Model]:
    """The base model of a config, or the rounds that start from `base`; finished stages are only restored."""
    planned = plan.plan(config, (8, 8, 1), 10)
    workdir = self.workdir / f'seed_{config.seed}' / name
    workdir.mkdir(parents=True, exist_ok=True)
    if base is None:
      return [loop.fit(self.step, planned[0], Inputs(self.images), workdir, config)]
    models, judge = [base], None
    if config.gate.factor:
      judge = gate.Gate(config, workdir, self.images, (self.extractor, self.reference))
    for stage in planned[1:]:
      if stage.num_steps < down_to:
        break
      inputs = Inputs(self.images, models[-1])

      def train(stage: Stage, inputs: Inputs = inputs) -> Model:
        return loop.fit(self.step, stage, inputs, workdir, config)

      stage = extending.as_recorded(workdir, stage)
      models.append(gate.until_it_passes(judge, train, stage, models[-1]))
    return models[1:]

  def has(self, part: str, seed: int, **key: Any) -> bool:
    """Whether the row exists."""
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
    """Adds a row unless it exists; its value is None if training diverged."""
    if self.has(part, config.seed, sampler=sampler, num_steps=num_steps, **key):
      return
    nfe, value = measure.make(config, sampler).calls(num_steps), None
    try:
      value = self.value(config, model(), sampler, num_steps)
    except NumericalError as error:
      print(f'{part}: {error}', file=sys.stderr, flush=True)
    fields = {'sampler': sampler, 'num_steps': num_steps, **key, 'nfe': nfe, 'value': value}
    self.rows.append({'part': part, 'seed': config.seed, **fields})
    write_json(self.path, {'scale': self.scale, 'rows': self.rows})
    shown = ' '.join(f'{k}={v}' for k, v in fields.items() if k != 'value')
    print(f'{part} seed={config.seed} {shown}: {value}', file=sys.stderr, flush=True)

  def value(
    self,
    config: ml_collections.ConfigDict,
    model: Model,
    sampler: str = 'ddim',
    num_steps: int | None = None,
  ) -> float:
    """The Frechet distance of a model's samples, by default with its own number of steps."""
    setting = measure.Setting(model, sampler, num_steps or model.stage.num_steps)
    by = Yardstick(Extractors(self.extractor), self.reference)
    row, _ = measure.measure_setting(config, setting, by)
    value: float = row['value']
    return value

  def base(self, config: ml_collections.ConfigDict) -> Model:
    """The undistilled model that all parts except the first use: v, truncated SNR."""
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
  """Every integrator, with the same numbers of network evaluations."""
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
  counts = [steps for steps, _ in plan.rounds(START, 1, (factor,))]
  if all(bench.has(part, seed, num_steps=n, caption=caption) for n in counts):
    return

  def model(num_steps: int) -> Model:
    """The student of a round; trains it and earlier rounds if necessary. Raises NumericalError if one diverges."""
    base = bench.base(make_config(seed, bench.scale))
    return bench.fit(caption.replace(' ', '_'), config, base, down_to=num_steps)[-1]

  for n in counts:
    bench.measure(part, config, lambda n=n: model(n), 'ddim', n, caption=caption)


def run_updates(bench: Bench, seed: int) -> None:
  """The base model under DDIM, and the students of rounds of several lengths."""
  config = make_config(seed, bench.scale)
  for num_steps in (1, 2, 4, 8, 16, 32, 64):
    bench.measure('updates', config, lambda: bench.base(config), 'ddim', num_steps, caption='base')
  for count in UPDATES:
    _rounds(bench, 'updates', seed, f'{count} updates', 2, (count, 2 * count, 2 * count))


def run_factor(bench: Bench, seed: int) -> None:
  """Rounds that quarter the number of steps; those that halve it belong to `updates`."""
  most = UPDATES[-1]
  _rounds(bench, 'factor', seed, 'quarter', 4, (most, 2 * most))


RUN = {
  'outputs': run_outputs,
  'integrators': run_integrators,
  'updates': run_updates,
  'factor': run_factor,
}


def write(bench: Bench) -> str:
  """Writes tables.md and the figures from the rows so far; returns the tables."""
  text = '\n\n'.join(f'## {part}\n\n{table}' for part, table in tables(bench.rows))
  (bench.workdir / 'tables.md').write_text(text + '\n')
  for part, figure in figures(bench.rows):
    figure.savefig(bench.workdir / f'ablation_{part}.png', dpi=130)
  return text


def main(
  about: str, run: Mapping[str, Callable[[Bench, int], None]], write: Callable[[Bench], str]
) -> None:
  """The command line of a benchmark with parts: runs them seed by seed, and prints what `write` returns.

  Args:
    about: the first line of the help.
    run: functions that run a part with a seed, by name; they skip what has been done.
    write: writes the results so far, after each seed, and returns the tables.
  """
  parser = argparse.ArgumentParser(description=about)
  parser.add_argument('--workdir', type=pathlib.Path, required=True)
  parser.add_argument('--seeds', type=int, default=3)
  parser.add_argument(
    '--scale', type=float, default=1.0, help='factor on the number of updates of every stage'
  )
  parser.add_argument('--parts', default=','.join(run))
  options = parser.parse_args()
  parts = options.parts.split(',')
  unknown = [part for part in parts if part not in run]
  if unknown or options.seeds < 1 or options.scale <= 0:
    parser.error(f'--parts must be among {",".join(run)}; --seeds and --scale must be positive')
  interrupts.install()
  began, text = time.monotonic(), ''
  try:
    platforms.start()
    with lock_workdir(options.workdir):
      bench = Bench(options.workdir.absolute(), options.scale)
      for seed in range(options.seeds):
        for part in parts:
          run[part](bench, seed)
        text = write(bench)
        minutes = (time.monotonic() - began) / 60
        print(f'seed {seed}: {minutes:.0f} minutes since the start', file=sys.stderr, flush=True)
  except UserError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(error.exit_code)
  print(text)


if __name__ == '__main__':
  main(__doc__.splitlines()[0], RUN, write)
