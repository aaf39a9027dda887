"""The quality gate on models in closed form, and in whole runs that are interrupted."""

import dataclasses
import json
import shutil
import signal
import types

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.diffusion.guidance import NONE
from diffusion_distillation.diffusion.process import Prediction
from diffusion_distillation.diffusion.schedules import Cosine
from diffusion_distillation.errors import Preempted, QualityError
from diffusion_distillation.evaluation import features as extractors
from diffusion_distillation.evaluation import measure
from diffusion_distillation.evaluation.extracted import Extracted
from diffusion_distillation.evaluation.metrics import Features
from diffusion_distillation.networks.spaces import Pixels
from diffusion_distillation.run import gate, run, samples
from diffusion_distillation.run.gate import Gate
from diffusion_distillation.stages.provenance import Model
from diffusion_distillation.system import interrupts
from diffusion_distillation.system.checkpoints import Checkpoints
from tests import tiny
from tests.exact import Gaussian

DATA = Gaussian(0.1, 0.2)  # of every pixel


@dataclasses.dataclass(frozen=True)
class Known:
  """A network in closed form; with the parameters `exact` = 1, a one-step student that has learned its teacher's flow."""

  conditioning = types.MappingProxyType({})

  def __call__(self, params, z, logsnr, cond, rng=None):
    logsnr = logsnr[:, None, None, None]
    prediction = DATA(z, logsnr)
    x = jnp.where(params['exact'], DATA.consistency(z, logsnr), prediction.x) + params['shift']
    return Prediction(x, prediction.eps)


@dataclasses.dataclass(frozen=True)
class Pooled:
  """An extractor without training: the means of the 16 squares of an 8x8 image."""

  name: str = 'pixels'
  digest: str = 'of pixels'
  task: str = 'none'
  accuracy: float = 1.0
  metric: str = 'FD-pixels'

  def of(self, images):
    return Extracted(self(images))

  def __call__(self, images):
    return images.reshape(-1, 4, 2, 4, 2).mean((2, 4)).reshape(-1, 16) / 16.0


def stage(name, num_steps, parent='base'):
  return types.SimpleNamespace(
    **{'name': name, 'num_steps': num_steps, 'sampler': 'ddim', 'denoise': Known(), 'pairs': None},
    **{'schedule': Cosine(), 'space': Pixels(), 'image_shape': (8, 8, 1), 'parent': parent},
    **{'num_updates': 8, 'recipe': types.SimpleNamespace(method=types.SimpleNamespace())},
  )


def model(of, digest, exact=False, shift=0.0):
  params = {'exact': np.array(exact), 'shift': np.float32(shift)}
  return Model(of, 'ema', digest, 8, 0.0, {'ema': params})


TEACHER = model(stage('base', 64), 'teacher')
UNTRAINED, GOOD = (model(stage('student', 1), f'{exact}', exact) for exact in (False, True))
SPOILED = model(stage('student', 1), 'spoiled', exact=True, shift=0.2)


def of_data():
  """Features of images whose pixels have the law `DATA`."""
  pixels = np.random.default_rng(7).normal(DATA.mean, DATA.std, (4000, 8, 8, 1)).astype(np.float32)
  found = np.asarray(Pooled()(np.asarray(Pixels().decode(jnp.asarray(pixels)))))
  return Features(gate.moments_of(found), found, len(found))


@pytest.fixture
def judge(tmp_path, monkeypatch):
  """A gate of the factor 2 whose training images have pixels of the law `DATA`."""
  real = of_data()
  monkeypatch.setattr(Gate, '_prepared', lambda self: (Pooled(), real))
  (tmp_path / 'student').mkdir()
  config = tiny.config(gate__factor=2.0, gate__samples=500, evaluation__batch_size=256)
  return Gate(config, tmp_path, None)


def test_a_student_that_was_spoiled_or_learned_nothing_is_caught_and_a_good_one_passes(judge):
  untrained, spoiled, good = (
    judge._measured(student, TEACHER) for student in (UNTRAINED, SPOILED, GOOD)
  )
  assert untrained.fails and spoiled.fails and not good.fails
  assert good.student < 2 * good.floor and good.teacher < 2 * good.floor < spoiled.student
  checks = json.loads((judge._workdir / 'student' / 'gate.json').read_text())['checks']
  assert [check['passed'] for check in checks] == [False, False, True]
  assert [check['student_digest'] for check in checks] == ['False', 'spoiled', 'True']
  assert {(check['student_steps'], check['teacher_steps']) for check in checks} == {(1, 64)}


def test_a_measurement_is_read_back_unless_anything_that_it_depends_on_changed(judge, monkeypatch):
  found, drawn = judge._measured(GOOD, TEACHER), []
  again = Gate(judge._config, judge._workdir, None)
  features = Gate._features

  def drawing(self, extractor, model, guidance=NONE):
    drawn.append(model.digest)
    return features(self, extractor, model, guidance)

  monkeypatch.setattr(Gate, '_features', drawing)
  assert again._measured(GOOD, TEACHER) == found and not drawn
  other = dataclasses.replace(TEACHER, digest='another')
  again._measured(GOOD, other)
  assert drawn == ['another', 'True']
  stricter = Gate(tiny.config(gate__factor=3.0, gate__samples=500), judge._workdir, None)
  assert stricter._measured(GOOD, TEACHER).value != found.value and len(drawn) == 4
  balanced = {'gate__factor': 2.0, 'gate__samples': 500, 'evaluation__labels': 'balanced'}
  Gate(tiny.config(**balanced), judge._workdir, None)._measured(GOOD, TEACHER)
  assert len(drawn) == 6  # other labels: other samples
  checks = json.loads((judge._workdir / 'student' / 'gate.json').read_text())['checks']
  assert [check['labels'] for check in checks] == ['data', 'data', 'data', 'balanced']


def test_another_grid_of_the_base_or_another_seed_is_another_measurement(judge):
  """The student's own grid does not change."""
  teacher = dataclasses.replace(TEACHER, stage=stage('base', 4, parent=None))
  keys = {'gate__factor': 2.0, 'gate__samples': 500}
  found = judge._measured(GOOD, teacher)
  other = Gate(tiny.config(**keys, evaluation__grid='karras'), judge._workdir, None)
  changed = other._measured(GOOD, teacher)
  assert changed.teacher != found.teacher and changed.student == found.student
  assert judge._measured(GOOD, teacher) == found
  Gate(tiny.config(**keys, evaluation__seed=5), judge._workdir, None)._measured(GOOD, teacher)
  checks = json.loads((judge._workdir / 'student' / 'gate.json').read_text())['checks']
  assert [check['grid'] for check in checks] == ['uniform', 'karras', 'uniform']
  assert [check['seed'] for check in checks] == [2**30 + 1, 2**30 + 1, 2**30 + 5]


def test_measurements_that_select_weights_do_not_have_the_samples_of_the_evaluation(tmp_path):
  config, of = tiny.config(evaluation__batch_size=256), GOOD.stage

  def features(by_seed):
    images = measure.drawer(config, of, 'ddim').draw(GOOD.params, grid, 300, by_seed)
    return Pooled()(np.asarray(images, np.float32))

  grid, seed = measure.grid(config, of, of.num_steps), config.evaluation.seed
  found = samples.features_of(config, tmp_path, Pooled(), of, GOOD.params, 300)
  np.testing.assert_allclose(found, features(samples.seed_of(config)), rtol=1e-5)
  own = {tuple(row) for row in features(seed).round(4).tolist()}
  assert not own & {tuple(row) for row in found.astype(float).round(4).tolist()}
  for k in (0, 1, 2**30, 2**31 - 1):
    config.evaluation.seed = k
    assert 0 <= samples.seed_of(config) < 2**31 and samples.seed_of(config) != k


def test_only_the_training_images_are_summarized_for_measurements_during_training(monkeypatch, tmp_path):
  monkeypatch.setattr(samples, 'load_or_train', lambda path, train, held_out: Pooled())
  (_, images), config = tiny.plan(), tiny.config()
  _, found = samples.prepare(config, tmp_path, images)
  assert found.count == len(images)
  directory = samples.directory_of(tmp_path, Pooled())
  assert [path.name for path in directory.iterdir()] == ['reference.safetensors']


SPOILING = {
  'train__num_updates': 6,
  'distill__end_steps': 2,
  'distill__learning_rate': (10.0,),
  'evaluation__samplers': ('ddim',),
  'gate__factor': 1.0,
  'gate__samples': 64,
  'gate__limit': 2.0,
}
NAME = 'progressive_0002'


@pytest.fixture
def runs(monkeypatch, step):
  """Runs a config in a workdir; before the update `stop`, a signal arrives or, if `crash`, an exception."""

  def extractor(path, train, held_out):
    return Pooled()

  for module in (samples, extractors):
    monkeypatch.setattr(module, 'load_or_train', extractor)

  def start(workdir, stop=None, crash=False, **changes):
    def stopping(recipe, state, frozen, batch):
      if 'teacher' in frozen and int(state.step) == stop:
        if crash:
          raise RuntimeError('a crash')
        signal.raise_signal(signal.SIGTERM)
      return step(recipe, state, frozen, batch)

    monkeypatch.setattr(run.sharding, 'compile_step', lambda _: stopping)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    interrupts.install()
    try:
      run.run(tiny.config(**SPOILING | changes), workdir)
    finally:
      for number, handler in handlers.items():
        signal.signal(number, handler)

  return start


def outcome(workdir):
  """stage.json without seconds, and gate.json."""
  lineage = json.loads((workdir / NAME / 'stage.json').read_text())
  del lineage['seconds'], lineage['config']
  return lineage, json.loads((workdir / NAME / 'gate.json').read_text())


@pytest.mark.slow
def test_a_stage_that_was_stopped_while_it_was_trained_for_longer_ends_like_an_uninterrupted_one(
  runs, tmp_path, caplog
):
  """It fails after 8 and after 12 updates, and at the limit, 16, the run goes on."""
  at_once, stopped, crashed = (tmp_path / name for name in ('at_once', 'stopped', 'crashed'))
  runs(at_once, gate__stop=False)
  expected = outcome(at_once)
  assert expected[0]['extended_from'] == [8, 12] and expected[0]['num_updates'] == 16
  assert [check['updates'] for check in expected[1]['checks']] == [8, 12, 16]
  assert 'training it to 12 updates' in caplog.text and 'the run continues' in caplog.text
  rows = json.loads((at_once / 'results.json').read_text())['rows']
  assert {row['updates'] for row in rows if row['stage'] == NAME} == {16}

  with pytest.raises(Preempted):
    runs(stopped, 9, gate__stop=False)
  assert not json.loads((stopped / NAME / 'stage.json').read_text())['finished']
  with pytest.raises(QualityError, match=f'{NAME} falls short .* after 16 updates'):
    runs(stopped)
  with pytest.raises(QualityError):  # nothing is trained or measured again
    runs(stopped, 0)
  runs(stopped, 0, gate__stop=False)
  assert outcome(stopped) == expected

  with pytest.raises(RuntimeError):
    runs(crashed, 8, crash=True, gate__stop=False)
  assert Checkpoints(crashed / NAME).steps() == [5, 8]
  shutil.rmtree(crashed / NAME / 'checkpoints' / '8')  # updates 5 to 7 are trained again
  runs(crashed, gate__stop=False, compute__updates_per_dispatch=1)
  assert outcome(crashed) == expected


@pytest.mark.slow
def test_a_finished_run_is_judged_when_it_gets_a_gate(runs, tmp_path):
  runs(tmp_path, gate__factor=0.0)
  assert not (tmp_path / NAME / 'gate.json').exists()
  with pytest.raises(QualityError):
    runs(tmp_path, gate__extra=1.0)
  lineage, checks = outcome(tmp_path)
  assert lineage['extended_from'] == [8] and [c['updates'] for c in checks['checks']] == [8, 16]
  runs(tmp_path, gate__factor=1e6)
  assert outcome(tmp_path)[0]['num_updates'] == 16
