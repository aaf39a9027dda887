"""Sampling by the command line, in this process: from a conditional run of colour images that is half finished."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from configs import default
from diffusion_distillation import cli, datasets
from diffusion_distillation.diffusion import samplers, schedules, times
from diffusion_distillation.evaluation import measure
from diffusion_distillation.run import loop
from diffusion_distillation.run.inputs import Inputs
from diffusion_distillation.stages import provenance
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.system import sharding
from diffusion_distillation.training import step as update
from tests import tiny
from tests.exit_codes_test import options

CONDITIONAL = {
  'model__conditional': True,
  'model__ch_mult': (1,),
  'train__ema_decay': (0.9, 0.99),
  'train__learning_rate': 0.1,
  'dataset__name': 'rgb',
  'dataset__random_flip': True,
}


NAMES = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine')


def named_digits(settings, role):
  return dataclasses.replace(tiny.colour_digits(settings, role), classes=NAMES)


@pytest.fixture(scope='module', autouse=True)
def one_device():
  """On which a checkpoint is sooner written and read than on eight."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(sharding, '_in_use', [sharding._make(jax.devices()[:1], 1)])
    yield


@pytest.fixture(scope='module')
def colour(tmp_path_factory):
  """A half-finished conditional run of colour images, whose data set is not at hand any more."""
  workdir, config = tmp_path_factory.mktemp('colour'), tiny.config(**CONDITIONAL)
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(datasets.SOURCES, 'rgb', named_digits)
    workdirs.claim(workdir, config)
    stages, images = workdirs.plan_for(workdir, config)
    workdirs.claim_images(workdir, images.images)
    step, inputs = sharding.compile_step(update.train_steps), Inputs(images)
    loop.fit(step, stages[0], inputs, workdir, config)
  return workdir


@pytest.fixture
def sample(colour, tmp_path, monkeypatch, capsys):
  """Draws from the colour run: images, labels, and the line that is printed."""
  monkeypatch.setattr('diffusion_distillation.system.interrupts.install', lambda: None)

  def draw(**changes):
    out = tmp_path / 'x.npz'
    assert cli.run(options(colour, out=out, **changes)) == 0
    with np.load(out, allow_pickle=False) as arrays:
      assert arrays['images'].shape == (12, 8, 8, 3) and arrays['images'].dtype == np.uint8
      return arrays['images'], arrays['labels'].tolist(), capsys.readouterr().out

  return draw


@pytest.mark.slow
def test_a_half_finished_conditional_run_of_colour_images_is_sampled_with_labels(sample):
  """Also: without its data set, which need not be at hand to sample from a workdir."""
  _, labels, line = sample()
  assert labels == [*range(10), 0, 1]
  assert line.endswith('12 images of base in 4 ddim steps, 4 network calls each (12 updates)\n')


def test_classes_are_drawn_in_turn_and_decide_what_is_drawn(sample):
  balanced, _, _ = sample()
  images, labels, _ = sample(classes=['0', '1', '7'])
  assert labels == [0, 1, 7] * 4
  same = (images == balanced).all(axis=(1, 2, 3))
  assert same.tolist() == [k in (0, 1) for k in range(12)]


@pytest.mark.slow
def test_every_sampler_is_at_hand_and_its_network_calls_are_told(sample):
  calls = {'ddim': 3, 'ddim_keep_eps': 3, 'ancestral': 3, 'multistep_consistency': 3, 'euler': 3}
  calls |= {'heun': 6, 'rk4': 12, 'edm_heun': 5, 'dpm_solver_2m': 3}
  assert set(calls) == set(samplers.SAMPLERS)
  drawn = set()
  for name, nfe in calls.items():
    images, _, line = sample(sampler=name, steps=3)
    assert f' in 3 {name} steps, {nfe} network calls each' in line
    drawn.add(images.tobytes())
  assert len(drawn) == len(calls)


def test_steps_and_times_make_the_grid(sample):
  two, _, line = sample(steps=2)
  assert ' in 2 ddim steps, 2 network calls' in line
  halves, _, _ = sample(times=['0', '0.5', '1'])
  np.testing.assert_array_equal(halves, two)
  for name in ('quadratic', 'karras'):
    grid = times.make_grid(name, 3, schedules.Cosine())
    by_name, _, line = sample(steps=3, grid=name)
    assert ' in 3 ddim steps, 3 network calls' in line
    np.testing.assert_array_equal(by_name, sample(times=list(map(str, grid)))[0])
  uneven, _, line = sample(times=['0', '0.2', '1'])
  assert ' in 2 ddim steps, 2 network calls' in line and (uneven != two).any()


def test_noise_and_clipping_can_be_chosen_anew(sample):
  """By default they are the run's, gamma = 0 and clipped."""
  small, _, _ = sample(sampler='ancestral')
  np.testing.assert_array_equal(sample(sampler='ancestral', gamma=0.0, clip_x=True)[0], small)
  for changes in ({'gamma': 1.0}, {'clip_x': False}):
    assert (sample(sampler='ancestral', **changes)[0] != small).any(axis=(1, 2, 3)).all()


def test_the_weights_that_are_asked_for_are_sampled(sample, colour):
  config = workdirs.read_config(colour, default.get_config())
  stage = workdirs.stored_plan(colour, config)[0]
  model = provenance.load_model(colour, stage, config, stage.weights)
  draw = measure.drawer(config, model.stage, 'ddim').draw
  drawn = {name: sample(weights=name)[0] for name in ('ema', 'ema_0.99', 'last')}
  for name, images in drawn.items():
    np.testing.assert_array_equal(images, draw(model.all[name], times.uniform(4), 12, 0))
  assert len({images.tobytes() for images in drawn.values()}) == 3
  np.testing.assert_array_equal(sample()[0], drawn['ema'])


@pytest.mark.parametrize('classes', [['10'], ['0', '-1'], ['none', '0'], ['Zero']])
def test_classes_that_are_not_there_are_refused(colour, tmp_path, monkeypatch, capsys, classes):
  monkeypatch.setattr('diffusion_distillation.system.interrupts.install', lambda: None)
  assert cli.run(options(colour, out=tmp_path / 'x.npz', classes=classes)) == 2
  error = (
    f'error: --classes={",".join(classes)}: classes are whole numbers, 0 to 9, or their names, such as '
    f'{NAMES[0]}\n'
  )
  assert capsys.readouterr().err == error and not (tmp_path / 'x.npz').exists()


def test_classes_are_drawn_by_their_names_too(sample, colour):
  assert json.loads((colour / 'dataset.json').read_text())['classes'] == list(NAMES)
  images, labels, _ = sample(classes=['seven', '0', 'nine', 'two'])
  assert labels == [7, 0, 9, 2] * 3
  np.testing.assert_array_equal(images, sample(classes=['7', '0', 'nine', '2'])[0])


def test_a_model_that_was_always_told_the_class_does_not_draw_without(
  colour, tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr('diffusion_distillation.system.interrupts.install', lambda: None)
  assert cli.run(options(colour, out=tmp_path / 'x.npz', classes=['none'])) == 2
  text = capsys.readouterr().err
  assert text.startswith('error: --classes=none: ') and 'dataset.label_dropout=0' in text
  assert text.count('\n') == 1 and not (tmp_path / 'x.npz').exists()
