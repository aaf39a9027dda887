"""Models that are loaded: found, sampled from as drawers do, and called as denoisers."""

import json
import os
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffusion_distillation
from diffusion_distillation.diffusion import samplers, times
from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.evaluation import loading
from diffusion_distillation.evaluation.loading import LoadedModel, load
from diffusion_distillation.evaluation.sampling import Drawer
from diffusion_distillation.networks import NETWORKS
from diffusion_distillation.stages import model, model_folders
from tests.evaluation.sampling_test import assert_same_images
from tests.networks.denoiser_test import Small
from tests.stages.model_test import stored

MODELS = {
  'unconditional': stored(Small(1), num_steps=3),
  'conditional': stored(
    Small(1, num_classes=3), sampler='multistep_consistency', num_steps=2, clip_x=False, times='karras'
  ),
}


@pytest.fixture(autouse=True)
def _small_is_a_network(monkeypatch):
  monkeypatch.setitem(NETWORKS, 'small', Small)


@pytest.fixture(params=MODELS)
def loaded(request, tmp_path):
  """A model that was written and read again."""
  model.write(tmp_path / 'model', MODELS[request.param])
  return load(tmp_path / 'model')


@pytest.fixture
def conditional():
  return LoadedModel(MODELS['conditional'])


@pytest.fixture
def unconditional():
  return LoadedModel(MODELS['unconditional'])


def drawer(of, sampler=None, batch_size=20):
  """By the arguments of the stored model alone."""
  step = samplers.SAMPLERS[sampler or of.sampler]()
  shape, clip = of.image_shape, of.clip_x
  return Drawer(of.denoise, step, of.schedule, of.space, shape, batch_size, clip)


def grid(of, steps=None):
  return times.make_grid(of.times, steps or of.num_steps, of.schedule)


def test_sample_draws_what_a_drawer_draws(loaded):
  of = loaded.stored
  images = loaded.sample(20, seed=5)
  assert images.shape == (20, 8, 8, 1) and images.dtype == np.uint8
  np.testing.assert_array_equal(images, drawer(of).draw(of.params, grid(of), 20, 5))
  assert len({image.tobytes() for image in images}) == 20
  assert (loaded.sample(20, seed=6) != images).any(axis=(1, 2, 3)).all()


def test_sample_k_alone_is_sample_k_of_a_batch(loaded, monkeypatch):
  of, images = loaded.stored, loaded.sample(20, seed=5)
  assert_same_images(loaded.sample(3, seed=5), images[:3])
  monkeypatch.setattr(loading, '_BATCH', 8)
  assert_same_images(loaded.sample(20, seed=5), images)
  for k in (0, 7, 19):
    _, x, _ = drawer(of).pairs(of.params, grid(of), 5, np.array([k]))
    assert_same_images(np.asarray(of.space.decode(jnp.asarray(x))), images[k : k + 1])


def test_labels_are_drawn_in_turn_and_by_default_all_of_them(conditional):
  usual = conditional.sample(6)
  np.testing.assert_array_equal(conditional.sample(6, labels=[0, 1, 2]), usual)
  np.testing.assert_array_equal(conditional.sample(6, labels=np.array([0, 1, 2])), usual)
  chosen = conditional.sample(6, labels=[2, 1, -1])
  same = (chosen == usual).all(axis=(1, 2, 3))
  assert same.tolist() == [k % 3 == 1 for k in range(6)]
  of = conditional.stored
  expected = drawer(of).draw(of.params, grid(of), 6, 0, {'label': [2, 1, -1]})
  assert_same_images(chosen, expected)


@pytest.mark.parametrize('labels', [[3], [0, -2], [], np.array([0, 7])])
def test_labels_that_the_model_does_not_know_are_refused(conditional, labels):
  with pytest.raises(UserError, match=r'must be in 0 \.\.\. 2, or -1 for no class'):
    conditional.sample(2, labels=labels)


def test_an_unconditional_model_refuses_labels(unconditional):
  with pytest.raises(UserError, match=r'labels=\[0\], but the model is unconditional'):
    unconditional.sample(2, labels=[0])


def test_steps_and_sampler_are_those_of_the_model_unless_they_are_given(unconditional):
  of, usual = unconditional.stored, unconditional.sample(8)
  np.testing.assert_array_equal(unconditional.sample(8, steps=3, sampler='ddim'), usual)
  for arguments in ({'steps': 2}, {'sampler': 'heun'}, {'steps': 4, 'sampler': 'ancestral'}):
    found = unconditional.sample(8, **arguments)
    draw = drawer(of, arguments.get('sampler'))
    assert_same_images(found, draw.draw(of.params, grid(of, arguments.get('steps')), 8, 0))
    assert (found != usual).any(axis=(1, 2, 3)).all()


@pytest.mark.parametrize(
  ('arguments', 'words'),
  [
    ({'num_samples': 0}, 'num_samples=0 and steps=None must be positive'),
    ({'num_samples': 2, 'steps': 0}, 'steps=0 must be positive'),
    ({'num_samples': 2, 'steps': -1}, 'steps=-1 must be positive'),
    ({'num_samples': 2, 'sampler': 'huen'}, "sampler='huen' is not one of .*did you mean 'heun'"),
    ({'num_samples': 2, 'seed': -1}, 'seed=-1 must be zero or more'),
    ({'num_samples': 2, 'seed': 2**31}, r'seed=2147483648 must be zero or more, and below 2\^31'),
  ],
)
def test_arguments_that_mean_nothing_are_one_clear_line(unconditional, arguments, words):
  with pytest.raises(UserError, match=words) as caught:
    unconditional.sample(**arguments)
  assert '\n' not in str(caught.value)


def test_a_grid_that_the_schedule_does_not_have_is_one_clear_line():
  impossible = stored(Small(1), times='leading', num_steps=5000)
  with pytest.raises(UserError, match='times=leading: '):
    LoadedModel(impossible).sample(1)


def test_denoise_is_the_stored_denoiser(loaded):
  of, z = loaded.stored, jax.random.normal(jax.random.key(0), (4, 8, 8, 1))
  logsnr = jnp.array([-3.0, 0.0, 1.0, 5.0])
  cond = {'label': jnp.array([0, 2, 1, -1])} if of.denoise.conditioning else None
  found, expected = loaded.denoise(z, logsnr, cond), of.denoise(of.params, z, logsnr, cond)
  jax.tree.map(np.testing.assert_array_equal, found, expected)
  assert found.x.shape == found.eps.shape == z.shape
  alpha, sigma = (np.sqrt(1 / (1 + np.exp(s * logsnr)))[:, None, None, None] for s in (-1, 1))
  np.testing.assert_allclose(alpha * found.x + sigma * found.eps, z, atol=1e-4)


def folders(workdir, *names):
  """Models of stages, written one after the other; each has as many steps as its place."""
  for place, name in enumerate(names, start=1):
    folder = workdir / name / 'model'
    model.write(folder, stored(Small(1), num_steps=place))
    os.utime(folder / model.DESCRIPTION, ns=(place * 10**9, place * 10**9))


def test_a_model_is_found_in_its_folder_its_stage_and_as_the_last_of_a_workdir(tmp_path, monkeypatch):
  folders(tmp_path, 'base', 'progressive_0002', 'dmd')
  found = {place: load(tmp_path / place).stored.num_steps for place in ('base', 'base/model', '', 'dmd')}
  assert found == {'base': 1, 'base/model': 1, '': 3, 'dmd': 3}
  assert diffusion_distillation.load(str(tmp_path)).stored.num_steps == 3
  monkeypatch.setenv('HOME', str(tmp_path))
  assert load('~/progressive_0002').stored.num_steps == 2


def test_the_last_stage_of_a_workdir_is_that_of_its_plan_whatever_the_times_of_its_files(tmp_path):
  folders(tmp_path, 'dmd', 'progressive_0001', 'progressive_0016', 'gone', 'base')  # base is the newest
  config = tmp_path / 'config.json'
  for methods, last in ((['progressive', 'dmd'], 1), (['dmd', 'progressive'], 2), (['progressive'], 2)):
    config.write_text(json.dumps({'methods': methods}))
    assert load(tmp_path).stored.num_steps == last
  for damaged in ('{', '[]', '{"methods": 3}'):
    config.write_text(damaged)
    assert model_folders.find(tmp_path) == tmp_path / 'gone' / 'model'


@pytest.mark.parametrize('place', ['', 'none', 'file'])
def test_where_there_is_no_model_it_says_so(tmp_path, place):
  (tmp_path / 'file').write_text('no model')
  with pytest.raises(UserError, match=r'holds no model: there is no model\.json') as caught:
    load(tmp_path / place)
  assert str(tmp_path / place) in str(caught.value) and '\n' not in str(caught.value)


def test_a_damaged_model_is_not_loaded_and_none_stands_in_for_it(tmp_path):
  folders(tmp_path, 'base', 'dmd')
  (tmp_path / 'dmd' / 'model' / model.WEIGHTS).unlink()
  with pytest.raises(DamagedError, match=r'dmd/model/weights\.safetensors is missing'):
    load(tmp_path)
  shutil.rmtree(tmp_path / 'dmd')
  assert load(tmp_path).stored.num_steps == 1


def test_the_package_offers_what_its_documentation_names():
  assert diffusion_distillation.load is load and diffusion_distillation.LoadedModel is LoadedModel
  assert set(diffusion_distillation.__all__) == {'load', 'LoadedModel', 'get_config', 'train'}
  with pytest.raises(AttributeError, match="no attribute 'laod'"):
    _ = diffusion_distillation.laod
