"""A model's folder: what is written comes back, and nothing else does."""

import json
import os
import pathlib
import shutil

import jax
import pytest

from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.stages import model
from diffusion_distillation.stages.model import DESCRIPTION, WEIGHTS, StoredModel
from diffusion_distillation.system import sharding
from diffusion_distillation.system.checkpoints import digest
from tests import tiny

BASE = tiny.plan()[0][0]


def stored(seed=0, **changes):
  """A model of the tiny base with new parameters."""
  fields = {'denoise': BASE.denoise, 'schedule': BASE.schedule, 'space': BASE.space}
  fields |= {'image_shape': BASE.image_shape, 'sampler': 'ddim', 'num_steps': 4}
  params = sharding.to_host(BASE.init_params(jax.random.key(seed)))
  return StoredModel(params=params, **fields | changes)


@pytest.fixture
def folder(tmp_path):
  model.write(tmp_path / 'model', stored())
  return tmp_path / 'model'


def test_a_model_comes_back_as_it_was_written(tmp_path):
  how = {'sampler': 'heun', 'num_steps': 7, 'times': 'karras', 'clip_x': False, 'cond_dropout': 0.25}
  written = stored(provenance={'stage': 'base', 'updates': 3}, metrics=({'value': 1.5},), **how)
  model.write(tmp_path / 'model', written)
  found = model.read(tmp_path / 'model')
  for name in (
    'denoise',
    'schedule',
    'space',
    'image_shape',
    'class_names',
    'provenance',
    'metrics',
    *how,
  ):
    assert getattr(found, name) == getattr(written, name), name
  assert digest(found.params) == digest(written.params)
  assert model.read(tmp_path / 'model', weights=False).params is None


def test_weights_of_another_model_are_noticed(folder, tmp_path):
  model.write(tmp_path / 'other', stored(seed=1))
  shutil.copy(tmp_path / 'other' / WEIGHTS, folder / WEIGHTS)
  with pytest.raises(DamagedError, match='its digest differs'):
    model.read(folder)


def test_weights_that_are_cut_short_or_missing_are_noticed(folder):
  path = folder / WEIGHTS
  path.write_bytes(path.read_bytes()[:-4])
  with pytest.raises(DamagedError, match='is damaged'):
    model.read(folder)
  path.unlink()
  with pytest.raises(DamagedError, match='is missing'):
    model.read(folder)


def test_what_this_version_does_not_know_is_refused(folder):
  path = folder / DESCRIPTION
  described = json.loads(path.read_text())
  for change in ({'guidance': 2.0}, {'format': 2}):
    path.write_text(json.dumps(described | change))
    with pytest.raises(UserError, match='not known to this version'):
      model.read(folder)
  path.write_text(json.dumps({key: value for key, value in described.items() if key != 'sampler'}))
  with pytest.raises(DamagedError, match="no 'sampler' in it"):
    model.read(folder)


def test_a_folder_has_its_name_when_it_is_whole(tmp_path, monkeypatch):
  contents, replace = [], os.replace

  def watched(source, target):
    if pathlib.Path(target) == tmp_path / 'model':
      contents.append({path.name for path in pathlib.Path(source).iterdir()})
    replace(source, target)

  monkeypatch.setattr(os, 'replace', watched)
  model.write(tmp_path / 'model', stored())
  assert contents == [{DESCRIPTION, WEIGHTS}]


def test_other_weights_take_the_place_of_those_there_and_the_same_leave_all_as_it_is(folder):
  model.add_metrics(folder, [{'value': 2.0}])
  before = (folder / DESCRIPTION).read_bytes()
  model.write(folder, stored())
  assert (folder / DESCRIPTION).read_bytes() == before
  model.write(folder, stored(seed=1))
  assert digest(model.read(folder).params) == digest(stored(seed=1).params)
