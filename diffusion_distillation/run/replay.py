"""An update that was not finite, taken once more and looked at.

stage_dir/nonfinite.json             the last such update: its batch and seed, and what was not finite
stage_dir/nonfinite/checkpoints/<k>  the state that update k began with
stage_dir/nonfinite/attempts.json    by which attempt it was made; see `run/attempts.py`

Training is a function of its seed, so that any update can be reached again from any checkpoint before it.
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
from diffusion_distillation.run import attempts
from diffusion_distillation.run.inputs import Inputs, gather, load_distance
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
  """Keeps what the first update of the streak that `state` ends began with, and looks at it.

  Skipped updates leave all but the counters as it was, so that this is `state` with its counters turned back.
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
    'stage %s: %s; to look at it again: %s',
    stage.name,
    told(found),
    command(stage, stage_dir, int(state.step)),
  )


def command(stage: Stage, stage_dir: pathlib.Path, step: int) -> str:
  """What takes an update again."""
  return f'python main.py --mode=replay --workdir={stage_dir.parent} --stage={stage.name} --step={step}'


def told(found: dict[str, Any]) -> str:
  """One line of what `examine` found."""
  wrong = [
    f'{name} of {len(leaves)} array(s), such as {leaves[0]}'
    for name, leaves in found['nonfinite'].items()
    if leaves
  ]
  return f'update {found["step"]}: loss {found["loss"]}, not finite: {"; ".join(wrong) or "nothing"}'


def examine(stage: Stage, inputs: Inputs, state: TrainState) -> dict[str, Any]:
  """The update that `state` leads to, without making it.

  Returns:
    `stage`, `step`, `seed`, `images` (the indices of its batch), `loss`, the metrics, and `nonfinite`: names of arrays
    with a NaN or an infinity, of the state, of what is frozen, and of the gradients.
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
  """The indices of the images in the batch of an update; none for a stage that needs no images."""
  if inputs.images is None or 'images' not in stage.recipe.method.needs:
    return []
  order = Shuffled(len(inputs.images), stage.seed_at(step), stage.batch_size)
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
  """JSON has no NaN."""
  return float(value) if np.isfinite(value) else str(float(value))


def replay(config: Config, directory: pathlib.Path, name: str, step: int) -> dict[str, Any]:
  """Goes to update `step` of a stage from the nearest checkpoint before it, and says what is not finite there.

  Where training went back to before the update, it is the one of the last attempt, unless it is the one that was kept.
  Nothing of the run is changed but `nonfinite.json`.

  Raises:
    UserError: there is no such stage or update, or a stage before it is not finished.
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
    if model is None or model.step < stages[parent].num_updates:
      raise UserError(f'stage {parent}, which stage {name} comes from, is not finished')
    models[parent] = model
  inputs = gather(stage, models, images, directory, load_distance(stage))
  stage, state = _nearest(directory / name, stage, inputs, step)
  state = _advance(stage, inputs, state, step)
  found = examine(stage, inputs, state)
  write_json(directory / name / 'nonfinite.json', found)
  return found


def _nearest(
  stage_dir: pathlib.Path, stage: Stage, inputs: Inputs, step: int
) -> tuple[Stage, TrainState]:
  like = stage.abstract_state()
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
      sharding.settle(state)
      progress.advance()
  return state
