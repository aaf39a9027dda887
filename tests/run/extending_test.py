"""A finished stage that is trained for longer."""

import json
import shutil
import signal

import jax
import pytest

from diffusion_distillation.errors import DamagedError, Preempted, UserError
from diffusion_distillation.run import loop
from diffusion_distillation.run.inputs import Inputs
from diffusion_distillation.stages import extending, model, provenance
from diffusion_distillation.stages.provenance import Model, Parents
from diffusion_distillation.system import interrupts, sharding
from tests import tiny
from tests.run_test import tree_digest

SHORT, LONG = (tiny.config(train__num_updates=count) for count in (4, 8))
(OF_4, STUDENT, LAST), IMAGES = tiny.plan(train__num_updates=4)
OF_8 = tiny.plan(train__num_updates=8)[0][0]
INPUTS = Inputs(IMAGES)


def lineage(workdir, stage=OF_4):
  return json.loads((workdir / stage.name / 'stage.json').read_text())


def write_finished(workdir, stage, parents=None, config=SHORT):
  """A finished stage without checkpoints or a model."""
  provenance.begin_stage(workdir, stage, parents or Parents(), config)
  path = workdir / stage.name / 'stage.json'
  path.write_text(json.dumps(lineage(workdir, stage) | {'finished': True, 'digest': 'a'}))


@pytest.fixture(scope='module')
def of_4(tmp_path_factory, step):
  """A workdir with a base of 4 updates, which tests only copy."""
  workdir = tmp_path_factory.mktemp('of_4')
  loop.fit(step, OF_4, INPUTS, workdir, SHORT)
  return workdir


@pytest.mark.slow
def test_an_extended_stage_that_was_interrupted_equals_one_trained_in_one_go(
  step, of_4, tmp_path, caplog
):
  def stopping(recipe, state, frozen, batch):
    if int(state.step) == 5:
      signal.raise_signal(signal.SIGTERM)
    return step(recipe, state, frozen, batch)

  workdir = shutil.copytree(of_4, tmp_path / 'extended')
  extending.check_configs(workdir, [OF_8, STUDENT], LONG)
  assert provenance.is_finished(workdir, OF_4) and not provenance.is_finished(workdir, OF_8)
  assert provenance.load_model(workdir, OF_8, LONG).step == 4  # before it is begun
  handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
  interrupts.install()
  try:
    with pytest.raises(Preempted):
      loop.fit(stopping, OF_8, INPUTS, workdir, LONG)
    interrupts.install()
    found = lineage(workdir)
    assert not found['finished'] and (found['num_updates'], found['extended_from']) == (8, [4])
    assert 'from 4 to 8' in caplog.text
    assert model.read(workdir / 'base' / 'model').provenance['updates'] == 4
    assert provenance.load_model(workdir, OF_8, LONG).step == 6
    extending.check_configs(workdir, [OF_8, STUDENT], LONG)
    extended = loop.fit(step, OF_8, INPUTS, workdir, LONG)
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
  at_once = loop.fit(step, OF_8, INPUTS, tmp_path, LONG)
  assert extended.digest == at_once.digest and extended.step == 8
  found, expected = lineage(workdir), lineage(tmp_path)
  assert found.pop('extended_from') == [4] and found.pop('seconds') and expected.pop('seconds')
  assert found == expected and found['finished']
  stored = model.read(workdir / 'base' / 'model')
  assert stored.digest == at_once.digest and stored.provenance['updates'] == 8
  assert loop.fit(None, OF_8, INPUTS, workdir, LONG).digest == at_once.digest
  with pytest.raises(UserError, match='num_updates was 8, is 4'):
    extending.check_configs(workdir, [OF_4], SHORT)


@pytest.mark.slow
def test_an_extension_whose_checkpoints_are_damaged_does_not_begin_anew(step, of_4, tmp_path):
  workdir = shutil.copytree(of_4, tmp_path / 'extended')
  for path in (workdir / 'base' / 'checkpoints').rglob('_METADATA'):
    path.write_bytes(b'')
  with pytest.raises(DamagedError, match='no complete checkpoint is left'):
    loop.fit(step, OF_8, INPUTS, workdir, LONG)
  assert model.read(workdir / 'base' / 'model').provenance['updates'] == 4


def test_what_was_made_from_a_stage_is_named_before_it_is_extended(tmp_path, of_4):
  workdir = shutil.copytree(of_4, tmp_path / 'workdir')
  for parent, child in ((OF_4, STUDENT), (STUDENT, LAST)):
    teacher = Model(parent, 'ema', 'a', parent.num_updates, 0.0, {})
    write_finished(workdir, child, Parents(teacher, teacher))
  (workdir / 'pairs').mkdir()
  (workdir / 'pairs' / 'pairs.json').write_text(json.dumps({'teacher': {'stage': 'base'}}))
  extending.check_configs(workdir, [OF_4, STUDENT, LAST], SHORT)
  before = tree_digest(workdir)
  with pytest.raises(UserError, match=r'from 4 to 8 updates: .* would be stale') as refused:
    extending.check_configs(workdir, [OF_8], LONG)
  for name in ('pairs', 'progressive_0002', 'progressive_0001'):
    assert str(workdir / name) in str(refused.value)
  assert tree_digest(workdir) == before and str(workdir / 'base') not in str(refused.value)
  other = tiny.config(train__num_updates=8, train__learning_rate=0.5)
  with pytest.raises(UserError, match=r'train\.learning_rate was'):
    extending.check_configs(workdir, [OF_8, STUDENT, LAST], other)
  rounds = tiny.config(train__num_updates=4, distill__num_updates=(8, 9))
  extending.check_configs(workdir, [OF_4, STUDENT], SHORT)
  with pytest.raises(
    UserError, match='progressive_0001 cannot be extended from 8 to 9 updates: no checkpoint'
  ):
    extending.check_configs(workdir, [OF_4, STUDENT, LAST], rounds)


def test_a_stage_without_an_optimizer_state_cannot_be_extended(tmp_path):
  write_finished(tmp_path, OF_4)
  with pytest.raises(
    UserError, match='base cannot be extended from 4 to 8 updates: no checkpoint is left'
  ):
    extending.check_configs(tmp_path, [OF_8], LONG)
  shutil.rmtree(tmp_path / 'base')
  params = sharding.to_host(OF_4.init_params(jax.random.key(0)))
  provenance.adopt(tmp_path, OF_4, params, SHORT, {'source': 'a test'})
  assert provenance.is_finished(tmp_path, OF_8)
  with pytest.raises(UserError, match='base cannot be extended from 4 to 8 updates: it was imported'):
    extending.check_configs(tmp_path, [OF_8], LONG)


@pytest.mark.slow
def test_a_run_is_refused_until_what_is_stale_is_gone_and_then_measures_again(finished, tmp_path):
  workdir = shutil.copytree(finished, tmp_path / 'workdir')
  rows = json.loads((workdir / 'results.json').read_text())['rows']
  command = [*tiny.flags(train__num_updates=16), f'--workdir={workdir}']
  before = tree_digest(workdir)
  code, _, err = tiny.run_cli(*command)
  assert code == 2 and 'stage base cannot be extended from 12 to 16' in err.splitlines()[-1], err
  assert tree_digest(workdir) == before
  for name in ('progressive_0002', 'progressive_0001'):
    shutil.rmtree(workdir / name)
  code, _, err = tiny.run_cli(*command)
  assert code == 0, err
  again = json.loads((workdir / 'results.json').read_text())['rows']
  assert {row['updates'] for row in again if row['stage'] == 'base'} == {16}
  assert len(again) == len(rows)
  assert not {row['digest'] for row in again} & {row['digest'] for row in rows}
