"""Going back after updates that were not finite: other batches and seeds from there, the same after a kill, and in a replay.

Nothing is compiled: the step is written out here, and what it makes of a state depends on the batch and the seed.
"""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.datasets.loading import Shuffled
from diffusion_distillation.errors import DamagedError, NumericalError
from diffusion_distillation.run import attempts, inputs, loop, replay
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.system import sharding
from diffusion_distillation.system.checkpoints import digest
from tests import tiny

pytestmark = pytest.mark.slow

CONFIG = tiny.config(max_skipped=3)
(BASE, *_), IMAGES = tiny.plan(max_skipped=3)
INPUTS = inputs.Inputs(IMAGES)
SEED, BAD = int(BASE.recipe.seed), (5, 6, 7)  # max_skipped is 3, checkpoints are of 5 and 10
AGAIN = dataclasses.replace(BASE, attempts=(5,))


class Killed(BaseException):
  """As SIGKILL: nothing is saved."""


class Step:
  """Adds up what it is given, in one array; the updates BAD are skipped, by the first seed or by all."""

  def __init__(self, by_all=False, killed_at=None):
    self.calls, self.by_all, self.killed_at = [], by_all, killed_at

  def __call__(self, recipe, state, frozen, batch):
    k, seed = int(state.step), int(recipe.seed)
    if seed != SEED and k == self.killed_at:
      raise Killed
    images = np.asarray(batch['image'])
    self.calls.append((k, seed, images))
    skipped = k in BAD and (self.by_all or seed == SEED)
    in_a_row = state.skipped_in_a_row + 1 if skipped else jnp.zeros_like(state.skipped_in_a_row)
    if not skipped:
      state = state.replace(ema_params=(added(state.ema_params[0], images.mean() + seed % 1000),))
    state = state.replace(
      step=state.step + 1, skipped=state.skipped + skipped, skipped_in_a_row=in_a_row
    )
    return state, {'loss': 1.0, 'skipped': state.skipped, 'skipped_in_a_row': in_a_row}


def added(params, value):
  return params | {'conv_out': params['conv_out'] | {'bias': params['conv_out']['bias'] * 0.5 + value}}


def batch_of(stage, k):
  indices, _ = Shuffled(len(IMAGES), stage.seed_at(k), stage.batch_size)(k)
  return {'image': IMAGES.images.batch(indices)['image']}


@pytest.fixture(scope='module')
def expected():
  """Averages after each update of a stage that went back to update 5, by hand."""
  state, step = INPUTS.first_state(BASE), Step()
  found = [digest(state.ema_params[0])]
  for k in range(12):
    state, _ = step(AGAIN.recipe_at(k), state, {}, batch_of(AGAIN, k))
    found.append(digest(state.ema_params[0]))
  return found


@pytest.fixture
def workdir(tmp_path, monkeypatch):
  monkeypatch.setattr(sharding, '_in_use', [sharding._make(jax.devices()[:1], 1)])  # quicker than eight
  monkeypatch.setattr(replay, 'examine', lambda stage, _, state: examined(stage, state))
  workdirs.claim(tmp_path, CONFIG)
  return tmp_path


def examined(stage, state):
  """In place of the gradients, which have to be compiled."""
  at = {'attempts': list(stage.attempts), 'averages': digest(state.ema_params[0])}
  return {'step': int(state.step), 'loss': 'nan', 'nonfinite': {}} | at


def test_the_first_attempt_is_as_ever_and_later_ones_have_seeds_of_their_own():
  stage = dataclasses.replace(BASE, attempts=(5, 10))
  seeds = [stage.seed_at(k) for k in range(12)]
  assert seeds[:5] == [SEED] * 5 and len({SEED, seeds[5], seeds[10]}) == 3
  assert seeds[5:] == [seeds[5]] * 5 + [seeds[10]] * 2 and all(0 <= seed < 2**31 for seed in seeds)
  assert list(stage.streams(3)) == [(SEED, 3, 5), (seeds[5], 5, 10), (seeds[10], 10, 12)]
  assert list(BASE.streams(3)) == [(SEED, 3, 12)]
  assert [int(stage.recipe_at(k).seed) for k in range(12)] == seeds
  assert stage.recipe_at(4) == BASE.recipe.at(4)


def test_updates_that_were_not_finite_are_taken_again_with_other_batches_and_noise(
  workdir, caplog, expected
):
  step = Step()
  model = loop.fit(step, BASE, INPUTS, workdir, CONFIG)
  assert [k for k, *_ in step.calls] == [*range(8), *range(5, 12)]
  assert [seed for _, seed, _ in step.calls] == [SEED] * 8 + [AGAIN.seed_at(5)] * 7
  for k, (_, _, images) in zip(range(5, 12), step.calls[8:], strict=True):
    np.testing.assert_array_equal(images, batch_of(AGAIN, k)['image'])
    assert (images != batch_of(BASE, k)['image']).any()
  assert 'back to step 5, and continuing with other batches and other noise (attempt 2)' in caplog.text
  assert json.loads((workdir / 'base' / 'attempts.json').read_text()) == {'went_back_to': [5]}
  assert model.digest == expected[12]


@pytest.mark.parametrize('at', [5, 11])
def test_killed_in_its_second_attempt_it_ends_bit_for_bit_the_same(workdir, expected, at):
  """Before the first update after going back, and after the next checkpoint."""
  with pytest.raises(Killed):
    loop.fit(Step(killed_at=at), BASE, INPUTS, workdir, CONFIG)
  again = Step()
  model = loop.fit(again, BASE, INPUTS, workdir, CONFIG)
  assert [k for k, *_ in again.calls] == [*range(5 if at < 10 else 10, 12)]
  assert model.digest == expected[12]


def test_a_stage_that_fails_after_the_same_checkpoint_again_is_given_up_also_when_it_is_started_again(
  workdir, caplog
):
  for _ in range(2):
    with pytest.raises(NumericalError, match='for the second time since step 5'):
      loop.fit(Step(by_all=True), BASE, INPUTS, workdir, CONFIG)
  assert caplog.text.count('back to step 5') == 1


def test_a_replay_takes_the_update_that_was_kept_as_it_was_and_others_as_the_last_attempt_did(
  workdir, expected, monkeypatch
):
  loop.fit(Step(), BASE, INPUTS, workdir, CONFIG)
  monkeypatch.setattr(workdirs, 'plan_for', lambda *_: ([BASE], IMAGES))
  monkeypatch.setattr(sharding, 'compile_step', lambda _: Step())
  shutil.rmtree(workdir / 'base' / 'checkpoints' / '10')
  for k, made_by in ((5, []), (8, [5]), (3, [5])):
    found = replay.replay(CONFIG, workdir, 'base', k)
    assert (found['attempts'], found['averages']) == (made_by, expected[k]), k


def test_attempts_that_cannot_be_read_are_named(tmp_path):
  assert attempts.of(BASE, tmp_path) == BASE
  (tmp_path / 'attempts.json').write_text('{"went_back_to": ["5"]}')
  with pytest.raises(DamagedError, match=r'attempts\.json is damaged'):
    attempts.of(BASE, tmp_path)
