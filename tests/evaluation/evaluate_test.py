"""An evaluation whose drawing is replaced: what is drawn and read, by which law, and what is kept for the next one."""

import json

import numpy as np
import pytest

from diffusion_distillation.datasets.image_set import InMemory
from diffusion_distillation.evaluation import by_class, dinov2, features, figures, measure, sampling
from diffusion_distillation.evaluation.frechet import Moments, frechet_distance
from diffusion_distillation.evaluation.results import note_missing, sampling_floor
from diffusion_distillation.networks.dinov2 import Size
from diffusion_distillation.stages.provenance import Model
from tests import tiny

NUM_SAMPLES, SHOWN = 48, 16


@pytest.fixture(scope='module')
def extractor(tmp_path_factory):
  """The file of an extractor that has hardly been trained."""
  path, images = tmp_path_factory.mktemp('extractor') / 'extractor.safetensors', tiny.plan()[1]
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(features, '_UPDATES', 2)
    features.load_or_train(path, images, images)
  return path


@pytest.fixture
def workdir(extractor, tmp_path):
  (tmp_path / 'extractor.safetensors').symlink_to(extractor)
  return tmp_path


class Asked(list):
  """Drawers that were asked for images, with the number of images; those of a row first."""

  def rows(self):
    return [drawer for drawer, count in self if count == NUM_SAMPLES]

  def shown(self):
    return [drawer for drawer, count in self if count == SHOWN]


@pytest.fixture
def asked(monkeypatch):
  """Every image that is drawn is a training image, from another one on for each number of steps."""
  found, real = Asked(), tiny.plan()[1].images.images

  def draw(self, params, grid, num_samples, seed, chosen=None):
    found.append((self, num_samples))
    return real[len(grid) :][:num_samples]

  def seconds_per_image(self, params, grid, num_samples, seed, then, use, first):
    for batch in np.split(draw(self, params, grid, num_samples, seed), 3):
      if use(then(batch), len(batch)):
        break
    return 0.001

  monkeypatch.setattr(sampling.Drawer, 'seconds_per_image', seconds_per_image)
  monkeypatch.setattr(sampling.Drawer, 'draw', draw)
  monkeypatch.setattr(figures, 'to_png', lambda figure, theme: b'png')  # drawing takes long
  return found


@pytest.fixture
def read(monkeypatch):
  """Numbers of images that were read together."""
  found, really = [], InMemory.batch
  monkeypatch.setattr(
    InMemory, 'batch', lambda self, index: found.append(len(index)) or really(self, index)
  )
  return found


def evaluate(workdir, again=False, **overrides):
  """Of the tiny config's stages, three of them, with a row by ddim for each of two step counts of the base."""
  overrides = {'evaluation__samplers': ('ddim',), 'evaluation__neighbours': 0} | overrides
  stages, images = tiny.plan(**overrides)
  models = []
  for stage in stages:
    params = {'of': np.array(stage.name)}
    sets = dict.fromkeys(stage.weights, params)
    models.append(Model(stage, 'ema', f'digest of {stage.name}', 7, 1.5, sets))
  return measure.evaluate(tiny.config(**overrides), models, images, workdir, again), images.images


def test_conditional_models_are_drawn_with_the_labels_of_the_data_or_balanced_ones(workdir, asked):
  conditional = {'model__conditional': True}
  results, images = evaluate(workdir, **conditional)
  sizes = tuple(np.bincount(images.labels).tolist())
  assert [drawer.label_counts for drawer in asked.rows()] == [sizes] * 5
  assert results['labels'] == 'data' and {row['labels'] for row in results['rows']} == {'data'}
  assert 'have the proportions of' in (workdir / 'report' / 'index.html').read_text()

  asked.clear()
  balanced, _ = evaluate(workdir, evaluation__labels='balanced', **conditional)
  assert [drawer.label_counts for drawer in asked.rows()] == [()] * 5
  assert balanced['labels'] == 'balanced' and {row['labels'] for row in balanced['rows']} == {'balanced'}
  assert balanced['floor'] == results['floor']
  assert 'labels of the samples are balanced' in (workdir / 'report' / 'index.html').read_text()


def test_rows_of_conditional_models_have_the_classifier_s_view_of_their_classes(workdir, asked):
  """Every image that is drawn is a training image, whose class the classifier has hardly learned."""
  results, images = evaluate(workdir, model__conditional=True)
  extractor = features.load_or_train(workdir / 'extractor.safetensors', None, None)
  predicted = by_class.predictor(extractor)(extractor(images.images))
  for row in results['rows']:
    start = row['num_steps'] + 1
    drawn = slice(start, start + NUM_SAMPLES)
    labels = asked.rows()[0].cond(np.arange(NUM_SAMPLES), row['seed'])['label']
    assert row['class_accuracy'] == pytest.approx(np.mean(predicted[drawn] == labels))
    assert row['by_class']['count'] == np.bincount(labels, minlength=10).tolist()
    assert 'frechet' not in row['by_class']  # of five samples
  assert sum(results['class_shares']) == pytest.approx(1.0)
  unconditional, _ = evaluate(workdir, again=True)
  for row in unconditional['rows']:
    shares = np.bincount(predicted[row['num_steps'] + 1 :][:NUM_SAMPLES], minlength=10) / NUM_SAMPLES
    assert row['by_class'] == {'share': pytest.approx(shares.tolist())} and 'class_accuracy' not in row


def test_samples_that_are_training_images_are_told_to_be_copies(workdir, asked, monkeypatch):
  found = []
  monkeypatch.setattr(measure.report, 'write', lambda config, results, seen, *_: found.append(seen))
  evaluate(workdir, evaluation__neighbours=50_000)
  evaluate(workdir, evaluation__neighbours=100, evaluation__neighbours_of='base')
  last, some = found
  assert last.neighbours_of == 'progressive_0001' and last.neighbours.searched == 1437
  assert last.neighbours.pixels.ratio == 0.0 and last.neighbours.pixels.closer == 1.0
  np.testing.assert_array_equal(last.neighbours.by_pixels[:, 0], last.neighbours.samples)
  assert some.neighbours_of == 'base' and some.neighbours.searched == 100
  assert some.neighbours.pixels.ratio > 0.5


def forget_the_law(workdir):
  """Rows as they were before labels had a law."""
  path = workdir / 'results.json'
  results = json.loads(path.read_text())
  for row in results['rows']:
    del row['labels']
  path.write_text(json.dumps(results))


def test_rows_of_before_had_balanced_labels_or_none(workdir, asked):
  for conditional in (False, True):
    evaluate(workdir, evaluation__labels='balanced', model__conditional=conditional)
    for law, rows in (('balanced', 0), ('data', 5 * conditional)):
      forget_the_law(workdir)
      asked.clear()
      results, _ = evaluate(workdir, evaluation__labels=law, model__conditional=conditional)
      assert len(asked.rows()) == rows
      assert {row['labels'] for row in results['rows']} == {law if conditional else None}
      (workdir / 'results.partial.json').unlink(missing_ok=True)


def test_rows_of_an_older_version_are_kept_and_said_to_lack_metrics(workdir, asked, caplog):
  """In a run; the mode that evaluates measures them again."""
  evaluate(workdir)
  path = workdir / 'results.json'
  old = json.loads(path.read_text())
  for row in old['rows'][:2]:
    row['metrics'] = {'frechet': row['value']}
    del row['error'], row['bias'], row['errors']
  path.write_text(json.dumps(old))
  asked.clear()
  results, _ = evaluate(workdir)
  assert not asked.rows() and results['rows'][:2] == old['rows'][:2]
  (line,) = [r.getMessage() for r in caplog.records if '--mode=evaluate' in r.getMessage()]
  assert line.startswith('2 of 5 rows were measured by an earlier evaluation and lack kid, precision,')
  assert 'frechet' not in line
  caplog.clear()
  again, _ = evaluate(workdir, again=True)
  assert len(asked.rows()) == 5 and all(row['metrics'].keys() > {'frechet'} for row in again['rows'])
  assert not caplog.records


def test_rows_have_errors_and_the_header_says_what_they_are_compared_with(workdir, asked):
  results, images = evaluate(workdir)
  names = ['frechet', 'kid', 'precision', 'recall', 'inception_score']
  for found in (*results['rows'], results['floor'], results['held_out']):
    assert list(found['metrics']) == names and found['value'] == found['metrics']['frechet']
    assert found['error'] == found['errors']['frechet'] > 0.0
    assert found['errors'].keys() >= {'frechet', 'inception_score'}
  better = {'frechet': 'lower', 'kid': 'lower'} | dict.fromkeys(names[2:], 'higher')
  assert results['metrics'] == {name: {'better': better[name]} for name in names}
  described = {'split': 'train', 'name': 'digits', 'digest': images.identity, 'num_images': len(images)}
  assert results['reference'] == described
  assert len(results['warnings']) == 2 and '48 samples' in results['warnings'][0]


@pytest.mark.slow
def test_a_file_is_the_reference_and_its_name_and_digest_stand_beside_the_numbers(
  workdir, asked, tmp_path
):
  first, _ = evaluate(workdir)
  path, rng = tmp_path / 'published.npz', np.random.default_rng(0)
  measured = []
  for shift in (0.0, 1.0):
    np.savez(path, mu=np.full(64, 3.0 + shift), sigma=np.cov(rng.normal(size=(200, 64)).T))
    asked.clear()
    results, _ = evaluate(workdir, evaluation__reference=str(path))
    assert len(asked.rows()) == 5  # rows of another reference are other rows
    assert results['reference']['file'] == 'published.npz'
    assert results['reference']['num_images'] is None and len(results['reference']['digest']) == 64
    for row in results['rows']:
      assert row['reference'] == 'published.npz' and row['value'] != first['rows'][0]['value']
      assert row['metrics'].keys() == {'frechet', 'inception_score'}
    assert results['floor']['value'] > first['floor']['value']
    assert 'the statistics in published.npz' in (workdir / 'report' / 'index.html').read_text()
    measured.append(results)
  assert measured[0]['reference']['digest'] != measured[1]['reference']['digest']
  asked.clear()
  again, _ = evaluate(workdir, evaluation__reference=str(path))
  assert not asked.rows() and again['rows'] == measured[1]['rows']
  assert again['skipped'] == {'train': 0, 'held_out': 0}


def test_nothing_is_drawn_twice(workdir, asked, monkeypatch):
  shown = []
  monkeypatch.setattr(
    measure.report, 'write', lambda config, results, seen, *_: shown.append(seen.samples)
  )
  evaluate(workdir)
  assert len(asked.rows()) == 3 + 2 and not asked.shown()
  asked.clear()
  evaluate(workdir)
  assert not asked.rows() and len(asked.shown()) == 3  # the rows are known, their images are not
  assert [list(rows) for rows in shown] == [list(shown[0])] * 2 and len(shown[0]) == 3
  for one, other in zip(*(rows.values() for rows in shown), strict=True):
    assert len(one) == SHOWN
    np.testing.assert_array_equal(one, other)


def test_features_of_real_images_are_computed_once(workdir, asked, read):
  first, images = evaluate(workdir)
  assert sum(read) == len(images) + 360  # the floor is drawn from the former
  read.clear()
  second, _ = evaluate(workdir, again=True)
  assert not read
  for key in ('floor', 'held_out', 'reference', 'skipped'):
    assert second[key] == first[key]
  values = [[row['value'] for row in results['rows']] for results in (first, second)]
  assert values[0] == values[1]
  other, _ = evaluate(workdir, evaluation__seed=2)
  drawn = np.random.Generator(np.random.Philox(2)).integers(len(images), size=NUM_SAMPLES)
  assert sum(read) == len(set(drawn.tolist())) and other['floor']['seed'] == 2
  assert other['floor']['value'] != first['floor']['value'] and other['held_out'] == first['held_out']


def test_with_a_file_as_reference_the_shares_of_classes_are_those_of_the_training_images(
  workdir, asked, tmp_path
):
  """A file has no individual features; the floor, training images that are drawn with replacement, stands for them."""
  np.savez(tmp_path / 'published.npz', mu=np.zeros(64), sigma=np.eye(64))
  results, images = evaluate(workdir, evaluation__reference=str(tmp_path / 'published.npz'))
  extractor = features.load_or_train(workdir / 'extractor.safetensors', None, None)
  rng = np.random.Generator(np.random.Philox(results['floor']['seed']))
  drawn = images.images[rng.integers(len(images), size=NUM_SAMPLES)]
  predicted = by_class.predictor(extractor)(extractor(drawn))
  expected = np.bincount(predicted, minlength=10) / NUM_SAMPLES
  assert results['class_shares'] == pytest.approx(expected.tolist())


def test_with_a_file_as_reference_its_distance_from_the_training_images_is_no_error(
  workdir, asked, tmp_path
):
  """Rows far from both end early; without a bias, of so few images, the floor stands for it."""
  np.savez(tmp_path / 'published.npz', mu=np.full(64, 9.0), sigma=np.eye(64))
  found, _ = evaluate(
    workdir,
    evaluation__reference=str(tmp_path / 'published.npz'),
    evaluation__tolerance=0.3,
    evaluation__num_samples=96,
  )
  floor = found['floor']
  assert 0.0 < sampling_floor(found) == floor['bias'] < 0.3 * floor['value']
  assert [row['num_drawn'] for row in found['rows']] == [32] * 5
  assert sampling_floor(found | {'floor': floor | {'bias': None}}) == floor['value']
  assert sampling_floor(found | {'reference': {'split': 'train'}}) == floor['value']


def test_rows_say_why_they_lack_metrics(caplog):
  metrics = {'frechet': {}, 'kid': {}, 'precision': {}, 'fd_dinov2': {}}
  of_two = {'frechet': 1.0, 'kid': 1.0, 'precision': 1.0}
  rows = [
    {'num_samples': 90, 'num_drawn': 90, 'metrics': of_two | {'fd_dinov2': 1.0}},
    {'num_samples': 90, 'num_drawn': 2, 'metrics': of_two},
    {'num_samples': 90, 'num_drawn': 2, 'metrics': {'frechet': 1.0, 'fd_dinov2': 1.0}},
    {'num_samples': 90, 'num_drawn': 90, 'metrics': {'frechet': 1.0, 'kid': 1.0, 'fd_dinov2': 1.0}},
  ]
  note_missing({'metrics': metrics, 'rows': rows}, kept={0, 1})
  assert [record.getMessage() for record in caplog.records] == [
    '1 of 4 rows were measured by an earlier evaluation and lack fd_dinov2; --mode=evaluate measures all rows again',
    '1 of 4 rows have too few samples for kid, precision, because evaluation.tolerance ended them early',
    '1 of 4 rows have too few samples for precision; raise evaluation.num_samples',
  ]


@pytest.fixture
def of_dinov2(monkeypatch):
  """Makes a file of weights DINOv2's, with some pixels as features instead of the network."""

  def forward(params, images, size):
    return images.reshape(len(images), -1)[:, 20 : 20 + size.width] * params['scale'][None]

  def named(digest, width=4):
    params = {'scale': np.ones(width, np.float32)}
    found = dinov2.Weights(params, Size(width, 1, 1), digest)
    monkeypatch.setattr(dinov2, 'read_weights', lambda path, flag: found)
    return {'evaluation__dinov2': 'dinov2.pth'}

  monkeypatch.setattr(dinov2, '_forward', forward)
  monkeypatch.setattr(dinov2, 'preprocess', lambda images: images.astype(np.float32))
  return named


@pytest.mark.slow
def test_the_distance_by_dinov2_stands_beside_the_other_metrics(workdir, asked, of_dinov2, read, caplog):
  plain, _ = evaluate(workdir)
  asked.clear()
  kept, _ = evaluate(workdir, **of_dinov2('a'))  # like the rows of a run before its weights were named
  assert not asked.rows() and kept['dinov2'] == {'name': 'dinov2_vit414', 'digest': 'a'}
  assert '5 of 5 rows' in caplog.text and 'lack fd_dinov2' in caplog.text
  found, images = evaluate(workdir, again=True, **of_dinov2('a'))
  pixels = images.images.reshape(len(images), -1)[:, 20:24].astype(np.float64)
  real = Moments(pixels.mean(0), np.cov(pixels.T))
  for row, before in zip(found['rows'], plain['rows'], strict=True):
    assert row['value'] == before['value'] and row['metrics'].keys() - before['metrics'] == {'fd_dinov2'}
    drawn = pixels[row['num_steps'] + 1 :][:NUM_SAMPLES]
    expected = frechet_distance(real, Moments(drawn.mean(0), np.cov(drawn.T)))
    assert row['metrics']['fd_dinov2'] == pytest.approx(expected) and row['errors']['fd_dinov2'] > 0.0
  assert found['metrics']['fd_dinov2'] == {'better': 'lower'}
  assert {'fd_dinov2'} < found['floor']['metrics'].keys() & found['held_out']['metrics'].keys()
  report = (workdir / 'report' / 'index.html').read_text()
  assert 'FD-DINOv2' in report and 'dinov2_vit414' in report

  asked.clear()
  read.clear()
  again, _ = evaluate(workdir, **of_dinov2('a'))
  assert not asked.rows() and not read and again['rows'] == found['rows']
  evaluate(workdir)
  assert not asked.rows()  # without the weights, rows that were measured with them are still right
  named, _ = evaluate(workdir, **of_dinov2('b'))  # but nobody knows any more which weights these were
  assert not asked.rows() and all('fd_dinov2' not in row['metrics'] for row in named['rows'])
  evaluate(workdir, again=True, **of_dinov2('a'))
  asked.clear()
  evaluate(workdir, **of_dinov2('b'))
  assert len(asked.rows()) == 5  # other weights: other distances
