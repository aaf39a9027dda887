"""What is kept of an update that was not finite, and that it can be taken again."""

import contextlib
import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from diffusion_distillation import cli
from diffusion_distillation.datasets.loading import Shuffled
from diffusion_distillation.errors import NumericalError, UserError
from diffusion_distillation.run import inputs, loop, replay
from diffusion_distillation.stages import provenance
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.system import checkpoints, sharding
from diffusion_distillation.system.checkpoints import Checkpoints, digest
from tests import tiny
from tests.run.loop_test import BASE, CONFIG, IMAGES, INPUTS, advance, first_state, poisoned

pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def diverged(tmp_path_factory, step):
  """A workdir whose base was NaN at its last three updates, twice."""
  workdir = tmp_path_factory.mktemp('diverged')
  workdirs.claim(workdir, CONFIG)
  with pytest.raises(NumericalError):
    loop.fit(step, poisoned(9, 10, 11), INPUTS, workdir, CONFIG)
  return workdir


def test_the_first_update_of_the_streak_is_kept_with_its_batch_and_seed(diverged):
  found = json.loads((diverged / 'base' / 'nonfinite.json').read_text())
  assert (found['stage'], found['step'], found['seed']) == ('base', 9, int(BASE.recipe.seed))
  indices, _ = Shuffled(len(IMAGES), int(BASE.recipe.seed), BASE.batch_size)(9)
  assert found['images'] == indices.tolist()
  assert found['loss'] == 'nan'
  assert not found['nonfinite']['parameters'] and not found['nonfinite']['moments']
  leaves = len(jax.tree.leaves(BASE.abstract_params))
  assert len(found['nonfinite']['gradients']) == leaves  # a NaN loss leaves no gradient finite
  assert 'student/conv_out/bias' in found['nonfinite']['gradients']


def test_the_state_that_is_kept_is_the_one_that_the_update_began_with(diverged, step):
  kept, _ = Checkpoints(diverged / 'base' / 'nonfinite').restore(BASE.abstract_state, set_aside=False)
  expected, _ = advance(step, BASE, first_state(BASE), 9)
  assert checkpoints.digest(kept) == checkpoints.digest(expected)


def test_one_array_that_is_not_finite_is_named(step):
  state = sharding.to_host(first_state(BASE))
  state.params['student']['conv_in']['kernel'][0, 0, 0, 0] = np.inf
  found = replay.examine(BASE, INPUTS, sharding.place(state))
  assert found['nonfinite']['parameters'] == ['student/conv_in/kernel']
  assert found['nonfinite']['averages'] == [] and found['nonfinite']['frozen'] == []
  assert found['nonfinite']['gradients'] and found['step'] == 0
  assert 'parameters (1 array(s), such as student/conv_in/kernel' in replay.describe_findings(found)


@pytest.fixture
def short_plan(monkeypatch, tmp_path):
  """A run of which updates 3 and 7 are NaN, and only those: it ends."""
  stage = poisoned(3, 7)
  planned = [stage, *tiny.plan(max_skipped=3)[0][1:]]
  monkeypatch.setattr(workdirs, 'plan_for', lambda *_: (planned, IMAGES))
  workdirs.claim(tmp_path, CONFIG)
  return tmp_path, stage


def test_a_single_skipped_update_is_told_and_can_be_taken_again(short_plan, step, caplog, monkeypatch):
  workdir, stage = short_plan
  loop.fit(step, stage, INPUTS, workdir, CONFIG)
  told = [line for line in caplog.text.splitlines() if 'skipped update' in line]
  assert len(told) == 2 and 'skipped update(s) 3,' in told[0] and 'skipped update(s) 7,' in told[1]
  assert f'--mode=replay --workdir={workdir} --stage=base --step=7' in told[1]
  monkeypatch.setattr(sharding, 'compile_step', lambda _: step)
  for k, loss in ((3, 'nan'), (7, 'nan'), (6, None)):  # from the beginning: checkpoints are of 10 and 12
    found = replay.replay(CONFIG, workdir, 'base', k)
    assert found['step'] == k and json.loads((workdir / 'base' / 'nonfinite.json').read_text()) == found
    assert found['loss'] == loss if loss else np.isfinite(found['loss'])
    assert bool(found['nonfinite']['gradients']) == bool(loss)
  assert provenance.load_model(workdir, stage, CONFIG).step == 12


def test_replay_goes_on_from_the_nearest_checkpoint_before(short_plan, step, monkeypatch):
  workdir, stage = short_plan
  loop.fit(step, stage, INPUTS, workdir, CONFIG)
  taken = []

  def counting(recipe, state, frozen, batch):
    taken.append(int(state.step))
    return step(recipe, state, frozen, batch)

  monkeypatch.setattr(sharding, 'compile_step', lambda _: counting)
  expected, _ = advance(step, stage, first_state(stage), 11)
  found = replay.replay(CONFIG, workdir, 'base', 11)
  assert taken == [10]
  direct = replay.examine(stage, INPUTS, expected)
  assert found == direct


def test_a_streak_that_was_kept_long_ago_is_not_the_nearest(diverged, step, monkeypatch):
  """That of update 9 is kept, and there are checkpoints of 5 and 10."""
  monkeypatch.setattr(workdirs, 'plan_for', lambda *_: ([poisoned(9, 10, 11)], IMAGES))
  taken = []

  def counting(recipe, state, frozen, batch):
    taken.append(int(state.step))
    return step(recipe, state, frozen, batch)

  monkeypatch.setattr(sharding, 'compile_step', lambda _: counting)
  for k, begun in ((9, []), (11, [10]), (7, [5, 6])):
    taken.clear()
    assert replay.replay(CONFIG, diverged, 'base', k)['step'] == k
    assert taken == begun


@pytest.mark.parametrize(
  ('stage', 'step', 'message'),
  [
    ('bose', 3, '--stage=bose is not one of base, progressive_0002, progressive_0001'),
    ('base', 12, 'the updates of stage base are 0 to 11'),
    ('progressive_0002', 3, 'stage base, a parent of stage progressive_0002, is not finished'),
  ],
)
def test_what_cannot_be_replayed_is_refused(short_plan, stage, step, message):
  with pytest.raises(UserError, match=message):
    replay.replay(CONFIG, short_plan[0], stage, step)


def test_the_command_that_is_told_works(finished, tmp_path):
  workdir = shutil.copytree(finished, tmp_path / 'workdir')
  code, out, err = tiny.run_cli(
    '--mode=replay', f'--workdir={workdir}', '--stage=progressive_0001', '--step=5'
  )
  assert code == 0, err
  assert out.startswith('update 5: loss ') and 'not finite: nothing' in out


def test_a_teacher_s_last_weights_are_found_too(finished, tmp_path, monkeypatch):
  """Its folder has the moving average alone."""
  workdir, gathered = shutil.copytree(finished, tmp_path / 'workdir'), []
  for path in (workdir / 'config.json', *workdir.glob('*/stage.json')):
    path.write_text(path.read_text().replace('"from_weights": "ema"', '"from_weights": "last"'))

  class Enough(Exception):
    pass

  def gather(*args):
    gathered.append(inputs.gather(*args))
    raise Enough

  monkeypatch.setattr(replay, 'gather', gather)
  with pytest.raises(Enough):
    replay.replay(tiny.config(distill__from_weights='last'), workdir, 'progressive_0002', 5)
  teacher = gathered[0].teacher
  assert teacher.weights == 'last' and teacher.digest == digest(teacher.all['last'])
  assert digest(teacher.all['last']) != digest(teacher.all['ema'])


def test_the_mode_needs_stage_and_step(finished, capsys):
  options = cli.Options(
    mode='replay', config=None, default=tiny.config(), workdir=finished, stage='base'
  )
  with contextlib.suppress(SystemExit):
    assert cli.run(options) == 2
  assert '--mode=replay needs --stage and --step' in capsys.readouterr().err


def test_a_streak_that_has_ended_is_not_kept(step, tmp_path):
  state = first_state(BASE)
  (tmp_path / 'base').mkdir()
  replay.keep(BASE, INPUTS, tmp_path / 'base', dataclasses.replace(state, skipped=state.skipped + 3))
  assert not list((tmp_path / 'base').iterdir())
