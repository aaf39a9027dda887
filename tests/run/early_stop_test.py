"""Early stopping: which measurements count, and that an interrupted stage ends like an uninterrupted one."""

import json
import shutil
import signal

import numpy as np
import pytest
import safetensors.numpy

from diffusion_distillation.errors import DamagedError, Preempted, UserError
from diffusion_distillation.run import gate, loop, run, tracking
from diffusion_distillation.run.inputs import Inputs
from diffusion_distillation.run.tracking import Tracker, is_stopped
from diffusion_distillation.stages import comparison, extending, model, provenance
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.stages.provenance import Parents
from diffusion_distillation.system import interrupts
from diffusion_distillation.system.checkpoints import digest
from tests import tiny
from tests.run.gate_run_test import Pooled, of_data

CONFIG = tiny.config(
  log__frechet_every=2, log__frechet_samples=20, early_stop__patience=2, checkpoint__every=3
)
(BASE, *_), IMAGES = tiny.plan()


def stopped(*values, error=0.1, patience=2):
  at = range(10, 10 + len(values))
  return is_stopped(dict(zip(at, values, strict=True)), dict.fromkeys(at, error), patience)


def test_only_improvements_beyond_the_error_count():
  assert not stopped(5.0) and not stopped(5.0, 4.0, 3.95)
  assert stopped(5.0, 4.0, 3.95, 4.2)
  assert not stopped(5.0, 4.0, 4.2, 3.85)  # an improvement begins the count anew
  assert not stopped(5.0, 4.95, 4.85)  # small ones add up
  assert stopped(4.85, 4.95, 5.0)
  assert not stopped(5.0, 5.0, 5.0, patience=0) and stopped(5.0, 5.0, patience=1)
  assert stopped(5.0, float('nan'), float('nan'))


@pytest.fixture
def track(tmp_path):
  """Makes a tracker of the base."""

  def make(workdir=tmp_path, config=CONFIG):
    (workdir / BASE.name).mkdir(exist_ok=True, parents=True)
    return Tracker(config, BASE, workdir, Parents(), Pooled(), of_data())

  return make


def recorded(workdir):
  return json.loads((workdir / BASE.name / 'track.json').read_text())


def test_an_end_depends_on_the_measurements_up_to_it_only(track, monkeypatch, tmp_path):
  values = iter([5.0, 4.0, 4.05, 3.0, 3.5, 3.5])
  monkeypatch.setattr(Tracker, '_distance', lambda self, params: (next(values), 0.1))
  workdirs.claim(tmp_path, CONFIG)
  tracker = track()
  for done in (2, 4, 6, 8, 10, 12):
    tracker.measure(done, {'value': np.float32(done)})
  assert [done for done in range(1, 13) if tracker.ends(done)] == [12]  # its last update, in any case
  (tmp_path / BASE.name / 'track.json').write_text(
    json.dumps(recorded(tmp_path) | {'frechet': {'2': 4.0, '4': 4.0, '6': 4.0, '8': 1.0}})
  )
  assert [done for done in range(1, 13) if tracker.ends(done)] == [6]
  assert not track(config=tiny.config(log__frechet_every=2, log__frechet_samples=20)).ends(12)


def test_an_attempt_that_goes_back_forgets_the_measurements_of_the_failed_one(
  track, monkeypatch, tmp_path
):
  values = iter([5.0, 4.0, 3.0, 3.5])
  monkeypatch.setattr(Tracker, '_distance', lambda self, params: (next(values), 0.1))
  workdirs.claim(tmp_path, CONFIG)
  tracker = track()
  for done in (2, 4, 6):
    tracker.measure(done, {'value': np.float32(done)})
  tracker.forget(4)
  assert recorded(tmp_path)['frechet'] == {'2': 5.0, '4': 4.0} and recorded(tmp_path)['best'] is None
  tracker.measure(6, {'value': np.float32(7)})  # higher than before, and yet the best of this attempt
  assert recorded(tmp_path)['best'] == {'updates': 6, 'frechet': 3.5}
  weights = safetensors.numpy.load_file(tmp_path / BASE.name / 'best' / model.WEIGHTS)
  assert weights['value'] == 7.0
  tracker.forget(6)
  assert recorded(tmp_path)['best'] == {'updates': 6, 'frechet': 3.5}


def test_measurements_of_another_kind_are_refused_while_they_decide(track, monkeypatch, tmp_path):
  monkeypatch.setattr(Tracker, '_distance', lambda self, params: (1.0, 0.1))
  workdirs.claim(tmp_path, CONFIG)
  track().measure(2, {'value': np.float32(0)})
  track().check_record()
  other = {'log__frechet_every': 4, 'log__frechet_samples': 30}
  with pytest.raises(UserError, match='every was 2, is 4, samples was 20, is 30'):
    track(config=tiny.config(early_stop__patience=2, **other)).check_record()
  track(config=tiny.config(**other)).check_record()  # without early stopping, they begin anew


@pytest.mark.parametrize(
  ('keys', 'message'),
  [
    ({}, 'early_stop.patience=2 counts measurements, but log.frechet_every=0 takes none'),
    ({'log__frechet_every': 2, 'dataset__name': 'none'}, 'needs images to compare samples with'),
  ],
)
def test_patience_without_measurements_is_refused(keys, message):
  with pytest.raises(UserError, match=message):
    tracking.check(tiny.config(early_stop__patience=2, **keys))


def test_patience_may_be_set_after_a_stage_that_was_finished_without():
  """Otherwise students could not be stopped early if their base was imported, or trained to its end."""
  plain = json.loads(tiny.config().to_json())
  config = tiny.config(log__frechet_every=4, early_stop__patience=3)
  path = tiny.ROOT / 'base' / 'stage.json'
  expected = dict.fromkeys(comparison._CHECKED) | {'method': 'denoising', 'network': {}, 'schedule': {}}
  comparison.check_lineage(path, expected | {'config': plain, 'finished': True}, expected, config)
  comparison.check_config(tiny.ROOT / 'config.json', plain, config)
  for unfinished in ({}, {'finished': True, 'early_stop': {'patience': 2}}):
    with pytest.raises(UserError, match=r'early_stop\.patience was 0, is 3'):
      comparison.check_lineage(path, expected | {'config': plain} | unfinished, expected, config)


def test_a_stage_is_refused_with_another_patience(tmp_path):
  made = json.loads(CONFIG.to_json())
  other = tiny.config(log__frechet_every=4, early_stop__patience=3)
  with pytest.raises(UserError, match=r'early_stop\.patience was 2, is 3'):
    comparison.check_config(tmp_path / 'stage.json', made, other, 'base')


def test_the_gate_does_not_lengthen_what_ended_early(track, monkeypatch, tmp_path):
  config = tiny.config(log__frechet_every=2, early_stop__patience=2, gate__factor=1.5, gate__stop=False)
  found = gate.Gate(config, tmp_path, IMAGES)
  monkeypatch.setattr(found, '_measured', lambda model, teacher: gate.Shortfall(9.0, 1.0, 0.5, 7.0, 0.1))
  student = provenance.Model(tiny.plan()[0][1], 'ema', '', 8, 0.0, {})
  assert found.judge(student, student) is None


VALUES = (5.0, 4.0, 3.95, 4.2, 4.2, 1.0)  # the fourth is the second without an improvement


class Scripted:
  """Distances in the order of new weights; the same weights always have the same one."""

  def __init__(self):
    self.known, self.signal_at = {}, None

  def __call__(self, tracker, params):
    self.known.setdefault(digest(params), len(self.known))
    place = self.known[digest(params)]
    if self.signal_at == place:
      self.signal_at = None
      signal.raise_signal(signal.SIGTERM)
      interrupts.check()
    return VALUES[place], 0.1


@pytest.mark.slow
def test_a_stage_that_no_longer_improves_ends_with_its_best_weights(step, track, monkeypatch, tmp_path):
  script = Scripted()
  monkeypatch.setattr(Tracker, '_distance', lambda self, params: script(self, params))

  def trained(name, tracked=True):
    workdir = tmp_path / name
    workdir.mkdir(exist_ok=True)
    tracker = track(workdir) if tracked else None
    return loop.fit(step, BASE, Inputs(IMAGES, tracker=tracker), workdir, CONFIG)

  whole, directory = trained('whole'), tmp_path / 'whole'
  lineage = json.loads((directory / 'base/stage.json').read_text())
  assert list(recorded(directory)['frechet']) == ['2', '4', '6', '8'] and whole.step == 8
  assert recorded(directory)['best'] == {'updates': 6, 'frechet': 3.95}
  assert lineage['early_stop']['updates'] == 8 and lineage['early_stop']['patience'] == 2
  assert lineage['early_stop']['measured']['best'] == recorded(directory)['best']
  assert lineage['finished'] and lineage['num_updates'] == BASE.num_updates
  best = model.read(directory / 'base/best')
  assert whole.digest == best.digest == model.read(directory / 'base/model').digest
  assert digest(whole.all['last']) != best.digest

  handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
  try:  # at the second and at the last measurement
    for place in (1, 3):
      script.signal_at = place
      interrupts.install()
      with pytest.raises(Preempted):
        trained('stopped')
    interrupts.install()
    assert trained('stopped').digest == whole.digest
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
  again = json.loads((tmp_path / 'stopped/base/stage.json').read_text())
  assert {**again, 'seconds': 0} == {**lineage, 'seconds': 0}
  assert recorded(tmp_path / 'stopped') == recorded(directory)

  # Finished: it is read, not trained, also from its checkpoint.
  for weights in ('ema', 'last'):
    loaded = provenance.load_model(directory, BASE, CONFIG, (weights,))
    assert (loaded.step, loaded.digest) == (8, whole.digest)
  assert trained('whole', tracked=False).step == 8
  shutil.rmtree(directory / 'base/model')
  assert trained('whole', tracked=False).digest == whole.digest
  assert extending.stopped_at(directory, BASE) == 8
  longer = tiny.config(train__num_updates=20, **{'early_stop__patience': 2, 'log__frechet_every': 2})
  with pytest.raises(UserError, match=r'early_stop\.patience ended it after 8 updates with its best'):
    extending.check_configs(directory, [BASE], longer)
  shutil.rmtree(directory / 'base/model')
  shutil.rmtree(directory / 'base/checkpoints/8')
  with pytest.raises(DamagedError, match='was stopped early after 8 updates, but neither its model'):
    trained('whole', tracked=False)

  # A stage that improves to its end has its best weights, too.
  monkeypatch.setattr('tests.run.early_stop_test.VALUES', (5.0, 4.0, 3.0, 2.0, 1.0, 1.5))
  script.known.clear()
  assert trained('improving').step == 12
  assert recorded(tmp_path / 'improving')['best']['updates'] == 10
  assert model.read(tmp_path / 'improving/base/model').digest != whole.digest
  assert (
    model.read(tmp_path / 'improving/base/model').digest
    == model.read(tmp_path / 'improving/base/best').digest
  )


def test_a_run_checks_its_patience(tmp_path):
  with pytest.raises(UserError, match=r'early_stop\.patience=1 counts measurements'):
    run._check(tiny.config(early_stop__patience=1), tmp_path, [])
