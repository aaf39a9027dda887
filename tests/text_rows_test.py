"""Runs of texts are measured as others are: rows of results.json, kept and resumed, and the gate, at tiny size."""

import json
import shutil

import numpy as np
import pytest

import diffusion_distillation
from diffusion_distillation.evaluation import by_class, elsewhere, features, figures, measure, report
from diffusion_distillation.evaluation.sampled_texts import SampledTexts
from diffusion_distillation.interop import clip, importing
from diffusion_distillation.run import compared, samples
from diffusion_distillation.run import run as runs
from tests import captioned, text_model
from tests.interop import clip_test

pytestmark = pytest.mark.slow

WEIGHTS = {'evaluation__guidance': (0.0, 1.5)}


@pytest.fixture(scope='module', autouse=True)
def dataset():
  """The dataset is known, and its classifier is trained for a moment."""
  with pytest.MonkeyPatch.context() as patch:
    captioned.register(patch)
    patch.setattr(features, '_UPDATES', 40)
    patch.setattr(figures, 'to_png', lambda figure, theme: b'png')  # drawing takes long
    yield


def begin(directory, **changes):
  c = captioned.config('', **changes)
  importing.adopt_stored(c, directory, text_model.stored(), {'source': 'test', 'folder': 'nowhere'})
  return c


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
  """The config and the workdir of a run that was evaluated, with its results; tests copy it."""
  directory = tmp_path_factory.mktemp('measured') / 'run'
  c = begin(directory, **WEIGHTS)
  runs.run(c, directory)
  return c, directory, json.loads((directory / 'results.json').read_text())


def values(results):
  return [(row['value'], row['class_accuracy'], row['metrics']) for row in results['rows']]


def assert_equal(results, others):
  for found, expected in zip(values(results), values(others), strict=True):
    assert found[:2] == pytest.approx(expected[:2], rel=1e-6)
    assert found[2] == pytest.approx(expected[2], rel=1e-6)


def test_a_row_measures_what_the_model_draws_for_the_captions(measured):
  """Its images are those that `load(...).sample` draws for the same texts, one model and weight at a time."""
  c, directory, results = measured
  images = captioned.open_squares(c.dataset, 'train')
  texts, index = SampledTexts(text_model.text_encoder(), images), np.arange(24)
  model = diffusion_distillation.load(directory)
  extractor = features.load_or_train(directory / 'extractor.safetensors', None, None)
  predict = by_class.predictor(extractor)
  assert [row['guidance'] for row in results['rows']] == [0.0, 1.5]
  for row in results['rows']:
    drawn = model.sample(seed=1, prompts=texts.texts(index, 1), guidance=row['guidance'])
    right = predict(extractor(drawn)) == texts.labels(index, 1)
    assert row['class_accuracy'] == pytest.approx(right.mean())
    assert row['by_class']['count'] == [8, 8, 8] and row['nfe'] == (8 if row['guidance'] else 4)
    if not row['guidance']:
      with np.load(directory / 'report' / 'samples.npz') as shown:
        np.testing.assert_array_equal(shown['base, 4 steps'], drawn[:16])
  assert results['captions'] == {
    'split': 'train',
    'name': 'squares',
    'num_captions': 24,
    'digest': '24 squares',
  }
  page = (directory / 'report' / 'index.html').read_text()
  assert '<th>class accuracy</th>' in page and 'Of the real held-out images, it assigns' in page
  assert page.count('<figcaption>base, 4 steps, guidance 1.5</figcaption>') == 8


def test_an_interrupted_evaluation_in_other_batches_continues_with_the_missing_rows(
  measured, tmp_path, monkeypatch
):
  c, directory, results = measured
  c = c.copy_and_resolve_references()
  c.evaluation.batch_size = 8
  shutil.copytree(directory, tmp_path / 'run')
  (tmp_path / 'run' / 'results.json').unlink()
  really, asked = measure.measure_setting, []

  def once(config, setting, *args):
    asked.append(setting.guidance.weight)
    if len(asked) == 2:
      raise KeyboardInterrupt
    return really(config, setting, *args)

  monkeypatch.setattr(measure, 'measure_setting', once)
  with pytest.raises(KeyboardInterrupt):
    runs.run(c, tmp_path / 'run')
  runs.run(c, tmp_path / 'run')
  runs.run(c, tmp_path / 'run')  # all rows are there
  assert asked == [0.0, 1.5, 1.5]
  assert_equal(json.loads((tmp_path / 'run' / 'results.json').read_text()), results)


def test_prompts_of_a_file_are_measured_as_with_the_folder_of_the_model(measured, tmp_path):
  """By every metric and by the CLIP score."""
  c, directory, _ = measured
  shutil.copytree(directory, tmp_path / 'run')
  (tmp_path / 'p.txt').write_text('\n'.join(text_model.PROMPTS * 5))
  c = c.copy_and_resolve_references().unlock()
  c.evaluation.update({'prompts': str(tmp_path / 'p.txt'), 'clip': str(clip_test.write(tmp_path / 'c'))})
  c.evaluation.guidance = (1.5,)
  runs.run(c, tmp_path / 'run')
  found = json.loads((tmp_path / 'run' / 'results.json').read_text())
  (row,) = found['rows']
  assert 'class_accuracy' not in row and row['metrics']['clip_score'] != 0.0
  assert found['metrics']['clip_score'] == {'better': 'higher'} and found['prompts']['file'] == 'p.txt'
  train = captioned.open_squares(c.dataset, 'train')
  read = clip.read(c.evaluation.clip)
  scores = 100 * np.sum(read.of_images(list(train.images)) * read.of_texts(train.captions), axis=-1)
  real = found['clip']['real_images']
  rounding = 100 * 2**-23  # of a hundredfold cosine, which is as large for a cosine near zero
  assert real == {
    'value': pytest.approx(scores.mean(), abs=rounding),
    'error': real['error'],
    'num_images': 24,
  }
  page = (tmp_path / 'run' / 'report' / 'index.html').read_text()
  assert f'<td>{report.measured(real["value"], real["error"])}</td>' in page
  assert 'with their own captions' in page and 'CLIP score ↑' in page
  folder = directory / 'base' / 'model'
  model = diffusion_distillation.load(folder)
  asked = compared.read(c)
  other, _ = elsewhere.measure_model(c, model, folder, tmp_path / 'other.json', asked)
  assert other['extractor'] == found['extractor'] and other['clip'] == found['clip']
  assert row['metrics'] == pytest.approx(other['metrics'], rel=1e-6)
  assert row['errors'] == pytest.approx(other['errors'], rel=1e-6)


def test_students_have_rows_and_the_gate_and_the_tracker_measure_them(tmp_path):
  c = begin(
    tmp_path / 'run',
    methods=('knowledge',),
    gate__factor=1e6,
    gate__samples=24,
    log__frechet_every=2,
    log__frechet_samples=24,
    dataset__prepared=str(tmp_path / 'encoded'),
  )
  runs.run(c, tmp_path / 'run')
  results = json.loads((tmp_path / 'run' / 'results.json').read_text())
  assert [(row['stage'], row['num_steps'], row['guidance']) for row in results['rows']] == [
    ('base', 4, 0.0),
    ('base', 1, 0.0),
    ('knowledge', 1, 0.0),
  ]
  (check,) = json.loads((tmp_path / 'run' / 'knowledge' / 'gate.json').read_text())['checks']
  assert check['passed'] and check['texts'] == '24 squares'
  track = json.loads((tmp_path / 'run' / 'knowledge' / 'track.json').read_text())
  assert set(track['frechet']) == {'2', '4'}
  assert check['student'] != pytest.approx(results['rows'][2]['value'], rel=1e-3)  # of other noise
  c = c.copy_and_resolve_references().unlock()
  c.gate.factor, c.evaluation.seed = 0.0, samples.seed_of(c)
  runs.run(c, tmp_path / 'run')
  results = json.loads((tmp_path / 'run' / 'results.json').read_text())
  own = results['rows'][2]['value']  # of the same noise and texts, with as many images
  assert track['frechet']['4'] == pytest.approx(own, rel=1e-6)
  assert check['student'] == pytest.approx(own, rel=1e-6)
