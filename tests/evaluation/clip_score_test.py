"""The CLIP score of images and prompts; and models of texts that are measured with one image per prompt."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import diffusion_distillation
from diffusion_distillation.datasets import caption_files
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import clip_score, elsewhere, features, prompted
from diffusion_distillation.evaluation.clip_score import Preprocessing, RunningScore
from diffusion_distillation.evaluation.extracted import Extracted
from diffusion_distillation.evaluation.prompted import Prompted
from diffusion_distillation.interop import importing
from diffusion_distillation.stages import model
from tests import tiny
from tests.interop import clip_test
from tests.interop.stable_diffusion_import_test import config, write

PROMPTS = ['a red circle', 'blue', 'a large green square', 'a red circle', 'two']


class Directions:
  """A CLIP whose embeddings are unit vectors: of images at the angle of their first pixel in degrees, of texts at that of their number."""

  @staticmethod
  def _at(degrees):
    radians = np.deg2rad(np.asarray(degrees, np.float64))
    return np.stack([np.cos(radians), np.sin(radians)], axis=-1)

  def of_images(self, images):
    return self._at([image.flat[0] for image in images])

  def of_texts(self, texts):
    return self._at([float(text) for text in texts])


def test_the_score_is_the_mean_of_cosines_times_100_with_its_standard_error():
  running = RunningScore(Directions(), ['0', '30', '90', '200'])
  images = np.zeros((4, 2, 2, 3), np.uint8)
  images[2, 0, 0, 0], images[1, 0, 0, 0] = 180, 90
  running.add([2, 0], images[[2, 0]])
  running.add([3, 1], images[[3, 1]])
  scores = 100 * np.cos(np.deg2rad([90, 0, 200, 60]))
  found = running.result()
  assert found.value == pytest.approx(scores.mean(), abs=1e-9)
  assert found.error == pytest.approx(scores.std(ddof=1) / 2)
  one = RunningScore(Directions(), ['0'])
  one.add([0], images[:1])
  assert one.result() == (100.0, None, *one.result()[2:])


def test_a_wide_image_is_resized_by_its_shorter_side_and_cropped_at_the_centre():
  """Of an image of two halves, 8 x 24, the central 4 x 4 of 4 x 12 pixels are columns 4 to 8."""
  image = np.zeros((8, 24, 3), np.uint8)
  image[:, 12:] = 255
  plain = Preprocessing(4, (4, 4), 1 / 255, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
  found = plain(image)
  expected = np.asarray(Image.fromarray(image).resize((12, 4), Image.Resampling.BICUBIC))[:, 4:8]
  np.testing.assert_allclose(found, expected / 255, atol=1e-7)
  np.testing.assert_array_equal(found, plain(image.transpose(1, 0, 2)).transpose(1, 0, 2))
  shifted = dataclasses.replace(plain, mean=(0.5, 0.0, 0.0), std=(0.25, 1.0, 1.0))(image)
  np.testing.assert_allclose(shifted[..., 0], (found[..., 0] - 0.5) / 0.25, atol=1e-6)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """The folder of a small model of texts, of images of 16 x 16 pixels."""
  pipeline = write(tmp_path_factory.mktemp('peer') / 'pipeline', 'sd15_tiny')
  run = tmp_path_factory.mktemp('run') / 'run'
  importing.from_stable_diffusion(config(), config(), pipeline, run)
  base = diffusion_distillation.load(run / 'base').stored
  model.write(run / 'one' / 'model', dataclasses.replace(base, num_steps=1, times='uniform'))
  return run / 'one' / 'model'


class Pixels:
  """An extractor of the pixels themselves."""

  @staticmethod
  def of(images):
    return Extracted(jnp.asarray(images, jnp.float32).reshape(len(images), -1))


@pytest.mark.slow
def test_each_prompt_is_drawn_once_with_its_own_noise_whatever_the_batch(folder, tmp_path):
  """In two batches of one image for each device, the last of which has two images, as in one batch."""
  prompts = [*PROMPTS, *PROMPTS[:3], 'two', 'blue']
  assert len(prompts) == jax.device_count() + 2
  loaded = diffusion_distillation.load(folder)
  side = loaded.stored.image_shape[0]
  clip = clip_test.clip.read(clip_test.write(tmp_path / 'clip'))
  asked = Prompted('prompts.txt', prompts, clip)
  settings = tiny.config(evaluation__batch_size=2, evaluation__seed=3, evaluation__guidance=(1.5,))
  drawer, small = elsewhere.drawer(settings, loaded), (side // 2, side // 2, 3)
  found, score = prompted.draw(drawer, loaded.stored, 3, Pixels(), asked, small)
  images = loaded.sample(prompts=prompts, seed=3, guidance=1.5)
  small = np.stack([Image.fromarray(image).resize((side // 2,) * 2, Image.LANCZOS) for image in images])
  off = np.abs(found.some - small.reshape(len(prompts), -1))
  assert off.max() <= 2.0 and off.mean() < 0.02  # roundings
  expected = 100 * np.sum(clip.of_images(list(images)) * clip.of_texts(prompts), axis=-1)
  assert score.result().value == pytest.approx(expected.mean(), abs=0.05)
  assert np.abs(np.subtract.outer(expected, expected)).max() > 1.0


def test_what_is_measured_is_checked_before_anything_is_drawn(folder, tmp_path):
  loaded = diffusion_distillation.load(folder)
  asked = Prompted('p.txt', PROMPTS, None)

  def refused(words, asked=asked, loaded=loaded, **changes):
    with pytest.raises(UserError) as caught:
      elsewhere.measure_model(tiny.config(**changes), loaded, folder, tmp_path / 'x.json', asked)
    assert words in str(caught.value)

  refused('this model draws what a text says; name evaluation.prompts=FILE', None)
  refused(
    'evaluation.prompts=p.txt holds 5 prompts, but evaluation.num_samples=6', evaluation__num_samples=6
  )
  several = {'evaluation__num_samples': 5, 'evaluation__guidance': (0.0, 1.0)}
  refused('is measured with one weight; name one, such as (6.5,)', **several)
  several = {'evaluation__guidance': (1.5,), 'evaluation__guidance_interval': (3.0, 0.3)}
  refused('evaluation.guidance_interval=(3.0, 0.3): the interval of guidance is 3,0.3', **several)
  refused('cannot be resized to those of dataset', evaluation__num_samples=5)  # grey digits
  assert asked.first(2).prompts == PROMPTS[:2]
  with pytest.raises(UserError, match='holds 5 prompts, but --images=x holds 4 images; image k'):
    asked.check(4, '--images=x')


def test_other_models_take_no_prompts(tmp_path):
  from tests.stages.model_test import UNET, stored

  model.write(tmp_path / 'model', stored(UNET))
  asked = Prompted('p.txt', PROMPTS, None)
  with pytest.raises(UserError, match=r'draws no texts; leave out evaluation\.prompts'):
    loaded = diffusion_distillation.load(tmp_path / 'model')
    elsewhere.measure_model(tiny.config(), loaded, tmp_path, tmp_path / 'x.json', asked)


def test_prompts_are_the_lines_of_a_file_or_the_captions_in_a_table(tmp_path):
  for name, text in (
    ('p.txt', 'a red circle\n\n blue \n'),
    ('p.csv', 'file_name,caption\n1.jpg,a red circle\n2.jpg,blue\n'),
    ('p.jsonl', '{"text": "a red circle"}\n{"text": "blue"}\n'),
  ):
    (tmp_path / name).write_text(text)
    assert caption_files.read_prompts(tmp_path / name, 'key') == ['a red circle', 'blue']
  (tmp_path / 'empty.txt').write_text('\n')
  for name, words in (
    ('empty.txt', 'holds no prompt'),
    ('nowhere.txt', 'cannot be read: No such file'),
    ('p.json', 'prompts are read from .txt, .csv and .jsonl'),
  ):
    with pytest.raises(UserError, match=words):
      caption_files.read_prompts(tmp_path / name, 'key')


@pytest.mark.slow
def test_a_model_and_its_images_have_the_same_score_from_the_command_line(folder, tmp_path, monkeypatch):
  """Compared with images of a dataset with captions, which has half their size."""
  monkeypatch.setattr(features, '_UPDATES', 2)
  clip_test.write(tmp_path / 'clip')
  (tmp_path / 'prompts.txt').write_text('\n'.join(PROMPTS))
  rng = np.random.default_rng(0)
  (tmp_path / 'real').mkdir()
  for k in range(12):
    pixels = rng.integers(0, 256, (16, 16, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'real' / f'{k}.png')
    (tmp_path / 'real' / f'{k}.txt').write_text('noise')
  drawn = diffusion_distillation.load(folder).sample(prompts=PROMPTS, seed=1)
  np.savez(tmp_path / 'drawn.npz', images=drawn)
  values = {'dataset.name': 'captions', 'dataset.path': tmp_path / 'real', 'dataset.image_size': 8}
  values |= {'evaluation.clip': tmp_path / 'clip', 'evaluation.prompts': tmp_path / 'prompts.txt'}
  values |= {'evaluation.num_samples': 5, 'evaluation.guidance': '(0.0,)'}
  flags = ['--config=configs/stable_diffusion.py', f'--out={tmp_path / "out.json"}', '--mode=evaluate']
  flags += [f'--config.{key}={value}' for key, value in values.items()]
  code, out, err = tiny.run_cli(*flags, f'--workdir={folder}')
  assert code == 0 and 'clip_score' in out, err
  of_model = json.loads((tmp_path / 'out.json').read_text())
  assert of_model['better']['clip_score'] == 'higher' and of_model['nfe'] == 1
  assert of_model['prompts']['num_prompts'] == 5 and of_model['clip']['name'] == 'clip'
  code, out, err = tiny.run_cli(
    *flags, f'--images={tmp_path / "drawn.npz"}', '--config.dataset.image_size=16'
  )
  assert code == 0, err
  of_images = json.loads((tmp_path / 'out.json').read_text())
  assert of_images['metrics']['clip_score'] == pytest.approx(of_model['metrics']['clip_score'], abs=0.05)
  assert of_images['errors']['clip_score'] == pytest.approx(of_model['errors']['clip_score'], abs=0.05)
  assert clip_score.NAME not in of_images['held_out']['metrics']
  for missing, words in (
    ('prompts', 'evaluation.clip=.*clip needs evaluation.prompts=FILE'),
    ('clip', 'evaluation.prompts applies to --images only with evaluation.clip'),
  ):
    kept = [flag for flag in flags if f'evaluation.{missing}=' not in flag]
    code, _, err = tiny.run_cli(*kept, f'--images={tmp_path / "drawn.npz"}')
    assert code == UserError.exit_code and re.search(words, err), err
