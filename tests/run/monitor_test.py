"""Watching students: figures of images in closed form, warnings once, the fake score's lag, and the picture."""

import dataclasses
import json
import logging
import types

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from diffusion_distillation.diffusion.process import Prediction
from diffusion_distillation.diffusion.schedules import Cosine
from diffusion_distillation.errors import Preempted
from diffusion_distillation.evaluation import measure, report_contents
from diffusion_distillation.networks.spaces import Pixels
from diffusion_distillation.run import loop, monitor
from diffusion_distillation.run.inputs import Inputs
from diffusion_distillation.run.monitor import Figures, Monitor
from diffusion_distillation.stages import provenance
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.system import interrupts
from diffusion_distillation.system.logs import MetricsWriter
from tests import tiny

PARAMS = {'student': 0.0, 'fake_score': -1.0}


def features(images):
  """The mean of the red (or grey) channel alone, (n, 1)."""
  return images[..., 0].mean((1, 2), dtype=np.float64)[:, None]


def colour(*values, count=2):
  """Images of one colour, of 0 to 255 a channel."""
  return np.full((count, 4, 4, len(values)), values, np.uint8)


@pytest.mark.parametrize(
  ('values', 'brightness', 'saturation'),
  [
    ((0, 0, 0), 0.0, 0.0),
    ((255, 255, 255), 1.0, 0.0),
    ((51, 51, 51), 0.2, 0.0),
    ((102,), 0.4, 0.0),
    ((255, 0, 0), 1 / 3, 1.0),
    ((0, 0, 51), 0.2 / 3, 1.0),
    ((102, 51, 102), (0.4 + 0.2 + 0.4) / 3, 0.5),
  ],
)
def test_brightness_and_saturation_of_one_colour(values, brightness, saturation):
  """Saturation is (largest - smallest) / largest channel, however dark."""
  found = Figures.of(colour(*values), features)
  assert found.brightness == pytest.approx(brightness, abs=1e-12)
  assert found.saturation == pytest.approx(saturation, abs=1e-12)
  assert found.spread == 0.0


def test_figures_are_means_over_images_and_pixels():
  images = np.concatenate([colour(255, 0, 0), colour(255, 255, 255), colour(0, 0, 0, count=4)])
  found = Figures.of(images, features)
  assert found.brightness == pytest.approx((2 / 3 + 2) / 8)
  assert found.saturation == pytest.approx(2 / 8)


def test_spread_is_the_root_of_half_the_mean_squared_distance_of_two_feature_vectors():
  rng = np.random.default_rng(0)
  given = np.float32(rng.normal(size=(6, 5)) * [1, 2, 3, 0, 5] + 7)
  apart = given[:, None].astype(np.float64) - given[None]
  half = 0.5 * np.mean(np.sum(apart**2, -1))
  found = Figures.of(colour(1, 2, 3, count=6), lambda images: given)
  assert found.spread == pytest.approx(np.sqrt(half), rel=1e-12)


@dataclasses.dataclass(frozen=True)
class Flat:
  """A denoiser to whom every image is one grey, its parameter; it remembers nothing."""

  def __call__(self, params, z, logsnr, cond, rng=None):
    return Prediction(jnp.full_like(z, params), z)


RECIPE = types.SimpleNamespace(lora=None, networks={'teacher': Flat(), 'fake_score': Flat()})
STAGE = types.SimpleNamespace(
  **{'name': 'dmd', 'denoise': Flat(), 'schedule': Cosine(), 'space': Pixels(), 'sampler': 'ddim'},
  **{'num_steps': 1, 'num_updates': 25, 'recipe': RECIPE},
)


class Draws:
  """In place of a drawer: returns `images`, and notes what was asked."""

  def __init__(self):
    self.images, self.asked = None, []

  def __call__(self, config, stage, sampler, label_counts=()):
    self.asked.append(sampler)
    return self

  def draw(self, params, grid, count, seed):
    self.asked.append((params, grid.tolist(), seed))
    return self.images[:count]

  def cond(self, index, seed):
    return None


@pytest.fixture
def draws(monkeypatch):
  found = Draws()
  monkeypatch.setattr(measure, 'drawer', found)
  return found


@pytest.fixture(scope='module')
def loader():
  return tiny.plan()[1]


@pytest.fixture
def watch(loader, tmp_path):
  """Makes look-outs over the digits, in one directory of a stage."""

  def make(extractor=features, **overrides):
    config = tiny.config(log__health_every=10, evaluation__seed=5, **overrides)
    return Monitor(config, STAGE, tmp_path, loader, extractor)

  return make


def state(step=STAGE.num_updates, **params):
  return types.SimpleNamespace(step=step, ema_params=('the average', 'another'), params=params)


def real(loader):
  """The 256 training images that samples are compared with: the first ones of a fixed permutation."""
  return loader.images.images[np.random.Generator(np.random.Philox(0)).permutation(len(loader))[:256]]


def test_the_data_itself_has_diversity_1_and_one_image_repeated_0(watch, loader, draws, tmp_path):
  looking, images = watch(), real(loader)
  expected = Figures.of(images, features)
  assert looking.data == expected
  assert json.loads((tmp_path / 'health.json').read_text()) == dataclasses.asdict(expected)
  draws.images = images
  whole = {'diversity': 1.0, 'brightness': expected.brightness, 'saturation': 0.0}
  assert looking.look(state(student=0.0), {}) == whole
  assert draws.asked == ['ddim', ('the average', [0.0, 1.0], 5)]
  draws.images = np.repeat(images[:1], 256, axis=0)
  same = looking.look(state(student=0.0), {})
  assert same['diversity'] == 0.0 and same['brightness'] == pytest.approx(images[0].mean() / 255)


def test_half_the_images_of_one_grey_have_their_share_of_the_spread(watch, loader, draws):
  """x or the mean, with equal chance: half the variance."""
  images = real(loader)
  given = features(images)
  half = np.where(np.arange(512) < 256, np.tile(given[:, 0], 2), given.mean())[:, None]
  looking = watch(lambda images: half if len(images) == 512 else given)
  draws.images = np.concatenate([images, images])
  found = Figures.of(draws.images, looking._extractor).spread / looking.data.spread
  assert found == pytest.approx(np.sqrt(0.5), rel=1e-9)


def warnings(caplog):
  found = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
  caplog.clear()
  return found


def test_too_little_diversity_is_warned_of_once_until_there_is_enough_again(
  watch, loader, draws, caplog
):
  looking, images = watch(), real(loader)
  poor = np.concatenate([images[:32], *[images[:1]] * 224])
  heard = []
  for drawn in (images, poor, poor, images, poor):
    draws.images = drawn
    looking.look(state(student=0.0), {})
    heard.append(warnings(caplog))
  assert [len(lines) for lines in heard] == [0, 1, 0, 0, 1]
  share = Figures.of(poor, features).spread / looking.data.spread
  assert share < 0.5
  assert heard[1] == [f'stage dmd: the samples are only {share:.2f} times as diverse as the data']


def test_a_student_that_has_just_begun_may_draw_nothing_but_the_mean(watch, loader, draws, caplog):
  looking, draws.images = watch(), np.repeat(real(loader)[:1], 256, axis=0)
  first = STAGE.num_updates // 5
  looking.look(state(step=first, student=0.0), {})
  assert not warnings(caplog)
  looking.look(state(step=first + 1, student=0.0), {})
  assert len(warnings(caplog)) == 1


def test_a_loss_that_stays_has_lag_1_and_one_that_jumps_more_than_2(watch, caplog):
  """The running loss keeps 0.9 of itself from line to line; the lag is the loss over what it was before."""
  looking = watch()
  assert looking.lag({'loss': 1.0}) == {} and looking.lag({'fake_loss': 0.4}) == {}
  lags = [looking.lag({'fake_loss': v})['fake_score_lag'] for v in (0.4, 0.4, 0.9, 0.9, 0.4, 2.0)]
  assert lags[:2] == pytest.approx([1.0, 1.0], rel=1e-12)
  running = [0.4, 0.45, 0.495, 0.4855]
  assert lags[2:] == pytest.approx(
    [v / r for v, r in zip((0.9, 0.9, 0.4, 2.0), running, strict=True)], rel=1e-9
  )
  assert lags[2] > 2.0 and lags[3] == pytest.approx(2.0)
  texts = warnings(caplog)
  assert [text.rpartition('is ')[2] for text in texts] == [
    '2.2 times its running loss',
    '4.1 times its running loss',
  ]
  assert all(text.startswith('stage dmd: the fake score lags behind') for text in texts)


def test_a_lag_that_stays_high_is_warned_of_once(watch, caplog):
  looking = watch()
  for value in (1.0, 9.0, 99.0):
    looking.lag({'fake_loss': value})
  assert len(warnings(caplog)) == 1


LOSSES = {2: 0.5, 4: 0.7, 6: None, 8: 0.3, 10: 0.6, 12: 1.1}


def test_after_a_restart_the_running_loss_is_that_of_a_run_that_was_never_stopped(watch, tmp_path):
  """Lines without the fake score's loss, those after the checkpoint and a half written one do not count."""

  def follow(looking, writer, steps):
    found = {}
    for step in steps:
      values = {} if LOSSES[step] is None else {'fake_loss': LOSSES[step]}
      values |= looking.lag(values)
      writer.write(step, {'loss': 1.0, **values})
      found[step] = values.get('fake_score_lag')
    return found

  looking, writer = watch(), MetricsWriter(tmp_path, 0)
  looking.resume(0)
  uninterrupted = follow(looking, writer, LOSSES)
  writer.close()
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 14, "fa')
  again, writer = watch(), MetricsWriter(tmp_path, 8)  # which drops what is after step 8
  again.resume(8)
  resumed = follow(again, writer, (10, 12))
  writer.close()
  assert resumed == {10: uninterrupted[10], 12: uninterrupted[12]}
  assert again._running == looking._running
  again.resume(4)
  assert again._running == pytest.approx(0.9 * 0.5 + 0.1 * 0.7, rel=1e-12)
  again.resume(1)
  assert again._running is None


def test_the_picture_has_the_samples_and_what_both_networks_make_of_them_noised(
  watch, loader, draws, tmp_path
):
  """Rows of 8: samples, then at each of four times the noised samples, teacher (white) and fake score (black)."""
  looking, draws.images = watch(), real(loader)
  looking.look(state(student=0.0), {})
  assert not (tmp_path / 'denoisings.png').exists()
  looking.look(state(**PARAMS), {'teacher': 1.0})
  with Image.open(tmp_path / 'denoisings.png') as image:
    sheet = np.asarray(image)
  side, gap = 32, 2
  assert sheet.shape == (13 * (side + gap) + gap, 8 * (side + gap) + gap)
  rows = [
    np.stack([sheet[top : top + side : 4, left : left + side : 4] for left in gap + 34 * np.arange(8)])
    for top in gap + 34 * np.arange(13)
  ]
  samples = draws.images[:8, ..., 0]
  np.testing.assert_array_equal(rows[0], samples)
  assert all((row == 255).all() for row in rows[2::3]) and all((row == 0).all() for row in rows[3::3])
  # Noised: what is left of the samples is alpha, less at each time.
  left = [np.corrcoef(row.ravel(), samples.ravel())[0, 1] for row in rows[1::3]]
  assert left == sorted(left, reverse=True) and left[0] > 0.8 and abs(left[-1]) < 0.4
  assert not list(tmp_path.glob('*.tmp'))


def test_it_is_time_to_look_every_so_often_and_at_the_end(watch):
  looking = watch()
  assert [done for done in range(1, 26) if looking.due(done)] == [10, 20, 25]


@pytest.mark.parametrize(
  ('every', 'parent', 'steps', 'looked_at'),
  [(10, 'base', 8, True), (0, 'base', 1, False), (10, None, 1, False), (10, 'base', 9, False)],
)
def test_students_of_few_steps_are_looked_at_unless_it_is_switched_off(every, parent, steps, looked_at):
  stage = types.SimpleNamespace(parent=parent, num_steps=steps)
  assert monitor.watches(tiny.config(log__health_every=every), stage) is looked_at


@pytest.mark.slow
def test_a_monitor_is_given_the_frozen_parameters_that_the_step_has(step, tmp_path):
  """The teacher is not taken to the devices again."""
  given, seen = [], []

  def noting(recipe, state, frozen, batch):
    given.append(frozen)
    return step(recipe, state, frozen, batch)

  watching = types.SimpleNamespace(
    resume=lambda done: None,
    due=lambda done: done == 12,
    lag=lambda values: {},
    look=lambda state, frozen: seen.append(frozen) or {},
  )
  config, (stages, images) = tiny.config(), tiny.plan()
  workdirs.claim(tmp_path, config)
  loop.fit(noting, stages[0], Inputs(images, monitor=watching), tmp_path, config)
  assert len(seen) == 1 and seen[0] is given[0]


@pytest.mark.slow
def test_a_signal_while_samples_are_drawn_loses_nothing(watch, tmp_path, monkeypatch):
  """Drawing stops at once; the update before it is saved all the same."""
  config, (stages, images) = tiny.config(checkpoint__every=100), tiny.plan()
  monkeypatch.setattr(interrupts, '_received', [])

  def step(recipe, state, frozen, batch):
    counts = {'skipped': state.skipped, 'skipped_in_a_row': state.skipped_in_a_row}
    return state.replace(step=state.step + 1), counts | {'loss': 1.0}

  def draw(*_):
    interrupts._received.append('SIGTERM')
    interrupts.check()

  monkeypatch.setattr(measure, 'drawer', lambda *_: types.SimpleNamespace(draw=draw))
  workdirs.claim(tmp_path, config)
  with pytest.raises(Preempted):
    loop.fit(step, stages[0], Inputs(images, monitor=watch()), tmp_path, config)
  assert provenance.load_model(tmp_path, stages[0], config).step == 10
  lines = (tmp_path / 'base' / 'metrics.jsonl').read_text().splitlines()
  assert [json.loads(line)['step'] for line in lines] == [4, 8, 10]


def test_a_half_written_line_of_metrics_is_left_out_of_the_report(tmp_path):
  """`--mode=evaluate` after a kill: the stage's own writer drops such a line, too."""
  (tmp_path / 'base').mkdir()
  (tmp_path / 'base' / 'metrics.jsonl').write_text('{"step": 4, "loss": 1.0}\n{"step": 8, "lo')
  measured = [
    types.SimpleNamespace(model=types.SimpleNamespace(stage=types.SimpleNamespace(name='base')))
  ]
  assert report_contents.watched(measured, tmp_path)['base'].lines == [{'step': 4, 'loss': 1.0}]
