"""Shows the plan of a run before it starts: stages, updates, network calls, and estimated times."""

import contextlib
import dataclasses
import pathlib
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from clu import parameter_overview

from diffusion_distillation import datasets
from diffusion_distillation.config import Config
from diffusion_distillation.datasets import survey
from diffusion_distillation.datasets.prompts import Captions
from diffusion_distillation.diffusion import times
from diffusion_distillation.evaluation import measure, rows
from diffusion_distillation.evaluation.sampling import at_a_time
from diffusion_distillation.networks import conditioning
from diffusion_distillation.networks.guidance import calls_per_image
from diffusion_distillation.run import companion_training, compared, encoding
from diffusion_distillation.run.inputs import stand_in
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system import announcing, files, interrupts, sharding
from diffusion_distillation.training.state import Params


def show(stages: list[Stage], finished: set[str], config: Config, workdir: pathlib.Path) -> None:
  """Prints the plan and a summary of the images to stderr. Compiles nothing.

  Args:
    stages: the stages of the run.
    finished: names of the finished stages.
    config: the config of the run.
    workdir: the workdir of the run; it need not exist.
  """
  show_lines(companion_training.table(config, workdir))
  show_lines(table(stages, finished, config))
  if files.writes() and config.dataset.name != datasets.NONE:
    show_lines(_survey(stages, config, workdirs.open_captions(workdir, config)))


def show_lines(lines: Iterable[str]) -> None:
  """Prints lines to stderr, each as soon as it is known."""
  for line in lines:
    _print(line)


def _survey(stages: list[Stage], config: Config, captions: Captions | None) -> Iterator[str]:
  """Yields lines that summarize the dataset: its images or, for a model that takes texts, its texts."""
  if captions is None:
    yield from survey.lines(datasets.Settings.of(config.dataset))
    return
  size = encoding.size_of_record(captions, stages[0], config.dataset.encoded_dtype) * len(captions)
  kind = 'images with captions' if isinstance(captions, datasets.ImageSet) else 'prompts'
  yield f'{len(captions):,} {kind} of {captions.name}; {size / 1e9:.3f} GB as encoded by the model'
  if isinstance(captions, datasets.ImageSet):
    yield from captions.beside().lines()


def show_times(
  stages: list[Stage],
  finished: set[str],
  step: Callable,
  config: Config,
  distances: Mapping[str, Params] | None = None,
) -> None:
  """Times a few updates of each kind and prints estimates for the unfinished stages to stderr.

  Partly trained stages and the evaluation are counted in full.

  Args:
    stages: the stages of the run.
    finished: names of the finished stages.
    step: the compiled `train_step`.
    config: the config of the run; `log.measured_updates` = 0 disables the estimate.
    distances: weights of the distance, for each stage that has one with weights.
  """
  repeats = config.log.measured_updates
  if not repeats:
    return
  seconds: dict = {}
  total = 0.0
  _print(f'measuring {repeats} updates of each kind ...')
  for stage in stages:
    if stage.name in finished:
      continue
    kind = (jax.tree.structure(stage.recipe), stage.batch_size)
    if kind not in seconds:
      seconds[kind] = seconds_per_update(stage, step, repeats, (distances or {}).get(stage.name))
    total += seconds[kind] * stage.num_updates
    rate = f'{1000 * seconds[kind]:.3g} ms an update'
    _print(f'  {stage.name:<18} {_duration(seconds[kind] * stage.num_updates):>10}  ({rate})')
  of_pairs, calls = pairs_calls(stages, finished), evaluation_calls(stages, config)
  call = seconds_per_call(stages[0], config) if of_pairs or calls else 0.0
  if of_pairs:
    total += call * of_pairs
    _print(f'  {"pairs":<18} {_duration(call * of_pairs):>10}')
  if calls:
    _print(
      f'  {"evaluation":<18} {_duration(call * calls):>10}  ({1000 * call:.3g} ms an image and call)'
    )
  _print(f'  {"together":<18} {_duration(total + call * calls):>10}')


def table(stages: list[Stage], finished: set[str], config: Config) -> Iterator[str]:
  """Yields lines: the network, then each stage with its updates and network calls, then the evaluation."""
  first = stages[0]
  count = parameter_overview.count_parameters(first.abstract_params)
  yield f'{count:,} parameters; {sharding.describe()}'
  with_pairs = next((stage for stage in stages if stage.pairs and stage.name not in finished), None)
  for stage in stages:
    calls = network_calls(stage)
    if stage.pairs is not None and stage is with_pairs:
      drawn, calls_of_pairs = stage.pairs, pairs_calls(stages, finished)
      yield (
        f'  {"pairs":<18} {drawn.num_steps:>5} steps {drawn.count:>8,} {"pairs":<20} '
        f'{calls_of_pairs:>10.2e} network calls'
      )
    done = '  finished' if stage.name in finished else ''
    yield (
      f'  {stage.name:<18} {stage.num_steps:>5} steps {stage.num_updates:>8,} updates of '
      f'{stage.batch_size} images {calls:>10.2e} network calls{done}'
    )
  if calls := evaluation_calls(stages, config):
    yield f'  {"evaluation":<18} {calls:>54.2e} network calls'


def network_calls(stage: Stage) -> float:
  """Returns the number of forward calls per image in a stage's training; calls of trained networks are also differentiated."""
  return stage.num_updates * stage.batch_size * stage.recipe.method.calls


def work_after(stages: list[Stage], finished: set[str], config: Config) -> dict[str, float]:
  """Returns the work that remains after each unfinished stage, in multiples of the stage's own work.

  A differentiated call counts as three calls.
  """
  todo = [stage for stage in stages if stage.name not in finished]
  own = [network_calls(stage) * (1.0 + 2.0 / stage.recipe.method.calls) for stage in todo]
  rest = float(evaluation_calls(stages, config))
  found = {}
  for stage, work in reversed(list(zip(todo, own, strict=True))):
    found[stage.name] = rest / work
    rest += work
  return found


def pairs_calls(stages: list[Stage], finished: set[str]) -> int:
  """Returns the number of single-image network calls to draw the unfinished stages' pairs, which they all share."""
  for stage in stages:
    if stage.pairs is not None and stage.name not in finished:
      pairs = stage.pairs
      grid = times.make_grid(pairs.grid, pairs.num_steps, stage.schedule)
      return pairs.count * pairs.guidance.calls(pairs.sampler, grid, stage.schedule)
  return 0


def evaluation_calls(stages: list[Stage], config: Config) -> int:
  """Returns the number of single-image network calls of a complete evaluation; 0 if nothing is measured."""
  if not compared.is_measured(config):
    return 0
  return config.evaluation.num_samples * sum(
    calls_per_image(
      stages[place].denoise.conditioning,
      guidance,
      measure.make(config, sampler),
      measure.grid(config, stages[place], num_steps),
      stages[place].schedule,
    )
    for place, _, sampler, num_steps in rows.rows(stages, config)
    for guidance in rows.guidances(config, place, stages[place])
  )


def seconds_per_update(stage: Stage, step: Callable, repeats: int, distance: Params = None) -> float:
  """Returns the mean time of an update on random inputs, over whole periods of the method, without compilation."""
  key = jax.random.key(0)
  params, teacher = sharding.to_host((stage.init_params(key), stage.init_teacher(key)))
  state = sharding.create(stage.recipe.create_state, params, teacher)
  frozen = sharding.place(stage.frozen(teacher, distance, params))
  batch = sharding.spread(stand_in(stage))
  period = stage.recipe.method.period
  timed = -(-repeats // period) * period
  began = 0.0
  for k in range(period + timed):
    interrupts.check()
    began = time.monotonic() if k == period else began
    first = k < period  # the first update of its kind, which is compiled
    with announcing.compiling(f'stage {stage.name}') if first else contextlib.nullcontext():
      state, _ = step(stage.recipe.at(k), state, frozen, batch)
      jax.block_until_ready(state)
  return (time.monotonic() - began) / timed


@dataclasses.dataclass(frozen=True)
class _Blank:
  """Texts whose embeddings are zeros, to time a network with."""

  conditioning: Any

  def draw(self, index: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """See `conditioning.Texts.draw`."""
    del seed
    found = conditioning.examples(self.conditioning, len(index)) or {}
    return {key: found[key] for key in ('text', 'no_text')}


def seconds_per_call(stage: Stage, config: Config) -> float:
  """Returns the time of one network call per image, when a sampler draws full batches."""
  params = sharding.to_host(stage.init_params(jax.random.key(0)))
  draw = measure.drawer(config, stage, config.evaluation.samplers[0])
  most = config.evaluation.batch_size
  most = at_a_time(stage.space, stage.image_shape, most, most)
  draw = dataclasses.replace(draw, texts=_Blank(stage.denoise.conditioning), batch_size=most)
  size = sharding.round_up(most)
  seconds = draw.seconds_per_image(
    params, times.uniform(2), size, 0, then=lambda images: (), use=lambda *_: None
  )
  return seconds / draw.sampler.calls(2)


def _duration(seconds: float) -> str:
  if seconds < 60:
    return f'{seconds:.0f} s'
  hours, minutes = divmod(round(seconds / 60), 60)
  return f'{hours} h {minutes:02d} min' if hours else f'{seconds / 60:.1f} min'


def _print(line: str) -> None:
  if files.writes():
    print(line, file=sys.stderr, flush=True)
