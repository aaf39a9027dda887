"""What a stage was made from, as its stage.json names it, and that it goes on only from that."""

import dataclasses
import json

import jax
import pytest

from diffusion_distillation.diffusion.discrete import Discrete
from diffusion_distillation.errors import StorageError, UserError
from diffusion_distillation.stages import provenance
from diffusion_distillation.stages.provenance import Model, Parents
from diffusion_distillation.system import sharding
from diffusion_distillation.system.checkpoints import Checkpoints
from tests import tiny
from tests.stages.students_test import plan

CONFIG = tiny.config()
BASE, STUDENT = tiny.plan()[0][:2]


def model_of(stage, digest):
  return Model(stage, 'ema', digest, stage.num_updates, 0.0, {})


@pytest.mark.parametrize('what', ['teacher', 'start', 'pairs', 'distance'])
def test_a_stage_that_came_from_something_else_is_refused(tmp_path, what):
  teacher = model_of(BASE, 'a')
  parents = Parents(teacher, teacher, 'p', 'd')
  provenance.begin_stage(tmp_path, STUDENT, parents, CONFIG)
  provenance.begin_stage(tmp_path, STUDENT, parents, CONFIG)
  other = model_of(BASE, 'b') if what in ('teacher', 'start') else 'other'
  key = 'parent' if what == 'teacher' else what
  with pytest.raises(UserError, match=rf'stage\.json: {key} is '):
    provenance.begin_stage(tmp_path, STUDENT, dataclasses.replace(parents, **{what: other}), CONFIG)


def test_a_stage_of_before_goes_on_where_a_field_that_it_lacks_has_its_default(tmp_path):
  stage = dataclasses.replace(BASE, schedule=Discrete(num_timesteps=2))
  path = tmp_path / 'base' / 'stage.json'
  provenance.begin_stage(tmp_path, stage, Parents(), CONFIG)
  found = json.loads(path.read_text())
  assert found['schedule'].pop('trained_betas') == []
  path.write_text(json.dumps(found))
  provenance.begin_stage(tmp_path, stage, Parents(), CONFIG)
  other = Discrete(num_timesteps=2, trained_betas=(0.1, 0.2))
  with pytest.raises(UserError, match=r'stage\.json: schedule is '):
    provenance.begin_stage(tmp_path, dataclasses.replace(stage, schedule=other), Parents(), CONFIG)


def test_an_import_that_fails_leaves_no_stage(tmp_path, monkeypatch):
  def full(*_):
    raise StorageError('the disk is full')

  params = sharding.to_host(BASE.init_params(jax.random.key(0)))
  with monkeypatch.context() as patch:
    patch.setattr(Checkpoints, 'save', full)
    with pytest.raises(StorageError):
      provenance.adopt(tmp_path, BASE, params, CONFIG, {'source': 'a test'})
  assert not (tmp_path / 'base' / 'stage.json').exists()


def test_an_imported_stage_is_finished_and_has_no_parents(tmp_path):
  params = sharding.to_host(BASE.init_params(jax.random.key(0)))
  model = provenance.adopt(tmp_path, BASE, params, CONFIG, {'source': 'a test'})
  found = json.loads((tmp_path / 'base' / 'stage.json').read_text())
  assert found['finished'] and found['digest'] == model.digest and found['parent'] is None
  assert provenance.load_model(tmp_path, BASE, CONFIG).digest == model.digest


def test_lineage_names_both_parents():
  model = Model(plan()['base'], 'ema', 'a', 1, 0.0, {})
  other = dataclasses.replace(model, stage=plan('knowledge')['knowledge'], digest='b')
  described = provenance.Parents(model, other, 'p').describe()
  assert described == {
    'parent': {'stage': 'base', 'weights': 'ema', 'digest': 'a'},
    'start': {'stage': 'knowledge', 'weights': 'ema', 'digest': 'b'},
    'pairs': 'p',
    'distance': None,
  }
  assert provenance.Parents(model).describe()['start'] is None  # new parameters


def test_dmd2_goes_on_under_the_name_it_had_before_and_dmd_not_under_that_of_dmd2(tmp_path):
  model, parents = plan('dmd2')['dmd2'], Parents()
  provenance.begin_stage(tmp_path, model, parents, CONFIG)
  path = tmp_path / 'dmd2' / 'stage.json'
  found = json.loads(path.read_text())
  assert found['method'] == 'dmd2'
  path.write_text(json.dumps(found | {'method': 'dmd'}))
  provenance.begin_stage(tmp_path, model, parents, CONFIG)
  provenance.begin_stage(tmp_path, plan('dmd')['dmd'], parents, CONFIG)
  path = tmp_path / 'dmd' / 'stage.json'
  path.write_text(json.dumps(json.loads(path.read_text()) | {'method': 'dmd2'}))
  with pytest.raises(UserError, match=r'stage\.json: method is dmd2, but this run needs dmd'):
    provenance.begin_stage(tmp_path, plan('dmd')['dmd'], parents, CONFIG)
