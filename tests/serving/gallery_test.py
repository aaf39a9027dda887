"""What the page shows, without the page: stages, images of teacher and student, and what they cost."""

import dataclasses
import os
import shutil
import time
import types

import numpy as np
import pytest

from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.evaluation.loading import LoadedModel, load
from diffusion_distillation.evaluation.sampling import Drawer
from diffusion_distillation.networks import NETWORKS
from diffusion_distillation.serving import gallery as galleries
from diffusion_distillation.serving.gallery import Gallery
from diffusion_distillation.stages import model
from tests.evaluation.sampling_test import assert_same_images
from tests.networks.denoiser_test import Small
from tests.stages.model_test import UNET, stored

GUIDED = dataclasses.replace(UNET, num_classes=3, guidance=(0.0, 4.0))


def conditional(method, seed=0, **fields):
  names = {'class_names': ('cat', 'dog', 'hen'), 'cond_dropout': 0.1}
  return stored(Small(1, num_classes=3), seed=seed, provenance={'method': method}, **names | fields)


STAGES = {
  'halved_0002': conditional('halved', 3, num_steps=2),
  'base': conditional('denoising', 1, num_steps=8, sampler='edm_heun'),
  'halved_0004': conditional('halved', 2, num_steps=4),
}


@pytest.fixture(autouse=True)
def _small_is_a_network(monkeypatch):
  monkeypatch.setitem(NETWORKS, 'small', Small)


@pytest.fixture
def workdir(tmp_path):
  for seconds, (name, of) in enumerate(STAGES.items()):
    model.write(tmp_path / name / 'model', of)
    os.utime(tmp_path / name / 'model' / model.DESCRIPTION, (1e9 + seconds, 1e9 + seconds))
  (tmp_path / 'begun').mkdir()
  return tmp_path


@pytest.fixture
def weights_read(monkeypatch):
  """The stages whose weights are read, one after the other."""
  found, read = [], model.read

  def counted(folder, weights=True):
    found.extend([folder.parent.name] if weights else [])
    return read(folder, weights)

  monkeypatch.setattr(model, 'read', counted)
  return found


def draw(gallery, *, lines=None, **changes):
  usual = {'stage': 'halved_0002', 'steps': 2, 'sampler': 'ddim', 'label': '', 'seed': 5, 'num': 4}
  usual |= {'weight': 0, 'prompts': '', 'negative': ''}
  report = [].append if lines is None else lines.append
  return gallery.draw(*(usual | changes).values(), report)


def test_finished_stages_come_with_the_teacher_first_and_most_steps_first(workdir):
  gallery = Gallery(workdir)
  assert list(gallery.stages()) == ['base', 'halved_0004', 'halved_0002']
  assert gallery.newest() == 'halved_0004'
  assert gallery.describe('halved_0002').num_steps == 2
  assert galleries.classes(gallery.describe('base')) == ['cat', 'dog', 'hen', 'none']
  assert galleries.classes(dataclasses.replace(STAGES['base'], class_names=(), cond_dropout=0.0)) == [
    *'012'
  ]
  assert galleries.classes(stored(Small(1))) == []


def test_a_damaged_stage_comes_last_and_the_others_are_drawn(workdir):
  (workdir / 'halved_0004' / 'model' / model.DESCRIPTION).write_text('{')
  gallery = Gallery(workdir)
  assert list(gallery.stages()) == ['base', 'halved_0002', 'halved_0004']
  assert [one.stage for one in draw(gallery)] == ['base', 'halved_0002']
  with pytest.raises(DamagedError, match='halved_0004'):
    draw(gallery, stage='halved_0004')


@pytest.mark.parametrize('below', ['', 'model'])
def test_a_stage_or_the_folder_of_a_model_is_drawn_without_a_teacher(workdir, below):
  gallery = Gallery(workdir / 'halved_0002' / below)
  (name,) = gallery.stages()
  assert gallery.newest() == name
  (drawn,) = draw(gallery, stage=name)
  assert_same_images(drawn.images, load(workdir / 'halved_0002').sample(4, seed=5))


def test_where_there_is_no_model_one_line_says_so(tmp_path):
  with pytest.raises(UserError, match='holds no model'):
    Gallery(tmp_path).stages()


def test_teacher_and_student_are_drawn_from_one_noise_each_as_it_is_made_for(workdir):
  teacher, student = draw(Gallery(workdir), label='dog', steps='3')
  assert (teacher.stage, teacher.steps, teacher.sampler, teacher.calls) == ('base', 8, 'edm_heun', 15)
  assert (student.stage, student.steps, student.sampler, student.calls) == ('halved_0002', 3, 'ddim', 3)
  for one, own in ((teacher, {}), (student, {'steps': 3})):
    expected = LoadedModel(STAGES[one.stage]).sample(4, seed=5, labels=[1], **own)
    assert_same_images(one.images, expected)
    assert one.milliseconds > 0
  shown = galleries.figures(student._replace(milliseconds=12.345))
  assert list(shown.values()) == ['ddim', '3', '3', '12.3']
  _, without = draw(Gallery(workdir), label='none')
  expected = LoadedModel(STAGES['halved_0002']).sample(4, seed=5, labels=[-1])
  assert_same_images(without.images, expected)


def test_an_unconditional_teacher_of_classes_is_drawn_without(workdir):
  model.write(workdir / 'base' / 'model', stored(Small(1), num_steps=3), anew=True)
  teacher, _ = draw(Gallery(workdir), label='dog')
  assert (teacher.stage, teacher.steps) == ('base', 3)


def test_weights_are_read_once_until_a_stage_is_trained_again(workdir, weights_read):
  gallery = Gallery(workdir)
  first = draw(gallery)[1].images
  draw(gallery, steps=3, seed=1)
  assert weights_read == ['base', 'halved_0002']
  again = conditional('halved', 9, num_steps=2)
  model.write(workdir / 'halved_0002' / 'model', again, anew=True)
  images = draw(gallery)[1].images
  assert weights_read == ['base', 'halved_0002', 'halved_0002']
  assert (images != first).any() and len(images) == 4
  assert_same_images(images, LoadedModel(again).sample(4, seed=5))


def test_compilation_is_announced_once_and_is_no_part_of_the_time(workdir, monkeypatch):
  gallery, lines, events = Gallery(workdir / 'halved_0002'), [], []
  batches, clock = Drawer.batches, lambda: events.append('time') or time.monotonic()
  monkeypatch.setattr(Drawer, 'batches', lambda *args: events.append('drawn') or batches(*args))
  monkeypatch.setattr(galleries, 'time', types.SimpleNamespace(monotonic=clock))
  draw(gallery, lines=lines)
  assert events == ['drawn', 'time', 'drawn', 'time']
  told = ['reading the weights', 'compiling ddim for 4 images, which is done once', 'drawing in 2 steps']
  assert lines == [f'halved_0002: {line}' for line in told]
  for changes, compiled in (
    ({'steps': 1, 'seed': 1, 'label': 'dog'}, False),  # one program for all of these
    ({'num': 1}, True),
    ({'sampler': 'euler'}, True),
  ):
    lines.clear()
    draw(gallery, lines=lines, **changes)
    assert any('compiling' in line for line in lines) == compiled


BAD = {
  'no such stage': ({'stage': 'begun'}, 'begun'),
  'no stage': ({'stage': None}, 'stage='),
  'a list of stages': ({'stage': ['base']}, 'stage='),
  'no steps': ({'steps': 0}, 'steps=0 must be a whole number, 1 to 8192'),
  'half a step': ({'steps': 1.5}, 'steps=1.5 must'),
  'nothing': ({'steps': None}, 'steps= must'),
  'no number': ({'steps': 'many'}, 'steps=many must'),
  'too many steps': ({'steps': 10**6}, 'steps=1000000 must'),
  'infinitely many': ({'steps': float('inf')}, 'steps=inf must'),
  'no such sampler': ({'sampler': 'dim'}, "sampler='dim' is not one of"),
  'no such class': ({'label': 'cow'}, 'class=cow: '),
  'a seed below zero': ({'seed': -1}, 'seed=-1 must'),
  'a large seed': ({'seed': 2**31}, 'seed=2147483648 must'),
  'three images': ({'num': 3}, 'images=3 is not one of 1, 4, 16, 64'),
  'a list of images': ({'num': [4]}, 'images=[4] must'),
}


@pytest.mark.parametrize('name', BAD)
def test_bad_input_is_one_line_before_anything_is_read(workdir, weights_read, name):
  changes, part = BAD[name]
  with pytest.raises(UserError) as error:
    draw(Gallery(workdir), **changes)
  assert part in str(error.value) and '\n' not in str(error.value) and weights_read == []


def test_a_class_of_a_model_without_classes_is_refused(workdir):
  shutil.rmtree(workdir / 'base')
  model.write(workdir / 'halved_0002' / 'model', stored(Small(1), num_steps=2), anew=True)
  with pytest.raises(UserError, match='class=1: the model is unconditional'):
    draw(Gallery(workdir), label='1')
  assert np.shape(draw(Gallery(workdir))[0].images) == (4, 8, 8, 1)


def test_guidance_is_drawn_by_two_calls_or_as_an_input_of_the_student(workdir):
  told = stored(GUIDED, seed=4, provenance={'method': 'guided'}, num_steps=2, cond_dropout=0.1)
  model.write(workdir / 'guided' / 'model', told)
  gallery = Gallery(workdir)
  teacher, student = draw(gallery, stage='guided', weight='1.5', label='1')
  assert (teacher.calls, student.calls) == (30, 2)
  for one, of in ((teacher, STAGES['base']), (student, told)):
    assert_same_images(one.images, LoadedModel(of).sample(4, seed=5, labels=[1], guidance=1.5))
  compiled = len(gallery._compiled)
  other = draw(gallery, stage='guided', weight=3, label='1')[1]
  assert (other.images != student.images).any()
  assert len(gallery._compiled) == compiled + 1  # of the teacher: the weight is part of its program
  assert_same_images(
    draw(gallery, stage='guided', weight=None)[1].images, LoadedModel(told).sample(4, seed=5)
  )
  for wrong, message in (('x', 'guidance=x must be'), (-1, 'guidance=-1 must be')):
    with pytest.raises(UserError, match=message):
      draw(gallery, weight=wrong)
  with pytest.raises(UserError, match=r'^guidance=1: images without a class'):
    draw(gallery, weight=1, label='none')
  never = conditional('halved', 3, num_steps=2, cond_dropout=0.0)
  model.write(workdir / 'halved_0002' / 'model', never, anew=True)
  assert [gallery.can_be_guided(of) for of in (told, STAGES['base'], never, stored(Small(1)))] == [
    *(True, True, False, False)
  ]
  with pytest.raises(UserError, match=r'^guidance=1: .*without label dropout'):
    draw(gallery, weight=1)


def test_the_page_draws_with_a_guiding_model(workdir, tmp_path):
  weaker = stored(Small(1), seed=9)
  model.write(tmp_path / 'weaker', weaker)
  gallery = Gallery(workdir, tmp_path / 'weaker')
  gallery.check_guiding_model()
  drawn = draw(gallery, weight=1.5, label='dog')
  for one in drawn:
    own = LoadedModel(STAGES[one.stage])
    expected = own.sample(4, seed=5, labels=[1], guidance=1.5, guiding_model=tmp_path / 'weaker')
    assert_same_images(one.images, expected)
  assert drawn[1].calls == 4  # two steps of two calls
  assert gallery.can_be_guided(stored(Small(1)))
  with pytest.raises(UserError, match=r'^--guiding_model=.*nothing: .* holds no model'):
    Gallery(workdir, tmp_path / 'nothing').check_guiding_model()
