"""The moving average that computes a target: its own, or one that is sampled, or none."""

import dataclasses

import jax
import numpy as np
import pytest
from flax.core import FrozenDict

from diffusion_distillation.evaluation import measure
from diffusion_distillation.stages import trained
from diffusion_distillation.system import sharding
from diffusion_distillation.training import step as update
from tests import tiny
from tests.run.loop_test import IMAGES, assert_same
from tests.training.step_test import Small, assert_close, small_params


def consistency(target, *averages):
  """The stages of a run, base and student, whose target follows an average of this decay."""
  decays = {'consistency__target_decay': target, 'consistency__ema_decay': averages}
  rest = {'consistency__batch_size': 32, 'consistency__warmup': 0, 'consistency__learning_rate': 0.05}
  return tiny.plan(methods=('consistency',), **decays, **rest)[0]


def test_the_target_is_computed_by_an_average_of_its_own_which_is_not_sampled():
  """Three updates over a small network; the averages in float64, from the parameters as they were recorded."""
  stage = consistency(0.5, 0.9)[1]
  networks = FrozenDict(stage.recipe.method.networks(Small(), Small()))
  stage = dataclasses.replace(stage, recipe=stage.recipe.replace(networks=networks))
  frozen, batch = stage.frozen(small_params(1), None), IMAGES.images.batch(np.arange(32))
  advance = jax.jit(update.train_step)
  state = stage.recipe.create_state(small_params(0))
  expected = [sharding.to_host(state.params['student'])] * 2
  for _ in range(3):
    state, _ = advance(stage.recipe, state, frozen, batch)
    params = sharding.to_host(state.params['student'])
    for k, decay in enumerate((0.9, 0.5)):
      expected[k] = jax.tree.map(
        lambda a, p, d=decay: d * np.float64(a) + (1 - d) * p, expected[k], params
      )
  for average, wanted in zip(state.ema_params, expected, strict=True):
    assert_close(average, wanted, rtol=1e-6)

  def loss(recipe, state):
    return float(jax.jit(update.loss_and_gradients)(recipe, state, frozen, batch)[0])

  of_the_first = stage.recipe.replace(target_decay=None)
  exchanged = state.replace(ema_params=state.ema_params[::-1])
  found = loss(stage.recipe, state)
  assert found == pytest.approx(loss(of_the_first, exchanged), rel=1e-6)
  assert abs(found / loss(of_the_first, state) - 1.0) > 1e-3

  model = trained.to_model(stage, state, 0.0)
  assert list(model.all) == list(stage.weights) == ['ema', 'last']
  assert_same(model.params, state.ema_params[0])


@pytest.mark.parametrize(
  ('target', 'averages', 'kept', 'followed'),
  [
    (0.0, (0.9,), (0.9,), False),
    (0.9, (0.9,), (0.9,), True),
    (0.5, (0.9, 0.8), (0.9, 0.8, 0.5), True),
    (0.5, (0.0,), (0.0, 0.5), True),
  ],
)
def test_an_average_is_kept_for_the_target_only_where_none_does_and_is_never_measured(
  target, averages, kept, followed
):
  stages = consistency(target, *averages)
  recipe = stages[1].recipe
  assert recipe.decays == kept and recipe.ema_decay == averages
  assert len(stages[1].abstract_state.ema_params) == len(kept)
  assert ('average' in recipe.networks) == recipe.method.follows_average == followed
  rows = measure.rows(stages, tiny.config(methods=('consistency',)))
  names = {weights for place, weights, *_ in rows if place}
  assert names == {'ema', *(f'ema_{decay}' for decay in averages[1:])}
