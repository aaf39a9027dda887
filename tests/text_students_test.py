"""Students of a model of latents and texts: every method is planned, trained, resumed, and drawn from."""

import contextlib
import dataclasses
import importlib
import pathlib
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image

from diffusion_distillation import datasets
from diffusion_distillation.config import flatten
from diffusion_distillation.datasets.prompts import Prompts
from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.guidance import make_guidance
from diffusion_distillation.diffusion.samplers import DDIM
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import sampling
from diffusion_distillation.evaluation.loading import LoadedModel
from diffusion_distillation.interop import importing
from diffusion_distillation.methods import METHODS, distances
from diffusion_distillation.networks import classifier
from diffusion_distillation.run import encoding, evaluating, inputs, monitor, pairs
from diffusion_distillation.run import run as runs
from diffusion_distillation.stages import workdir
from diffusion_distillation.stages.plan import plan
from diffusion_distillation.stages.provenance import Model
from tests import text_model, tiny

NO_GAN = {'dmd2__gan_generator': 0.0, 'dmd2__gan_fake': 0.0}
GUIDED = {'pairs__guidance': 2.0, 'dmd__guidance': 2.0}
STUDENTS = [name for name in METHODS if name != 'denoising']


def planned(**changes):
  """The stages of a config, without a workdir."""
  stored = text_model.stored()
  c = text_model.config('prompts.txt', **changes)
  return plan(c, stored.image_shape, 0, workdir.origin_of(stored))


@pytest.fixture(scope='module')
def texts(tmp_path_factory):
  """The encoded prompts."""
  return encoding.ensure(tmp_path_factory.mktemp('texts'), CAPTIONS, text_model.stored(), 'float32')


CAPTIONS = Prompts('prompts', text_model.PROMPTS, 'identity')


def base(stage):
  stored = text_model.stored()
  return Model(stage, 'ema', 'digest', 1, 0.0, {'ema': stored.params})


@pytest.mark.parametrize('name', STUDENTS)
def test_every_method_makes_a_student_that_works_on_latents_and_takes_the_text(name):
  stage = planned(methods=(name,))[-1]
  assert stage.recipe.shape == (8, *text_model.LATENT) and stage.image_shape == text_model.IMAGE
  batch = inputs.shapes(stage, 8)
  known = batch.get('pairs', batch)['cond']
  assert known['text'].shape == known['no_text'].shape == (8, 6, 8)
  assert ('x' in batch) == ('images' in stage.recipe.method.needs) and 'image' not in batch
  assert 'text' in stage.denoise.conditioning and stage.text == text_model.stored().text


def test_batches_continue_where_they_were_interrupted_and_do_not_depend_on_their_size(texts):
  stage = planned(methods=('dmd',), **GUIDED)[-1]
  given = inputs.Inputs(None, texts=texts)

  def batches(done, stage=stage):
    with contextlib.closing(given.batches(stage, done)) as found:
      return [batch['cond'] for batch in found]

  without = dataclasses.replace(
    stage.recipe, method=dataclasses.replace(stage.recipe.method, regression=0.0)
  )
  stage = dataclasses.replace(stage, recipe=without)
  every, rest = batches(0, stage), batches(2, stage)
  assert len(every) == 4 and set(every[0]) == {'text', 'no_text'}
  for expected, found in zip(every[2:], rest, strict=True):
    np.testing.assert_array_equal(found['text'], expected['text'])
  halved = dataclasses.replace(stage, recipe=dataclasses.replace(without, shape=(4, *text_model.LATENT)))
  small = batches(0, halved)
  together = np.concatenate([small[0]['text'], small[1]['text']])
  np.testing.assert_array_equal(together, every[0]['text'])
  np.testing.assert_array_equal(every[0]['no_text'][3], texts.no_text)


@pytest.mark.slow
def test_pairs_are_latents_of_the_guided_teacher_and_each_has_a_text_of_its_own(texts, tmp_path):
  stage = planned(methods=('dmd',), **GUIDED)[-1]
  teacher = base(planned(methods=())[0])
  stored = pairs.ensure(tmp_path, stage.pairs, teacher, texts)
  found = stored.read(np.array([9, 2]))
  assert found['image'].shape == found['noise'].shape == (2, *text_model.LATENT)
  np.testing.assert_array_equal(
    found['cond']['text'], texts.draw(np.array([9, 2]), stage.pairs.seed)['text']
  )
  columns = np.load(tmp_path / 'pairs' / '00000.npy').dtype.names
  assert columns == ('noise', 'image', 'prompt')
  model, weight = text_model.stored(), 2.0
  z = jnp.asarray(found['noise'])
  cond, logsnr = found['cond'], model.schedule(jnp.asarray([1.0, 0.5]))
  for k, at in enumerate(logsnr):  # two guided DDIM steps by hand
    here = jnp.full(2, at)
    told, blank = (
      model.denoise(model.params, z, here, {'text': cond[key]}) for key in ('text', 'no_text')
    )
    x, eps = (a + weight * (a - b) for a, b in zip(told, blank, strict=True))
    to = jnp.asarray(np.inf) if k else logsnr[1]
    z = jnp.sqrt(jax.nn.sigmoid(to)) * x + jnp.sqrt(jax.nn.sigmoid(-to)) * eps
  np.testing.assert_allclose(found['image'], z, rtol=1e-4, atol=1e-4)
  other = encoding.ensure(tmp_path / 'half', CAPTIONS, text_model.stored(), 'float16')
  with pytest.raises(UserError, match='these pairs do not belong to this run: texts was'):
    pairs.ensure(tmp_path, stage.pairs, teacher, other)


def test_a_sample_alone_is_the_one_in_a_batch(texts):
  stored = text_model.stored()
  drawer = sampling.Drawer(
    denoise=stored.denoise,
    sampler=DDIM(),
    schedule=stored.schedule,
    space=stored.space,
    image_shape=stored.image_shape,
    batch_size=8,
    clip_x=False,
    guidance=make_guidance(2.0),
    texts=texts,
  )
  grid = times.uniform(2)
  _, together, _ = drawer.pairs(stored.params, grid, 3, np.arange(8))
  _, alone, _ = drawer.pairs(stored.params, grid, 3, np.array([5]))
  np.testing.assert_allclose(alone[0], together[5], rtol=1e-5, atol=1e-5)
  without = dataclasses.replace(drawer, texts=None)
  with pytest.raises(UserError, match='this model draws what a text says'):
    without.pairs(stored.params, grid, 3, np.arange(8))


def test_what_a_run_lacks_is_one_line_before_anything_is_encoded(tmp_path, monkeypatch):
  monkeypatch.setattr(encoding, 'ensure', None)
  stages = planned(methods=('dmd2',))
  c = text_model.config('prompts.txt', methods=('dmd2',))
  with pytest.raises(
    UserError, match=r'stage dmd2 is trained on images; .* dmd2\.gan_generator=0 and dmd2\.gan_fake=0'
  ):
    runs._check_needs(c, stages, {'base'}, None, CAPTIONS)
  runs._check_needs(c, planned(methods=('dmd2',), **NO_GAN), {'base'}, None, CAPTIONS)
  with pytest.raises(UserError, match=r'dataset\.name=prompts: .* holds no imported model that draws'):
    workdir.open_captions(tmp_path, c)
  c.dataset.name = 'none'
  with pytest.raises(
    UserError, match=r'stage dmd2 is trained on texts, and dataset\.name=none has none'
  ):
    runs._check_needs(c, planned(methods=('dmd2',), **NO_GAN), {'base'}, None, None)


def test_a_student_of_texts_has_the_network_of_its_teacher():
  with pytest.raises(
    UserError, match=r'student\.output: a student of a model that draws what a text says has the network'
  ):
    planned(methods=('dmd',), student__output='v')


def test_a_run_with_other_prompts_is_refused(tmp_path):
  directory, c = text_model.begin(tmp_path)
  captions = workdir.open_captions(directory, c)
  workdir.claim_images(directory, captions)
  workdir.plan_for(directory, c)
  pathlib.Path(c.dataset.path).write_text('a red circle\nblue\n')
  with pytest.raises(UserError, match='this run began with other prompts: 5, now 2'):
    workdir.plan_for(directory, c)


def test_distances_of_images_decode_and_others_do_not(tmp_path):
  stages = {
    name: planned(methods=('dmd',), dmd__distance=name)[-1] for name in ('l2', 'lpips', 'features')
  }
  decoded = {
    name: isinstance(stage.recipe.networks['distance'].distance, distances.Decoded)
    for name, stage in stages.items()
  }
  assert decoded == {'l2': False, 'lpips': True, 'features': True}
  of_classifier = {
    name: np.zeros(shape, np.float32) for name, shape in classifier.shapes(2, text_model.IMAGE).items()
  }
  safetensors.numpy.save_file(of_classifier, tmp_path / 'x.safetensors')
  stage = dataclasses.replace(stages['features'], distance_weights=str(tmp_path / 'x.safetensors'))
  found = inputs.load_distance(stage)
  assert found['decoder'] is stage.space.weights() and set(found) == {'decoder', 'distance'}
  assert inputs.load_distance(stages['l2']) is None
  with pytest.raises(UserError, match=r'dmd\.distance_weights='):
    inputs.load_distance(stages['lpips'])


# The scale of guidance in diffusers' convention, updates and examples (Yin et al. 2023, section 4.3; DMD2's released code).
PUBLISHED = {
  'sd15_dmd.py': ('dmd', 3.0, 20_000, 2304, 1),
  'sd15_dmd.py:guidance_8': ('dmd', 8.0, 165_000, 2304, 1),
  'sd15_dmd2.py': ('dmd2', 1.75, 40_000, 2048, 10),
  'sd15_dmd2.py:four_steps': ('dmd2', 1.75, 40_000, 2048, 10),
}


@pytest.mark.slow
@pytest.mark.parametrize('name', PUBLISHED)
def test_the_configs_have_the_published_settings_and_are_planned_for_an_imported_model(name, tmp_path):
  method, scale, updates, examples, fake_updates = PUBLISHED[name]
  file, _, variant = name.partition(':')
  c = importlib.import_module(f'configs.{file.removesuffix(".py")}').get_config(variant)
  section = c[method]
  assert section.guidance == scale - 1.0 and (section.num_updates, section.batch_size) == (
    updates,
    examples,
  )
  assert (
    section.fake_updates == fake_updates and section.learning_rate == section.fake_learning_rate == 1e-5
  )
  assert (section.weight_decay, section.clip_norm, section.warmup) == (0.01, 10.0, 500)
  if name == 'sd15_dmd2.py':
    return
  if method == 'dmd':
    assert c.pairs.guidance == section.guidance and section.regression == 0.25
  c.dataset.path = str(text_model.write_prompts(tmp_path / 'prompts.txt'))
  importing.adopt_stored(
    c, tmp_path / 'run', text_model.stored(), {'source': 'test', 'folder': 'nowhere'}
  )
  flags = ['--mode=plan', f'--config=configs/{name}', f'--workdir={tmp_path / "run"}']
  flags += [f'--config.dataset.path={c.dataset.path}', '--config.compute.device_gb=0.001']
  code, _, err = tiny.run_cli(*flags)
  assert code == 0, err
  assert f'{updates:,} updates of {examples} images' in err and '5 prompts of prompts' in err
  assert f'{method:<25}fits ' in err and f'{method}.micro_batches=' in err


@pytest.mark.parametrize('name', [name for name in PUBLISHED if ':' in name])
def test_the_variants_with_adapters_have_the_settings_of_those_without_except_for_size_and_rates(name):
  file, _, variant = name.partition(':')
  module = importlib.import_module(f'configs.{file.removesuffix(".py")}')
  for with_it, without in ((f'{variant},lora', variant), (f'lora,{variant}', variant), ('lora', '')):
    found, other = (dict(flatten(module.get_config(of))) for of in (with_it, without))
    sections = {key.rpartition('.') for key, value in found.items() if value != other[key]}
    method = PUBLISHED[name][0]
    sizes = {'batch_size', 'micro_batches', 'learning_rate', 'fake_learning_rate', 'num_updates'}
    for section, _, key in sections - {('lora', '.', 'rank'), ('pairs', '.', 'num_pairs')}:
      assert section == method and key in sizes
    assert found['lora.rank'] == 64 and found[f'{method}.batch_size'] == 64


@pytest.mark.parametrize(('name', 'known'), [('sd15_dmd', 'guidance_8'), ('sd15_dmd2', 'four_steps')])
def test_a_variant_that_is_not_known_is_one_line(name, known):
  with pytest.raises(
    UserError, match=f'config variant :fast is not known; leave it out, or choose :{known} or :lora'
  ):
    importlib.import_module(f'configs.{name}').get_config('fast')


@pytest.mark.slow
def test_samples_of_prompts_are_watched_and_compared_with_the_pairs(texts, tmp_path):
  c = text_model.config('prompts.txt', methods=('dmd',), **GUIDED)
  stage = dataclasses.replace(planned(methods=('dmd',), **GUIDED)[-1], num_updates=100)
  stored = pairs.ensure(tmp_path, stage.pairs, base(planned(methods=())[0]), texts)
  watching = monitor.begin_with_texts(stage, tmp_path, c, texts, stored)
  params, model = text_model.stored().params, text_model.stored()
  state = types.SimpleNamespace(
    ema_params=(params,), params={'student': params, 'fake_score': params}, step=100
  )
  found = watching.look(state, {'teacher': params})
  real = np.asarray(model.space.decode(stored.read(np.arange(12))['image']))
  flat = real.reshape(12, -1) / 255.0  # as images of 8x8 are not averaged
  spread = np.sqrt(flat.var(0).sum())
  assert watching.data.spread == pytest.approx(spread, rel=1e-5)
  draw = LoadedModel(model).drawer(DDIM(), False, 64)
  draw = dataclasses.replace(draw, texts=texts)
  drawn = draw.draw(params, times.uniform(1), 64, c.evaluation.seed)
  own = np.sqrt((drawn.reshape(64, -1) / 255.0).var(0).sum())
  assert found['diversity'] == pytest.approx(own / spread, rel=1e-5)
  assert found['brightness'] == pytest.approx(drawn.mean() / 255.0)
  with Image.open(tmp_path / 'dmd' / 'denoisings.png') as picture:
    sheet = np.asarray(picture.convert('RGB'))
  assert sheet.shape[0] > sheet.shape[1]
  without = monitor.begin_with_texts(stage, tmp_path, c, texts, None)
  assert set(without.look(state, {'teacher': params})) == {'brightness', 'saturation'}


def test_colours_at_a_low_resolution_stand_for_the_features_of_large_images():
  images = np.zeros((2, 35, 64, 3), np.uint8)
  images[1, :2, :4, 0] = 255  # the first block of 2x4 pixels
  found = monitor._pixels(images)
  assert found.shape == (2, 17 * 16 * 3)
  assert found[1, 0] == 1.0 and np.count_nonzero(found) == 1


def test_a_run_of_prompts_has_nothing_to_be_compared_with(tmp_path):
  directory, c = text_model.begin(tmp_path)
  with pytest.raises(
    UserError,
    match=r'dataset\.name=prompts has none; set evaluation\.clip=FOLDER .*--workdir=STAGE/model',
  ):
    evaluating.evaluate(c, directory)
  with pytest.raises(UserError, match=r'dataset\.name=prompts has no images'):
    datasets.open_split(datasets.Settings.of(c.dataset), 'train')
