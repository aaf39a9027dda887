"""Runs of prompts alone have rows with a CLIP score, which are kept, resumed and shown as others are, at tiny size."""

import json
import logging
import shutil

import numpy as np
import pytest

import diffusion_distillation
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import figures, report, row_batches
from diffusion_distillation.evaluation.clip_score import RunningScore
from diffusion_distillation.evaluation.results import known_rows
from diffusion_distillation.interop import clip
from diffusion_distillation.run import evaluating, forecast
from diffusion_distillation.run import run as runs
from diffusion_distillation.stages import workdir
from tests import text_model
from tests.interop import clip_test

COUNT = 24


@pytest.fixture(scope='module', autouse=True)
def undrawn():
  """Figures are made, but not turned into pixels, which takes long."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(figures, 'to_png', lambda figure, theme: b'png')
    yield


@pytest.fixture(scope='module')
def measured(tmp_path_factory):
  """The config and the workdir of a run of prompts that was evaluated, and its results; tests copy it."""
  directory = tmp_path_factory.mktemp('prompts')
  folder, c = text_model.begin(
    directory,
    methods=(),
    evaluation__clip=str(clip_test.write(directory / 'tiny_clip')),
    evaluation__grid='uniform',  # as the model's own times
    evaluation__num_samples=COUNT,
    evaluation__batch_size=8,
    evaluation__guidance=(0.0, 1.5),
  )
  runs.run(c, folder)
  return c, folder, json.loads((folder / 'results.json').read_text())


def changed(config, **changes):
  found = config.copy_and_resolve_references().unlock()
  found.update_from_flattened_dict({f'evaluation.{key}': value for key, value in changes.items()})
  return found.lock()


def score(c, images, texts):
  model = clip.read(c.evaluation.clip)
  return 100 * np.sum(model.of_images(list(images)) * model.of_texts(texts), axis=-1)


@pytest.mark.slow
def test_a_row_is_the_clip_score_of_what_the_model_draws_for_the_prompts(measured):
  """Each epoch of samples has every prompt once; the images are those of `load(...).sample` for the same texts."""
  c, folder, results = measured
  captions = workdir.open_captions(folder, c)
  found = runs.compared.of_run(c, workdir.stored_plan(folder, c), None, captions)
  texts = found.texts.texts(np.arange(COUNT), 1)
  assert found.images is None and sorted(texts[:5]) == sorted(text_model.PROMPTS) != texts[:5]
  model = diffusion_distillation.load(folder)
  assert [row['guidance'] for row in results['rows']] == [0.0, 1.5]
  for row in results['rows']:
    drawn = model.sample(seed=1, prompts=texts, guidance=row['guidance'])
    expected = score(c, drawn, texts)
    assert row['value'] == pytest.approx(expected.mean(), rel=1e-6)
    assert row['error'] == pytest.approx(expected.std(ddof=1) / COUNT**0.5, rel=1e-6)
    assert row['metrics'] == {'clip_score': row['value']} and row['bias'] is None
    assert row['errors'] == {'clip_score': row['error']}
    assert (row['num_samples'], row['num_drawn'], row['seed']) == (COUNT, COUNT, 1)
    assert row['nfe'] == (8 if row['guidance'] else 4) and row['seconds_per_image'] > 0.0
    assert row['clip'] == results['clip']['digest'] and row['metric'] == 'CLIP score'
  described = json.loads((folder / 'base' / 'model' / 'model.json').read_text())
  assert described['metrics'] == results['rows']


def test_an_interrupted_evaluation_goes_on_within_the_row(measured, tmp_path, monkeypatch):
  """It is killed in the last batch of the second row; the scores of the batches before it are not computed again."""
  c, folder, results = measured
  shutil.copytree(folder, tmp_path / 'run')
  (tmp_path / 'run' / 'results.json').unlink()
  really, asked = RunningScore.of, []

  def until_the_sixth(self, places, images):
    asked.append(places[0])
    if len(asked) == 6:
      raise KeyboardInterrupt
    return really(self, places, images)

  monkeypatch.setattr(RunningScore, 'of', until_the_sixth)
  with pytest.raises(KeyboardInterrupt):
    runs.run(c, tmp_path / 'run')
  assert len(list((tmp_path / 'run' / row_batches.FOLDER).glob('*.npz'))) == 2
  runs.run(c, tmp_path / 'run')
  assert asked == [0, 8, 16, 0, 8, 16, 16]
  assert not (tmp_path / 'run' / row_batches.FOLDER).exists()
  found = json.loads((tmp_path / 'run' / 'results.json').read_text())
  for row, expected in zip(found['rows'], results['rows'], strict=True):
    assert row['metrics'] == expected['metrics'] and row['errors'] == expected['errors']
  runs.run(c, tmp_path / 'run')  # all rows are there
  assert len(asked) == 7


def test_the_report_shows_the_score_and_each_text_with_the_image_of_every_model(measured):
  _, folder, results = measured
  page = (folder / 'report' / 'index.html').read_text()
  made = {path.name for path in (folder / 'report').iterdir()}
  assert {'clip_score.png', 'guidance.png', 'samples.npz'} <= made and 'frechet.png' not in made
  assert '<th>CLIP score ↑</th>' in page and page.count('CLIP score ↑') == 1
  for row in results['rows']:
    assert f'<td>{report.measured(row["value"], row["error"])}</td>' in page
  assert page.count('<figcaption>base, 4 steps, guidance 1.5</figcaption>') == 8
  assert 'There are no images to compare them with.' in page and 'Nearest training images' not in page
  assert 'for the 5 prompts of the dataset in random order' in page and 'Reference:' not in page
  assert results['prompts'] == {
    'dataset': 'prompts',
    'num_prompts': len(text_model.PROMPTS),
    'digest': results['rows'][0]['texts'],
  }
  assert results['metrics'] == {'clip_score': {'better': 'higher'}}
  assert not {'floor', 'held_out', 'extractor', 'reference'} & results.keys()


def test_a_model_without_any_data_is_measured_with_the_prompts_of_a_file(measured, tmp_path):
  """Again with --mode=evaluate; without the file, there is nothing to draw."""
  c, _, results = measured
  given = {f'evaluation__{key}': value for key, value in c.evaluation.items()}
  no_data = {'dataset__name': 'none', 'dataset__path': '', 'methods': ()}
  folder, c = text_model.begin(tmp_path, **given | no_data | {'evaluation__guidance': (0.0,)})
  with pytest.raises(
    UserError, match=r'dataset\.name=none has no texts to draw; name evaluation\.prompts'
  ):
    runs.run(c, folder)
  (tmp_path / 'p.txt').write_text('\n'.join(text_model.PROMPTS * 5))
  c = changed(c, prompts=str(tmp_path / 'p.txt'))
  runs.run(c, folder)
  path = folder / 'results.json'
  found = json.loads(path.read_text())
  (row,) = found['rows']
  assert found['prompts']['file'] == found['dataset'] == 'p.txt'
  assert row['texts'] == found['prompts']['digest'] != results['rows'][0]['texts']
  assert 'drawn for the prompts in p.txt' in (folder / 'report' / 'index.html').read_text()
  path.unlink()
  assert evaluating.evaluate(c, folder) == path
  assert json.loads(path.read_text())['rows'][0]['metrics'] == row['metrics']


def test_without_a_clip_model_nothing_is_measured(measured, tmp_path, caplog):
  c, folder, _ = measured
  shutil.copytree(folder, tmp_path / 'run')
  (tmp_path / 'run' / 'results.json').unlink()
  stages = workdir.stored_plan(folder, c)
  assert forecast.evaluation_calls(stages, c) == COUNT * (4 + 8)
  c = changed(c, clip='')
  assert forecast.evaluation_calls(stages, c) == 0
  with caplog.at_level(logging.WARNING):
    runs.run(c, tmp_path / 'run')
  assert 'no images to compare with, and no CLIP model' in caplog.text
  assert not (tmp_path / 'run' / 'results.json').exists()
  with pytest.raises(UserError, match=r'has none; set evaluation\.clip=FOLDER'):
    evaluating.evaluate(c, tmp_path / 'run')


@pytest.mark.slow
def test_a_student_of_prompts_has_rows_beside_its_base(measured, tmp_path):
  c, *_ = measured
  given = {'clip': c.evaluation.clip, 'grid': 'uniform', 'num_samples': COUNT, 'batch_size': 24}
  given = {f'evaluation__{key}': value for key, value in given.items()}
  folder, c = text_model.begin(tmp_path, methods=('knowledge',), **given)
  runs.run(c, folder)
  results = json.loads((folder / 'results.json').read_text())
  assert [(row['stage'], row['num_steps'], row['nfe']) for row in results['rows']] == [
    ('base', 4, 4),
    ('base', 1, 1),
    ('knowledge', 1, 1),
  ]
  assert set(results['seconds']) == {'base', 'knowledge', 'evaluation'}
  assert (folder / 'report' / 'cost.png').is_file()


def test_rows_below_zero_are_kept_and_those_that_are_no_numbers_are_not(measured, tmp_path):
  """A CLIP score may be negative."""
  *_, found = measured
  rows = [found['rows'][0] | {'value': -1.0}, found['rows'][1] | {'value': float('nan')}]
  (tmp_path / 'results.json').write_text(json.dumps(found | {'rows': rows}))
  kept = known_rows(tmp_path / 'results.json', found)
  assert list(kept.values()) == rows[:1]
