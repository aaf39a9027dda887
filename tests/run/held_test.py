"""What a run keeps in memory of the stages that it has finished, and what it reads again."""

import dataclasses
import gc
import json
import shutil
import weakref

import jax
import numpy as np
import pytest

from configs import default
from diffusion_distillation import cli, modes
from diffusion_distillation.errors import DamagedError
from diffusion_distillation.run import evaluating, inputs, loop
from diffusion_distillation.run import run as run_module
from diffusion_distillation.run.compared import Compared
from diffusion_distillation.stages import model as model_module
from diffusion_distillation.stages import provenance, trained
from diffusion_distillation.stages.trained import Model
from diffusion_distillation.system.checkpoints import digest
from tests import tiny
from tests.disasters import CONFIG, PLAN
from tests.interop.importing_test import imported

pytestmark = pytest.mark.slow

BASE = PLAN['base']
METHODS = {'methods': ('progressive', 'dmd'), 'distill__start_steps': 4, 'distill__from_weights': 'last'}
METHODS |= {
  'dmd__batch_size': 16,
  'dmd__num_updates': 10,
  'dmd__start': 'progressive_0001',
  'dmd__regression': 0.0,
}


@pytest.fixture
def workdir(finished, tmp_path):
  return shutil.copytree(finished, tmp_path / 'workdir')


def assert_same(tree, other):
  jax.tree.map(np.testing.assert_array_equal, tree, other)


class Weights(np.ndarray):
  """Arrays that can be watched."""


def test_only_what_a_later_stage_comes_from_is_in_memory(tmp_path, monkeypatch):
  """A run whose stages are not trained: which sets of weights are alive while each is, and in the evaluation."""
  config, (planned, images) = tiny.config(**METHODS), tiny.plan(**METHODS)
  made, alive = {}, {}

  def note(name):
    gc.collect()
    alive[name] = {of for of, array in made.items() if array() is not None}

  def fit(step, stage, given, *_):
    note(stage.name)
    sets = {}
    for weights in ('ema', 'last'):
      sets[weights] = np.zeros(3).view(Weights)
      made[stage.name, weights] = weakref.ref(sets[weights])
    return Model(stage, 'ema', 'a', stage.num_updates, 0.0, sets, {'ema': 'a', 'last': 'b'})

  monkeypatch.setattr(run_module, 'fit', fit)
  monkeypatch.setattr(run_module.monitor, 'watches', lambda *_: False)
  monkeypatch.setattr(run_module.forecast, 'work_after', lambda *_: {})
  distances = dict.fromkeys(PLAN | {'dmd': None})
  real = Compared(config, images, None)
  run_module._train(
    config, tmp_path, planned, set(), images, images, distances, None, real, lambda: None
  )
  note('evaluation')
  base, two, one, dmd = (stage.name for stage in planned)
  parent, start = planned[-1].parent, planned[-1].start
  assert (parent, start) == (base, one)
  assert alive == {
    base: set(),
    two: {(base, 'ema'), (base, 'last')},  # the first teaches dmd, too
    one: {(base, 'ema'), (two, 'last')},
    dmd: {(base, 'ema'), (one, 'ema')},
    'evaluation': set(),
  }


def test_an_evaluation_by_itself_holds_no_weights(workdir, monkeypatch):
  """Those of one stage are in memory while it is read and checked, and none of them when the evaluation begins."""
  made, alive = {}, {}

  def note(name):
    gc.collect()
    alive[name] = {of for of, array in made.items() if array() is not None}

  def load_model(directory, stage, config, weights):
    note(stage.name)
    array = np.zeros(3).view(Weights)
    made[stage.name] = weakref.ref(array)
    return Model(stage, 'ema', 'a', stage.num_updates, 0.0, {'ema': array})

  monkeypatch.setattr(modes.provenance, 'load_model', load_model)
  monkeypatch.setattr(evaluating.measure, 'evaluate', lambda *_, **__: note('evaluation'))
  monkeypatch.setattr('diffusion_distillation.system.interrupts.install', lambda: None)
  options = cli.Options(mode='evaluate', config=None, default=default.get_config(), workdir=workdir)
  assert cli.run(options) == 0
  assert alive == {name: set() for name in [*PLAN, 'evaluation']}


def test_what_is_not_held_is_read_where_it_is_asked_for(workdir):
  model = loop.fit(None, BASE, inputs.Inputs(None), workdir, CONFIG)
  assert list(model.all.held) == ['ema'] and list(model.all) == list(BASE.weights)
  nothing = provenance.release(workdir, model, ())
  assert not nothing.all.held
  assert_same(nothing.params, model.params)
  last = nothing.use('last')
  assert digest(last.params) == last.digest != model.digest and not last.all.held
  assert list(last.hold().all) == ['last']
  shutil.rmtree(workdir / 'base' / 'checkpoints')
  with pytest.raises(
    DamagedError, match="no complete checkpoint is left to read the weights 'last' from"
  ):
    _ = last.params


def test_a_finished_stage_is_read_from_its_folder_and_hashed_once(workdir, monkeypatch):
  hashed, expected = [], json.loads((workdir / 'base' / 'stage.json').read_text())['digest']
  for module in (model_module, trained):
    monkeypatch.setattr(module, 'digest', lambda tree: hashed.append(tree) or digest(tree))
  shutil.rmtree(workdir / 'base' / 'checkpoints')
  assert loop.fit(None, BASE, inputs.Inputs(None), workdir, CONFIG).digest == expected
  assert len(hashed) == 1


def test_a_finished_stage_whose_folder_is_damaged_has_it_written_again(workdir, caplog):
  weights = workdir / 'base' / 'model' / 'weights.safetensors'
  whole = weights.read_bytes()
  weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
  loop.fit(None, BASE, inputs.Inputs(None), workdir, CONFIG)
  assert weights.read_bytes() == whole and 'the last checkpoint is used' in caplog.text


def test_an_imported_base_whose_folder_is_damaged_keeps_all_that_it_said(tmp_path, caplog):
  config, _, _ = imported(tmp_path)
  weights, description = (
    tmp_path / 'base' / 'model' / name for name in ('weights.safetensors', 'model.json')
  )
  whole, said = weights.read_bytes(), json.loads(description.read_text())
  weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
  run_module.run(config, tmp_path)
  assert weights.read_bytes() == whole and 'the last checkpoint is used' in caplog.text
  assert json.loads(description.read_text()) == said and said['provenance']['imported']


def test_a_stage_that_an_older_version_finished_has_the_same_weights(workdir):
  """Its stage.json names no digests but that of its average."""
  path = workdir / 'base' / 'stage.json'
  found = json.loads(path.read_text())
  del found['digests']
  path.write_text(json.dumps(found))
  model = loop.fit(None, dataclasses.replace(BASE), inputs.Inputs(None), workdir, CONFIG)
  last = model.use('last')
  assert last.digest == digest(last.params)
