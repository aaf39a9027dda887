"""Going back after updates that were not finite: other batches and noise from there, the same after a kill, and in a replay."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from diffusion_distillation.datasets.loading import Shuffled
from diffusion_distillation.errors import DamagedError, NumericalError
from diffusion_distillation.run import attempts, loop, replay
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.system import sharding
from diffusion_distillation.system.checkpoints import digest
from tests.run.loop_test import BASE, CONFIG, IMAGES, INPUTS, advance, first_state, poisoned

SEED, BAD = (
  int(BASE.recipe.seed),
  (5, 6, 7),
)  # of the first attempt; max_skipped is 3, checkpoints are of 5 and 10
AGAIN = dataclasses.replace(BASE, attempts=(5,))


class Killed(BaseException):
  """As SIGKILL: nothing is saved."""


@pytest.fixture
def faulty(step):
  """Makes the step of a stage of which some updates are NaN by the first seed alone; it notes what it is given."""

  def make():
    def call(recipe, state, frozen, batch):
      call.calls.append((int(state.step), int(recipe.seed), np.asarray(batch['image'])))
      of = poisoned(*(BAD if int(recipe.seed) == SEED else ()))
      return step(of.recipe.replace(seed=recipe.seed), state, frozen, batch)

    call.calls = []
    return call

  return make


@pytest.fixture(scope='module')
def reference(step):
  """A stage that went back to update 5 once, by hand: the state before update 8, and the digest of the finished model."""
  state, _ = advance(step, BASE, first_state(BASE), 5)
  for k in range(5, 8):
    state, _ = step(AGAIN.recipe_at(k), state, {}, batch_of(AGAIN, k))
  before = sharding.to_host(state)
  for k in range(8, 12):
    state, _ = step(AGAIN.recipe_at(k), state, {}, batch_of(AGAIN, k))
  return before, digest(state.ema_params[0])


def batch_of(stage, k):
  indices, _ = Shuffled(len(IMAGES), stage.seed_at(k), stage.batch_size)(k)
  return sharding.put({'image': IMAGES.images.batch(indices)['image'], 'cond': None})


@pytest.fixture
def workdir(tmp_path):
  workdirs.claim(tmp_path, CONFIG)
  return tmp_path


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
  faulty, workdir, caplog, reference
):
  call = faulty()
  model = loop.fit(call, BASE, INPUTS, workdir, CONFIG)
  assert [k for k, *_ in call.calls] == [*range(8), *range(5, 12)]
  assert [seed for _, seed, _ in call.calls] == [SEED] * 8 + [AGAIN.seed_at(5)] * 7
  for (k, _, first), (_, _, second) in zip(call.calls[5:8], call.calls[8:11], strict=True):
    assert (first != second).any(), k
  assert 'back to step 5, and on with other batches and other noise (attempt 2)' in caplog.text
  assert json.loads((workdir / 'base' / 'attempts.json').read_text()) == {'went_back_to': [5]}
  assert model.digest == reference[1]


@pytest.mark.parametrize('at', [5, 8, 11])
def test_killed_in_its_second_attempt_it_ends_bit_for_bit_the_same(faulty, workdir, reference, at):
  """Before the first update after going back, before the next checkpoint, and after it."""
  call = faulty()

  def killed(recipe, state, frozen, batch):
    if int(recipe.seed) != SEED and int(state.step) == at:
      raise Killed
    return call(recipe, state, frozen, batch)

  with pytest.raises(Killed):
    loop.fit(killed, BASE, INPUTS, workdir, CONFIG)
  again = faulty()
  model = loop.fit(again, BASE, INPUTS, workdir, CONFIG)
  assert [k for k, *_ in again.calls] == [*range(5 if at < 10 else 10, 12)]
  assert model.digest == reference[1]


def test_a_stage_that_fails_after_the_same_checkpoint_again_is_given_up_also_after_a_kill(
  step, workdir, caplog
):
  always = poisoned(*BAD)
  for _ in range(2):
    with pytest.raises(NumericalError, match='not for the first time since step 5'):
      loop.fit(step, always, INPUTS, workdir, CONFIG)
  assert caplog.text.count('back to step 5') == 1


def test_a_replay_takes_the_update_that_was_kept_as_it_was_and_others_as_the_last_attempt_did(
  faulty, workdir, step, reference, monkeypatch
):
  loop.fit(faulty(), BASE, INPUTS, workdir, CONFIG)
  monkeypatch.setattr(workdirs, 'plan_for', lambda *_: ([BASE], IMAGES))
  monkeypatch.setattr(sharding, 'compile_step', lambda _: step)
  shutil.rmtree(workdir / 'base' / 'checkpoints' / '10')
  kept = replay.replay(CONFIG, workdir, 'base', 5)
  assert kept['seed'] == SEED and kept['images'] == replay._indices(BASE, INPUTS, 5)
  found = replay.replay(CONFIG, workdir, 'base', 8)
  assert found == replay.examine(AGAIN, INPUTS, sharding.place(reference[0]))
  assert found['seed'] == AGAIN.seed_at(8) != SEED


def test_attempts_that_cannot_be_read_are_named(tmp_path):
  assert attempts.of(BASE, tmp_path) == BASE
  (tmp_path / 'attempts.json').write_text('{"went_back_to": ["5"]}')
  with pytest.raises(DamagedError, match=r'attempts\.json is damaged'):
    attempts.of(BASE, tmp_path)


def test_batches_from_the_middle_are_those_of_the_attempt(workdir):
  stream = INPUTS.batches(dataclasses.replace(BASE, attempts=(5,)), 3)
  for k, batch in enumerate(stream, start=3):
    jax.tree.map(np.testing.assert_array_equal, batch['image'], np.asarray(batch_of(AGAIN, k)['image']))
  assert k == 11
