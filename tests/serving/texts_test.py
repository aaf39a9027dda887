"""Prompts and negative prompts: on the page, in Python and on the command line."""

import dataclasses
import types

import numpy as np
import pytest

import diffusion_distillation
from diffusion_distillation.diffusion.guidance import make_guidance
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import loading
from diffusion_distillation.evaluation.loading import LoadedModel
from diffusion_distillation.interop import importing
from diffusion_distillation.networks.guidance import check
from diffusion_distillation.serving import gallery as galleries
from diffusion_distillation.serving import page
from diffusion_distillation.serving.gallery import Gallery
from diffusion_distillation.stages import model
from tests import tiny
from tests.evaluation.sampling_test import assert_same_images
from tests.interop.stable_diffusion_import_test import config, write
from tests.stages.model_test import UNET, stored


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A workdir with a small Stable Diffusion as the base, and a student in one step that cannot be guided."""
  pipeline = write(tmp_path_factory.mktemp('peer') / 'pipeline', 'sd15_tiny')
  directory = tmp_path_factory.mktemp('run') / 'run'
  importing.from_stable_diffusion(config(), config(), pipeline, directory)
  base = diffusion_distillation.load(directory / 'base').stored
  student = dataclasses.replace(
    base, num_steps=1, times='uniform', cond_dropout=0.0, provenance={'stage': 'dmd', 'method': 'dmd'}
  )
  model.write(directory / 'dmd' / 'model', student)
  return directory


def loaded(run, stage):
  return diffusion_distillation.load(run / stage)


def draw(gallery, **changes):
  usual = {'stage': 'dmd', 'steps': 1, 'sampler': 'ddim', 'label': '', 'seed': 5, 'num': 1, 'weight': 0}
  usual |= {'prompts': 'a red circle', 'negative': ''}
  return gallery.draw(*(usual | changes).values())


def test_a_negative_prompt_is_drawn_in_place_of_the_empty_text(run):
  """The program is the same: only the embeddings differ."""
  of = loaded(run, 'base').stored
  text, empty, blue = (of.text.embed([prompt]) for prompt in ('a red circle', '', 'blue'))
  for negative, expected in ((None, empty), ('blue', blue)):
    chosen = loading.with_texts(of, None, ['a red circle'], True, negative)
    np.testing.assert_array_equal(chosen['text'], text)
    np.testing.assert_array_equal(chosen['no_text'], expected)
  assert np.abs(blue - empty).max() > 0.1
  assert 'no_text' not in loading.with_texts(of, None, ['a red circle'], False)


@pytest.mark.slow
def test_python_draws_with_a_negative_prompt(run):
  base, kwargs = loaded(run, 'base'), {'prompts': ['a red circle'], 'guidance': 3.0, 'steps': 2}
  plain, empty, blue = (base.sample(negative_prompt=text, **kwargs) for text in (None, '', 'blue'))
  np.testing.assert_array_equal(plain, empty)
  assert (plain != blue).any()


REFUSED = {
  'no guidance': ('base', {}, 'negative_prompt: guidance leads away from this text, and there is none'),
  'student': (
    'dmd',
    {},
    'negative_prompt: this model makes no call that guidance leads away from: it was distilled without',
  ),
  'guided student': (
    'dmd',
    {'guidance': 2.0},
    'guidance=2: guidance compares with images of the empty text, without which this model was distilled',
  ),
}


@pytest.mark.parametrize('what', REFUSED)
def test_a_negative_prompt_without_effect_is_refused_in_one_line(run, what):
  stage, given, words = REFUSED[what]
  with pytest.raises(UserError) as caught:
    loaded(run, stage).sample(prompts=['a red circle'], negative_prompt='blue', **given)
  assert str(caught.value).startswith(words)


def test_models_without_texts_and_those_with_a_guiding_model_take_no_negative_prompt(run):
  with pytest.raises(UserError, match='negative_prompt: the model is not conditioned on text'):
    LoadedModel(stored(UNET)).sample(2, negative_prompt='blue')
  with pytest.raises(UserError, match='a guiding model receives the same text'):
    loading.check_negative(loaded(run, 'base').stored, True, True, 'negative_prompt', 'guidance')


def test_the_message_for_classes_still_names_label_dropout():
  classes = dataclasses.replace(UNET, num_classes=3)
  with pytest.raises(UserError, match='was trained without label dropout'):
    check('guidance', make_guidance(2.0), classes.conditioning, 0.0)


def test_the_command_line_takes_a_negative_prompt_and_no_other_mode_does(run, tmp_path):
  flags = (f'--workdir={run}', '--negative_prompt=blue')
  code, _, err = tiny.run_cli('--mode=sample', *flags, '--prompts=a', f'--out={tmp_path / "x.npz"}')
  assert code == UserError.exit_code and '--negative_prompt: guidance leads away from this text' in err
  code, _, err = tiny.run_cli('--mode=export', *flags, f'--out={tmp_path / "out"}')
  assert code == UserError.exit_code and '--negative_prompt only applies to --mode=sample' in err


@pytest.mark.slow
def test_an_unguided_student_is_drawn_beside_its_guided_teacher(run):
  teacher, student = draw(
    Gallery(run), prompts='a red circle\n\n blue ', negative='red', num=4, weight=2
  )
  assert (teacher.calls, student.calls) == (10, 1)
  own = {'prompts': ['a red circle', 'blue'], 'seed': 5}
  assert_same_images(student.images, loaded(run, 'dmd').sample(4, **own))
  guided = loaded(run, 'base').sample(4, guidance=2.0, negative_prompt='red', **own)
  assert_same_images(teacher.images, guided)


@pytest.mark.parametrize(
  ('given', 'words'),
  [
    ({'prompts': ''}, 'prompt: this model draws what a text says, and none was given'),
    ({'prompts': 'a\nb'}, 'images=1 are fewer than the 2 prompts, of which each line is one'),
    ({'prompts': 'a' * 2001}, 'a prompt has 2001 characters; at most 2000 are allowed'),
    ({'negative': 'blue'}, 'negative prompt: guidance leads away from this text, and there is none'),
    ({'weight': -1}, 'guidance=-1 must be a number, zero or more'),
  ],
)
def test_texts_that_cannot_be_drawn_are_one_line_before_anything_is(run, monkeypatch, given, words):
  gallery = Gallery(run)
  monkeypatch.setattr(gallery, '_draw', None)
  with pytest.raises(UserError) as caught:
    draw(gallery, **given)
  assert str(caught.value).startswith(words)


def test_a_prompt_for_a_model_without_texts_is_refused(tmp_path):
  model.write(tmp_path / 'base' / 'model', stored(UNET))
  with pytest.raises(UserError, match='prompt: the model is not conditioned on text'):
    draw(Gallery(tmp_path), stage='base')


def test_the_page_shows_the_fields_of_texts_only_for_their_models(run, tmp_path):
  gr = types.SimpleNamespace(skip=lambda: 'kept', update=lambda **changes: changes)

  def fields(directory, stage):
    gallery = Gallery(directory)
    *_, weight, prompts, negative, num = page._choices(gr, gallery, stage)
    return weight['visible'], prompts['visible'], negative['visible'], num

  assert fields(run, 'base') == fields(run, 'dmd') == (True, True, True, 'kept')
  assert fields(run, None) == (True, True, True, {'value': 1})
  assert fields(run / 'dmd', None) == (False, True, False, {'value': 1})
  model.write(tmp_path / 'base' / 'model', stored(UNET))
  assert fields(tmp_path, None) == (False, False, False, 'kept')
  assert galleries.takes_text(loaded(run, 'dmd').stored)
  model.write(tmp_path / 'student' / 'model', stored(UNET))
  (tmp_path / 'base' / 'model' / model.DESCRIPTION).write_text(
    '{'
  )  # of another stage than the chosen one
  assert fields(tmp_path, 'student') == (False, False, False, 'kept')
