"""Stages of another run as the first of a new one."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from configs import default
from diffusion_distillation.diffusion import times
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import sampling
from diffusion_distillation.interop import importing
from diffusion_distillation.networks.conditioning import Classes
from diffusion_distillation.run import inputs, loop
from diffusion_distillation.stages import model, provenance
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.system.checkpoints import digest
from diffusion_distillation.system.files import read_json
from tests import tiny
from tests.interop.google_test import content, read_lineage, refused
from tests.stages.model_test import UNET, stored


@pytest.fixture
def config(finished):
  """The config of the finished run."""
  return workdirs.read_config(finished, default.get_config())


def overridden(config, **overrides):
  c = config.copy_and_resolve_references()
  c.update_from_flattened_dict({k.replace('__', '.'): v for k, v in overrides.items()})
  return c


@pytest.mark.parametrize('name', ['base', 'progressive_0002'])
def test_a_stage_of_another_run_is_imported_with_the_same_digest(finished, name, config, tmp_path):
  """Into a run with other rounds, too: only network and schedule have to be the same."""
  theirs = read_lineage(finished / name)
  other = overridden(config, distill__start_steps=16, train__num_updates=3, seed=4)
  adopted = importing.from_workdir(other, default.get_config(), finished / name, tmp_path / 'run')
  assert adopted.digest == theirs['digest']
  found = read_lineage(tmp_path / 'run' / name)
  assert found['digest'] == theirs['digest'] and found['finished'] and found['parent'] is None
  origin = {'source': 'workdir', 'file': str(finished / name), 'sha256': theirs['digest']}
  assert found['imported'] == origin
  of_run = workdirs.read_config(tmp_path / 'run', default.get_config())
  first, *rounds = workdirs.stored_plan(tmp_path / 'run', of_run)
  assert first.name == name and first.parent is None and rounds[0].parent == name
  assert provenance.load_model(tmp_path / 'run', first, of_run).digest == theirs['digest']
  history = read_json(tmp_path / 'run' / name / 'model' / 'model.json')['provenance']
  assert history['updates'] == 0 and history['imported']['sha256'] == theirs['digest']
  made = read_json(finished / name / 'model' / 'model.json')['provenance']
  assert history['imported']['provenance']['updates'] == made['updates'] > 0
  # What was done, not what this config would do; what is sampled from it says so, too.
  assert found['num_updates'] == theirs['num_updates'] != first.num_updates or name != 'base'
  loaded = provenance.load_model(tmp_path / 'run', first, of_run)
  shown = provenance.to_stored(tmp_path / 'run', loaded, of_run).provenance
  assert shown['updates'] == theirs['num_updates']


def test_an_imported_folder_keeps_its_provenance_however_often_it_moves(finished, config, tmp_path):
  first, second = tmp_path / 'first', tmp_path / 'second'
  other = overridden(config, train__num_updates=9)
  importing.from_model(other, default.get_config(), finished / 'progressive_0002' / 'model', first)
  importing.from_model(other, default.get_config(), first / 'base' / 'model', second)
  made, once, twice = (
    read_json(path / 'model' / 'model.json')['provenance']
    for path in (finished / 'progressive_0002', first / 'base', second / 'base')
  )
  assert once['imported']['provenance'] == made and twice['imported']['provenance'] == once
  assert once['updates'] == twice['updates'] == 0
  done = [read_lineage(path / 'base')['num_updates'] for path in (first, second)]
  assert done == [made['updates']] * 2 and made['updates'] < 9


@pytest.mark.parametrize(
  ('overrides', 'words'),
  [
    ({'model__ch': 16}, 'its network.ch is 8, but the config says 16'),
    ({'model__output': 'x'}, 'its output is v, but the config says x'),
    ({'schedule__logsnr_min': -15.0}, 'its schedule.logsnr_min is -20.0, but the config says -15.0'),
    ({'schedule__name': 'linear_beta'}, 'its schedule.name is Cosine, but the config says LinearBeta'),
  ],
)
def test_a_stage_of_another_model_is_refused(finished, overrides, words, config, tmp_path):
  other = overridden(config, **overrides)
  assert words in refused(other, finished / 'base', tmp_path / 'run', 'workdir')


def test_a_stage_with_a_number_of_steps_that_the_config_has_not_is_refused(finished, config, tmp_path):
  other = overridden(config, distill__start_steps=27, distill__factor=(3,))
  message = refused(other, finished / 'progressive_0002', tmp_path / 'run', 'workdir')
  assert 'distilled to 2 steps' in message and 'have 9, 3, 1;' in message


def test_an_unfinished_stage_is_refused(finished, config, tmp_path):
  theirs = shutil.copytree(finished, tmp_path / 'theirs')
  unfinished = {key: value for key, value in read_lineage(theirs / 'base').items() if key != 'digest'}
  (theirs / 'base' / 'stage.json').write_text(json.dumps(unfinished | {'finished': False}))
  assert 'not finished' in refused(config, theirs / 'base', tmp_path / 'run', 'workdir')
  shutil.rmtree(theirs / 'base' / 'checkpoints')
  assert 'not finished' in refused(config, theirs / 'base', tmp_path / 'run', 'workdir')


@pytest.mark.parametrize('place', ['.', 'report', 'none/base'])
def test_a_place_that_is_no_stage_is_refused(finished, place, config, tmp_path):
  assert 'stage.json' in refused(config, finished / place, tmp_path / 'run', 'workdir')


def test_a_stage_under_another_name_is_refused(finished, config, tmp_path):
  theirs = shutil.copytree(finished, tmp_path / 'theirs')
  (theirs / 'base').rename(theirs / 'mine')
  message = refused(config, theirs / 'mine', tmp_path / 'run', 'workdir')
  assert "'mine' is not one of ['base'" in message


def test_a_stage_of_another_run_is_not_imported_over_one_that_is_there(finished, config, tmp_path):
  path = shutil.copytree(finished, tmp_path / 'run')
  with pytest.raises(UserError, match='base already exists'):
    importing.from_workdir(config, default.get_config(), finished / 'base', path)
  assert content(path) == content(finished)


def test_a_network_from_elsewhere_is_computed_as_the_config_says(finished, config, tmp_path):
  importing.from_model(config, default.get_config(), finished / 'base' / 'model', tmp_path / 'run')
  computed = {'dtype': 'bfloat16', 'remat': True}
  changed = overridden(config, **{f'compute__{key}': value for key, value in computed.items()})
  for stage in workdirs.stored_plan(tmp_path / 'run', changed):
    network = stage.denoise.network
    assert {key: getattr(network, key) for key in computed} == computed


# What a reader found out that no config says.
OTHERWISE = {'times': 'karras', 'clip_x': False, 'cond_dropout': 0.1}
OTHERWISE |= {'class_names': ('cat', 'dog', 'hen'), 'label_counts': (5, 0, 7)}
WITHOUT_IMAGES = {'dataset__name': 'none', 'methods': ()}


def imported(path, **changes):
  """A workdir without images whose base came from elsewhere; its config, its plan, and the model that was read."""
  network = dataclasses.replace(UNET, num_classes=3)
  made = stored(network, provenance={'stage': 'base', 'updates': 7}, **OTHERWISE | changes)
  config = tiny.config(**WITHOUT_IMAGES)
  importing.adopt_stored(config, path, made, {'source': 'model', 'folder': 'elsewhere'})
  return config, workdirs.stored_plan(path, config), made


def test_what_a_reader_found_out_is_what_the_base_is_sampled_with(tmp_path):
  config, (base,), made = imported(tmp_path)
  loaded = provenance.load_model(tmp_path, base, config)
  in_later_runs = provenance.to_stored(tmp_path, loaded, config)
  loop.fit(None, base, inputs.Inputs(None), tmp_path, config)
  for found in (model.read(tmp_path / 'base' / 'model'), in_later_runs):
    assert {name: getattr(found, name) for name in OTHERWISE} == OTHERWISE
    assert (found.sampler, found.num_steps, found.digest) == (made.sampler, 4, digest(made.params))


@pytest.mark.parametrize('dropout', [0.1, 0.0])
def test_an_imported_base_is_sampled_as_its_files_say(tmp_path, monkeypatch, dropout):
  _, _, made = imported(tmp_path / 'run', cond_dropout=dropout)
  drawn = []

  def draw(self, params, grid, num_samples, seed, chosen=None, name=None):
    drawn.append((self.clip_x, grid.tolist(), chosen))
    return np.zeros((num_samples, 8, 8, 1), np.uint8)

  monkeypatch.setattr(sampling.Drawer, 'draw', draw)
  flags = ('--mode=sample', f'--workdir={tmp_path / "run"}', f'--out={tmp_path / "x.npz"}')
  code, _, err = tiny.run_cli(*flags, '--num_samples=2', '--classes=none')
  if not dropout:
    assert code == 2 and 'trained without label dropout' in err and not drawn
    return
  assert code == 0, err
  grid = times.make_grid('karras', 4, made.schedule).tolist()
  assert drawn == [(False, grid, {'label': [Classes.NONE]})]
