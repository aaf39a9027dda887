"""Models as folders: they are written whole or not at all, and only where something changed."""

import dataclasses

import pytest
import safetensors
import safetensors.numpy

from diffusion_distillation.networks import NETWORKS
from diffusion_distillation.stages import model
from diffusion_distillation.system import files
from tests.networks.denoiser_test import Small
from tests.stages.model_test import MODELS, assert_equal, content, refused, stored


@pytest.fixture(autouse=True)
def _small_is_a_network(monkeypatch):
  monkeypatch.setitem(NETWORKS, 'small', Small)


@pytest.fixture
def folder(tmp_path):
  """The folder of a conditional model."""
  model.write(tmp_path / 'model', MODELS['conditional']())
  return tmp_path / 'model'


class Killed(BaseException):
  """In place of a kill."""


def killing(function, calls):
  """The function, which does not return from its call number `calls`, and does nothing then."""
  count = iter(range(calls + 1))

  def call(*args, **kwargs):
    if next(count) == calls:
      raise Killed
    return function(*args, **kwargs)

  return call


def half_removed(path, **kwargs):
  """shutil.rmtree, killed after the first of a directory's files."""
  if path.is_dir():
    next(path.iterdir()).unlink()
    raise Killed


# Of what `write` calls: the function that the process dies in, and in which call of it.
DEATHS = [
  (safetensors.numpy, 'save_file', 0),
  (model.files, 'write_json', 0),
  (model.os, 'replace', 0),
  (model.os, 'replace', 1),
  (model.shutil, 'rmtree', 1),
]


@pytest.mark.parametrize('before', [False, True])
@pytest.mark.parametrize(('owner', 'name', 'calls'), DEATHS)
def test_a_folder_is_written_whole_or_not_at_all(owner, name, calls, before, tmp_path, monkeypatch):
  """Where another model is there before, it is replaced: it is whole or gone, too."""
  old, new = MODELS['conditional'](seed=1), MODELS['conditional']()
  if before:
    model.write(tmp_path / 'model', old)
  with monkeypatch.context() as patch:
    patch.setattr(owner, name, killing(getattr(owner, name), calls))
    with pytest.raises(Killed):
      model.write(tmp_path / 'model', new)
  if (tmp_path / 'model').exists():
    assert before
    assert_equal(model.read(tmp_path / 'model'), old)
  model.write(tmp_path / 'model', new)
  assert_equal(model.read(tmp_path / 'model'), new)
  assert [path.name for path in tmp_path.iterdir()] == ['model']


def test_a_folder_that_was_being_removed_is_refused_and_written_again(folder, monkeypatch):
  new = MODELS['conditional'](seed=1)
  with monkeypatch.context() as patch:
    patch.setattr(model.shutil, 'rmtree', half_removed)
    with pytest.raises(Killed):
      model.write(folder, new)
  refused(folder)
  model.write(folder, new)
  assert_equal(model.read(folder), new)


def test_the_same_model_is_not_written_again(folder):
  before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
  model.write(folder, MODELS['conditional']())
  assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
  model.write(folder, MODELS['conditional'](seed=1))
  assert_equal(model.read(folder), MODELS['conditional'](seed=1))


def test_how_a_model_is_sampled_may_change_under_the_same_weights(folder):
  model.add_metrics(folder, [{'value': 1.0}])
  weights = (folder / model.WEIGHTS).stat().st_mtime_ns
  changed = dataclasses.replace(MODELS['conditional'](), clip_x=False, provenance={'updates': 0})
  model.write(folder, changed)
  found = model.read(folder)
  assert found.clip_x is False and found.metrics == ({'value': 1.0},)
  assert found.provenance == MODELS['conditional']().provenance
  assert (folder / model.WEIGHTS).stat().st_mtime_ns == weights


def test_a_process_that_only_reads_writes_nothing(folder, monkeypatch):
  before = content(folder)
  monkeypatch.setattr(files, 'writes', lambda: False)
  model.write(folder, MODELS['conditional'](seed=1))
  model.write(folder.with_name('other'), MODELS['conditional']())
  model.add_metrics(folder, [{'value': 2.0}])
  assert content(folder) == before and not folder.with_name('other').exists()


def test_a_network_that_is_in_no_table_is_not_written(tmp_path, monkeypatch):
  monkeypatch.delitem(NETWORKS, 'small')
  with pytest.raises(ValueError, match='Small is not in the table of unet'):
    model.write(tmp_path / 'model', stored(Small(1)))
  assert not (tmp_path / 'model').exists()
