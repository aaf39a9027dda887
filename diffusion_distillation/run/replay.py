"""Replays an update that was not finite, and reports which arrays were not.

stage_dir/nonfinite.json             the last such update: its batch and seed, and what was not finite
stage_dir/nonfinite/checkpoints/<k>  the state before update k
stage_dir/nonfinite/attempts.json    the attempts up to then; see `run/attempts.py`

Training is a function of its seed, so any update can be reproduced from any earlier checkpoint.
"""

import contextlib
import dataclasses
import itertools
import logging
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distillation.config import Config
from diffusion_distillation.datasets.orders import Shuffled
from diffusion_distillation.errors import UserError
from diffusion_distillation.run import attempts, encoding
from diffusion_distillation.run.inputs import Inputs, examples_of, gather, load_distance
from diffusion_distillation.stages import provenance, workdir
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system import cluster, files, interrupts, sharding
from diffusion_distillation.system.checkpoints import Checkpoints
from diffusion_distillation.system.files import write_json
from diffusion_distillation.system.progress import Progress
from diffusion_distillation.training.recipe import Recipe
from diffusion_distillation.training.state import TrainState
from diffusion_distillation.training.step import loss_and_gradients, train_steps

_log = logging.getLogger(__name__)


def keep(stage: Stage, inputs: Inputs, stage_dir: pathlib.Path, state: TrainState) -> None:
  """Saves the state before the streak of skipped updates that ends with `state`, and examines the streak's first update.

  Skipped updates change nothing but the counters, so the saved state is `state` with its counters reset.
  """
  streak = int(state.skipped_in_a_row)
  if not streak:
    return
  state = dataclasses.replace(
    state,
    step=state.step - streak,
    skipped=state.skipped - streak,
    skipped_in_a_row=jnp.zeros_like(state.skipped_in_a_row),
  )
  if files.writes():
    shutil.rmtree(stage_dir / 'nonfinite', ignore_errors=True)
    (stage_dir / 'nonfinite').mkdir()
  cluster.barrier()
  attempts.record(stage, stage_dir / 'nonfinite')
  with contextlib.closing(Checkpoints(stage_dir / 'nonfinite')) as checkpoints:
    checkpoints.save(int(state.step), state, 0.0)
    found = examine(stage, inputs, state)
  write_json(stage_dir / 'nonfinite.json', found)
  _log.warning(
    'stage %s: %s; to examine it again, run: %s',
    stage.name,
    describe_findings(found),
    command(stage, stage_dir, int(state.step)),
  )


def command(stage: Stage, stage_dir: pathlib.Path, step: int) -> str:
  """Returns the command that replays an update."""
  return f'python main.py --mode=replay --workdir={stage_dir.parent} --stage={stage.name} --step={step}'


def describe_findings(found: dict[str, Any]) -> str:
  """Formats the findings of `examine` as one line."""
  wrong = [
    f'{name} ({len(leaves)} array(s), such as {leaves[0]})'
    for name, leaves in found['nonfinite'].items()
    if leaves
  ]
  return f'update {found["step"]}: loss {found["loss"]}, not finite: {"; ".join(wrong) or "nothing"}'


def examine(stage: Stage, inputs: Inputs, state: TrainState) -> dict[str, Any]:
  """Examines the next update of `state` without applying it.

  Returns:
    `stage`, `step`, `seed`, `images` (the indices of the batch's images or texts), `loss`, the metrics, and `nonfinite`: the names of the
    arrays in the state, the frozen parameters and the gradients that contain a NaN or an infinity.
  """
  step = int(state.step)
  with contextlib.closing(inputs.batches(stage, step)) as batches:
    batch = sharding.put(next(batches))
  frozen = inputs.frozen(stage)
  values, flags = sharding.to_host(_look(stage.recipe_at(step), state, frozen, batch))
  return {
    'stage': stage.name,
    'step': step,
    'seed': stage.seed_at(step),
    'images': _indices(stage, inputs, step),
    **{name: _number(value) for name, value in values.items()},
    'nonfinite': {name: _names(tree) for name, tree in flags.items()},
  }


def _indices(stage: Stage, inputs: Inputs, step: int) -> list[int]:
  """Returns the indices of the images or texts in an update's batch; empty for a stage that needs none."""
  with_images = inputs.images is not None and 'images' in stage.recipe.method.needs
  read = inputs.images if with_images else inputs.texts
  if read is None or not stage.recipe.method.needs & {'images', 'labels'}:
    return []
  order = Shuffled(len(read), stage.seed_at(step), stage.batch_size)
  found: list[int] = order(step)[0].tolist()
  return found


@jax.jit
def _look(recipe: Recipe, state: TrainState, frozen: Any, batch: Any) -> tuple[dict[str, Any], Any]:
  loss, metrics, grads = loss_and_gradients(recipe, state, frozen, batch)
  trees = {'parameters': state.params, 'averages': state.ema_params, 'moments': state.opt_state}
  trees |= {'frozen': frozen, 'gradients': grads}
  return metrics | {'loss': loss}, jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), trees)


def _names(flags: Any) -> list[str]:
  leaves = jax.tree_util.tree_leaves_with_path(flags)
  return [
    jax.tree_util.keystr(path, simple=True, separator='/') for path, finite in leaves if not finite
  ]


def _number(value: np.ndarray) -> float | str:
  """Converts a value to JSON, which has no NaN and no infinity."""
  return float(value) if np.isfinite(value) else str(float(value))


def replay(config: Config, directory: pathlib.Path, name: str, step: int) -> dict[str, Any]:
  """Trains from the nearest earlier checkpoint up to update `step` of a stage, and reports what is not finite there.

  If training went back to before the update, the last attempt is replayed, unless the state before this update was saved
  when it failed. Of the run's files, only `nonfinite.json` is changed.

  Raises:
    UserError: there is no such stage or update, or a parent of the stage is not finished.
  """
  planned, images = workdir.plan_for(directory, config)
  stages = {stage.name: stage for stage in planned}
  if name not in stages:
    raise UserError(f'--stage={name} is not one of {", ".join(stages)}')
  stage = attempts.of(stages[name], directory / name)
  if not 0 <= step < stage.num_updates:
    raise UserError(f'--step={step}: the updates of stage {name} are 0 to {stage.num_updates - 1}')
  parents = {parent for parent in (stage.parent, stage.start) if parent}
  models = {}
  for parent in sorted(parents):
    weights = stage.parent_weights if parent == stage.parent else 'ema'
    model = provenance.load_model(directory, stages[parent], config, (weights,))
    if model is None or not provenance.is_finished(directory, stages[parent]):
      raise UserError(f'stage {parent}, a parent of stage {name}, is not finished')
    models[parent] = model
  texts = encoding.of_run(config, directory, stage, workdir.open_captions(directory, config))
  examples = examples_of(images, texts)
  inputs = gather(stage, models, examples, directory, load_distance(stage), texts)
  stage, state = _nearest(directory / name, stage, inputs, step)
  state = _advance(stage, inputs, state, step)
  found = examine(stage, inputs, state)
  write_json(directory / name / 'nonfinite.json', found)
  return found


def _nearest(
  stage_dir: pathlib.Path, stage: Stage, inputs: Inputs, step: int
) -> tuple[Stage, TrainState]:
  like = stage.abstract_state
  kept, saved = (
    Checkpoints(where).restore(like, set_aside=False, upto=step)
    for where in (stage_dir / 'nonfinite', stage_dir)
  )
  states: list[TrainState] = [] if saved is None else [saved[0]]
  if kept is not None:
    as_kept, at = attempts.of(stage, stage_dir / 'nonfinite'), int(kept[0].step)
    if at == step:
      return as_kept, kept[0]
    before = [[first for first in of.attempts if first < at] for of in (as_kept, stage)]
    states += [kept[0]] if before[0] == before[1] else []
  nearest = max(states, key=lambda state: int(state.step)) if states else inputs.first_state(stage)
  return stage, nearest


def _advance(stage: Stage, inputs: Inputs, state: TrainState, step: int) -> TrainState:
  compiled, frozen, done = sharding.compile_step(train_steps), inputs.frozen(stage), int(state.step)
  with (
    contextlib.closing(inputs.batches(stage, done)) as batches,
    Progress(f'replay of {stage.name}', step, done, stage.batch_size) as progress,
  ):
    for k, batch in zip(
      range(done, step), sharding.ahead(itertools.islice(batches, step - done)), strict=True
    ):
      interrupts.check()
      state, _ = compiled(stage.recipe_at(k), state, frozen, batch)
      sharding.wait_on_cpu(state)
      progress.advance()
  return state
