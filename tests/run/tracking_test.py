"""Measurements during training: their values for known models, the best weights, and interruptions."""

import json
import shutil
import signal
import types

import jax
import numpy as np
import pytest

from diffusion_distillation import modes
from diffusion_distillation.errors import DamagedError, Preempted, UserError
from diffusion_distillation.run import gate, loop, run
from diffusion_distillation.run.inputs import Inputs
from diffusion_distillation.run.tracking import Tracker
from diffusion_distillation.stages import provenance
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.stages.provenance import Parents
from diffusion_distillation.system import interrupts, sharding
from diffusion_distillation.system.checkpoints import digest
from tests import tiny
from tests.run.gate_run_test import GOOD, SPOILED, Pooled, of_data

CONFIG = tiny.config(log__frechet_every=4, log__frechet_samples=200)
(BASE, STUDENT, _), IMAGES = tiny.plan()


@pytest.fixture
def track(tmp_path):
  """Makes a tracker of a stage."""
  workdirs.claim(tmp_path, CONFIG)

  def make(stage=STUDENT, config=CONFIG, workdir=tmp_path):
    (workdir / stage.name).mkdir(exist_ok=True)
    return Tracker(config, stage, workdir, Parents(), Pooled(), of_data())

  return make


@pytest.fixture
def scripted(monkeypatch):
  """A tracker's distances are the parameters themselves."""
  monkeypatch.setattr(Tracker, '_distance', lambda self, params: (float(params['value']), 0.5))


def params(value):
  return {'value': np.float32(value)}


def record(workdir, stage=STUDENT):
  return json.loads((workdir / stage.name / 'track.json').read_text())


def test_the_value_is_the_frechet_distance_of_the_stage_s_own_sampler(track):
  """A shift of every pixel by 0.2, in units of 16 grey levels, moves each of the 16 features by 0.2 * 127.5 / 16."""
  good, spoiled = (track(of.stage)._distance(of.params)[0] for of in (GOOD, SPOILED))
  floor = gate.floor_of(of_data().some, 200, 0).value
  assert good < 2 * floor
  assert spoiled - good == pytest.approx(16 * (0.2 * 127.5 / 16) ** 2, rel=0.1)


def test_the_best_weights_are_kept(track, scripted, tmp_path):
  tracker = track()
  for done, value in ((4, 5.0), (8, 3.0), (12, 3.0), (16, 4.0)):
    state = types.SimpleNamespace(step=np.array(done), ema_params=(params(value), params(0.0)))
    assert tracker.look(state, {}) == {'frechet': value}
  found = record(tmp_path)
  assert found['frechet'] == {'4': 5.0, '8': 3.0, '12': 3.0, '16': 4.0}
  assert found['best'] == {'updates': 8, 'frechet': 3.0} and found['samples'] == 200
  assert found['errors'] == dict.fromkeys(found['frechet'], 0.5)
  described = json.loads((tmp_path / STUDENT.name / 'best' / 'model.json').read_text())
  assert described['provenance']['updates'] == 8 and described['digest'] == digest(params(3.0))
  assert described['num_steps'] == 2 and 'seconds' not in described['provenance']
  other = track(config=tiny.config(log__frechet_every=4, log__frechet_samples=100))
  other.measure(20, params(9.0))  # cannot be compared with the former
  assert record(tmp_path)['frechet'] == {'20': 9.0}
  assert record(tmp_path)['best'] == {'updates': 20, 'frechet': 9.0}


def test_measurements_on_another_grid_are_not_compared(track, scripted, tmp_path):
  track(BASE).measure(4, params(1.0))
  assert (record(tmp_path, BASE)['grid'], record(tmp_path, BASE)['seed']) == ('uniform', 2**30 + 1)
  changed = {'log__frechet_every': 4, 'log__frechet_samples': 200, 'evaluation__grid': 'karras'}
  track(BASE, tiny.config(**changed)).measure(8, params(9.0))
  assert record(tmp_path, BASE)['frechet'] == {'8': 9.0} and record(tmp_path, BASE)['grid'] == 'karras'
  with pytest.raises(UserError, match='grid was karras, is uniform'):
    patient = {'log__frechet_every': 4, 'log__frechet_samples': 200, 'early_stop__patience': 2}
    track(BASE, tiny.config(**patient)).check_record()


def test_only_a_measurement_that_a_signal_prevented_is_made_up_for(track, scripted, tmp_path):
  tracker = track()
  for done in (0, 5):
    tracker.resume(done, params(1.0))
  assert not (tmp_path / STUDENT.name / 'track.json').exists()
  tracker.resume(4, params(2.0))
  tracker.resume(4, params(1.0))
  assert record(tmp_path)['frechet'] == {'4': 2.0}
  (tmp_path / STUDENT.name / 'track.json').write_text(json.dumps(record(tmp_path) | {'frechet': 'gone'}))
  with pytest.raises(DamagedError, match=r'track\.json is damaged'):
    tracker.resume(8, params(1.0))


def test_it_is_due_at_intervals_and_at_every_end(track):
  tracker = track(STUDENT.lengthened(14))
  assert [done for done in range(1, 15) if tracker.due(done)] == [4, 8, 12, 14]
  tracker = track(STUDENT.lengthened(14), tiny.config(log__frechet_every=100))
  assert [done for done in range(1, 15) if tracker.due(done)] == [8, 14]


def test_an_interval_that_groups_of_updates_would_miss_is_refused():
  with pytest.raises(UserError, match=r'log\.frechet_every=3 must be a multiple of'):
    run.check_batches(
      tiny.config(
        **{'log__frechet_every': 3, 'log__every': 4, 'checkpoint__every': 4},
        compute__updates_per_dispatch=4,
      )
    )


def test_the_best_weights_can_be_sampled(track, monkeypatch, tmp_path):
  provenance.begin_stage(tmp_path, BASE, Parents(), CONFIG)
  options = types.SimpleNamespace(stage=None, weights='best')
  with pytest.raises(UserError, match=r'--weights=best: .* kept no best weights'):
    modes._model_of_workdir(options, tmp_path, CONFIG)
  monkeypatch.setattr(Tracker, '_distance', lambda self, params: (1.0, 0.1))
  found = sharding.to_host(BASE.init_params(jax.random.key(0)))
  track(BASE).measure(4, found)
  stored = modes._model_of_workdir(options, tmp_path, CONFIG)
  assert digest(stored.params) == digest(found) and stored.provenance['updates'] == 4


@pytest.mark.slow
def test_measured_during_training_and_resumed_like_an_uninterrupted_stage(
  step, track, monkeypatch, tmp_path
):
  def trained(name):
    workdir = tmp_path / name
    workdir.mkdir(exist_ok=True)
    return loop.fit(step, BASE, Inputs(IMAGES, tracker=track(BASE, workdir=workdir)), workdir, CONFIG)

  at_once = trained('at_once')
  lines = [
    json.loads(line) for line in (tmp_path / 'at_once/base/metrics.jsonl').read_text().splitlines()
  ]
  measured = {str(line['step']): line['frechet'] for line in lines if 'frechet' in line}
  expected = record(tmp_path / 'at_once', BASE)
  assert list(measured) == ['4', '8', '12'] and measured == expected['frechet']

  original, stops = Tracker._distance, [8, 12]

  def stopping(self, params):
    done = 4 * (1 + len(self._recorded()['frechet']))
    if done in stops:
      stops.remove(done)
      signal.raise_signal(signal.SIGTERM)
    return original(self, params)

  monkeypatch.setattr(Tracker, '_distance', stopping)
  handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
  try:
    for _ in range(2):  # in the middle and at the end
      interrupts.install()
      with pytest.raises(Preempted):
        trained('stopped')
    interrupts.install()
    assert trained('stopped').digest == at_once.digest
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
  assert record(tmp_path / 'stopped', BASE) == expected and not stops
  best = [
    json.loads((tmp_path / name / 'base/best/model.json').read_text()) for name in ('at_once', 'stopped')
  ]
  assert best[0] == best[1]
  shutil.rmtree(tmp_path / 'stopped/base/checkpoints/12')
  shutil.rmtree(tmp_path / 'stopped/base/model')
  assert trained('stopped').digest == at_once.digest
  assert record(tmp_path / 'stopped', BASE) == expected
