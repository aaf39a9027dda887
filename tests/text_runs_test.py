"""Whole runs of students of latents and texts, at tiny size: trained, interrupted, resumed, and drawn from."""

import shutil

import jax
import numpy as np
import pytest

import diffusion_distillation
from diffusion_distillation.errors import UserError
from diffusion_distillation.interop import importing
from diffusion_distillation.run import loop
from diffusion_distillation.run import run as runs
from diffusion_distillation.stages import workdir
from tests import text_model
from tests.interop import stable_diffusion_import_test as whole
from tests.run.encoding_test import images
from tests.text_students_test import GUIDED, NO_GAN

pytestmark = pytest.mark.slow


def final(directory, name):
  return diffusion_distillation.load(directory / name / 'model').stored


@pytest.mark.parametrize(
  ('name', 'changes'),
  [
    ('dmd', GUIDED),
    ('dmd2', {**NO_GAN, 'dmd2__num_steps': 4, 'dmd2__fake_updates': 2, 'dmd2__guidance': 0.75}),
  ],
)
def test_an_interrupted_run_ends_as_an_uninterrupted_one(name, changes, tmp_path, monkeypatch):
  ends = []
  for stops in (False, True):
    directory, c = text_model.begin(tmp_path / str(stops), methods=(name,), **changes)
    if stops:
      with monkeypatch.context() as patch:
        patch.setattr(loop, '_dispatches', _first_two(loop._dispatches))
        with pytest.raises(_Killed):
          runs.run(c, directory)
    runs.run(c, directory)
    ends.append(final(directory, name))
  jax.tree.map(np.testing.assert_array_equal, ends[0].params, ends[1].params)
  assert ends[0].digest == ends[1].digest and ends[0].digest != text_model.stored().digest
  before = jax.tree.leaves(text_model.stored().params)
  assert all((a != b).any() for a, b in zip(before, jax.tree.leaves(ends[0].params), strict=True))


class _Killed(Exception):
  """The process ended."""


def _first_two(really):
  """The loop's batches up to a kill in the third update, after the checkpoint at the second."""

  def dispatches(batches, stage, done, config):
    for k, group in enumerate(really(batches, stage, done, config)):
      if k == 2:
        raise _Killed
      yield group

  return dispatches


def test_rounds_a_gan_and_a_student_that_takes_the_weight_are_trained_on_encoded_images(
  tmp_path, monkeypatch
):
  directory, c = text_model.begin(
    tmp_path,
    methods=('dmd2', 'guided', 'progressive', 'consistency'),
    distill__end_steps=2,
    dataset__label_dropout=0.25,
  )
  monkeypatch.setattr(workdir, 'open_captions', lambda *_: images())
  runs.run(c, directory)
  student = diffusion_distillation.load(directory / 'progressive_0002' / 'model')
  drawn = student.sample(prompts=['blue', 'a red circle'], guidance=1.0, seed=3)
  assert drawn.shape == (2, *text_model.IMAGE) and student.stored.num_steps == 2
  assert (drawn != student.sample(prompts=['blue', 'a red circle'], guidance=3.0, seed=3)).any()
  assert final(directory, 'consistency').text == text_model.stored().text


def test_an_imported_pipeline_becomes_a_one_step_student_that_draws_prompts(tmp_path):
  pipeline = whole.write(tmp_path / 'pipeline', 'sd15_tiny')
  c = text_model.config(
    text_model.write_prompts(tmp_path / 'prompts.txt'),
    methods=('dmd',),
    dmd__num_updates=2,
    pairs__num_pairs=8,
    **GUIDED,
  )
  importing.from_stable_diffusion(c, c, pipeline, tmp_path / 'run')
  runs.run(c, tmp_path / 'run')
  shutil.move(tmp_path / 'run' / 'dmd' / 'model', tmp_path / 'student')
  shutil.rmtree(tmp_path / 'run')
  student = diffusion_distillation.load(tmp_path / 'student')
  assert (student.stored.num_steps, student.stored.provenance['method']) == (1, 'dmd')
  drawn = student.sample(prompts=['a red circle', 'blue'], seed=1)
  assert drawn.shape == (2, 16, 16, 3) and drawn.dtype == np.uint8
  np.testing.assert_array_equal(student.sample(3, prompts=['a red circle', 'blue'], seed=1)[:2], drawn)
  with pytest.raises(UserError, match='guidance'):
    student.sample(prompts=['blue'], guidance=2.0)
