"""What is measured, and how it is shown."""

import base64
import json

import numpy as np
import pytest
from PIL import Image

from diffusion_distillation.diffusion import samplers
from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.evaluation import features, measure, pictures, report
from tests import tiny


def row(stage, sampler, nfe, value, weights='ema'):
  method = {'base': 'denoising'}.get(stage, stage.partition('_')[0])
  num_steps = nfe // samplers.SAMPLERS[sampler].calls_per_step
  extra = {'num_steps': num_steps, 'seconds_per_image': 0.001, 'updates': 10, 'weights': weights}
  return {'stage': stage, 'method': method, 'sampler': sampler, 'nfe': nfe, 'value': value} | extra


ROWS = [
  row('base', 'ddim', 4, 2.0),
  row('base', 'ancestral', 4, 3.0),
  row('base', 'ddim', 2, 20.0),
  row('progressive_0002', 'ddim', 2, 2.5),
]


def test_the_table_compares_at_each_number_of_network_calls():
  assert report.comparison(ROWS) == [
    {'nfe': 4, 'values': [None, 2.0, 3.0], 'ratios': [None, None, None]},
    {'nfe': 2, 'values': [2.5, 20.0, None], 'ratios': [1.25, None, None]},
  ]


def test_columns_are_the_students_and_the_base_under_each_sampler_by_network_calls():
  """Heun's N steps stand beside the 2N steps of samplers that call once; further averages stand apart."""
  rows = [
    *ROWS,
    row('base', 'heun', 8, 1.5),
    row('base', 'heun', 4, 9.0),
    row('base', 'ddim', 4, 0.1, weights='ema_0.99'),
    row('progressive_0002', 'ddim', 2, 0.1, weights='ema_0.99'),
  ]
  assert report.curves(rows) == {
    'Progressive': {2: 2.5},
    'Base, DDIM': {4: 2.0, 2: 20.0},
    'Base, ancestral': {4: 3.0},
    'Base, Heun': {8: 1.5, 4: 9.0},
  }
  assert report.comparison(rows) == [
    {'nfe': 8, 'values': [None, None, None, 1.5], 'ratios': [None] * 4},
    {'nfe': 4, 'values': [None, 2.0, 3.0, 9.0], 'ratios': [None] * 4},
    {'nfe': 2, 'values': [2.5, 20.0, None, None], 'ratios': [1.25, None, None, None]},
  ]


STUDENTS = [
  row('progressive_0001', 'ddim', 1, 3.0),
  row('knowledge', 'ddim', 1, 6.0),
  row('consistency', 'multistep_consistency', 1, 5.0),
  row('consistency', 'multistep_consistency', 2, 4.0),
  row('dmd', 'ddim', 1, 2.4),
  row('dmd', 'ddim', 1, 0.1, weights='ema_0.99'),
  row('dmd2', 'ddim', 1, 2.2),
]


def test_rounds_are_one_column_and_every_other_student_has_its_own():
  rows = [*ROWS, *STUDENTS]
  students = {caption: curve for caption, curve in report.curves(rows).items() if 'Base' not in caption}
  assert students == {
    'Progressive': {2: 2.5, 1: 3.0},
    'Knowledge': {1: 6.0},
    'Consistency': {1: 5.0, 2: 4.0},
    'DMD': {1: 2.4},
    'DMD2': {1: 2.2},
  }
  assert list(report.curves(rows)) == [*students, 'Base, DDIM', 'Base, ancestral']
  four, two, one = report.comparison(rows)
  assert four['ratios'] == [None] * 7
  assert two['ratios'] == [1.25, None, 2.0, None, None, None, None]
  assert one['ratios'] == [1.5, 3.0, 2.5, 1.2, 1.1, None, None]


def test_without_ddim_there_is_nothing_to_take_the_ratio_to():
  rows = [row('base', 'heun', 8, 1.5), row('progressive_0004', 'ddim', 4, 2.5)]
  assert report.comparison(rows) == [
    {'nfe': 8, 'values': [None, 1.5], 'ratios': [None, None]},
    {'nfe': 4, 'values': [2.5, None], 'ratios': [None, None]},
  ]


def test_a_model_that_was_imported_is_the_base_of_its_curves():
  rows = [row('progressive_0008', 'ddim', 8, 3.0), row('progressive_0004', 'ddim', 4, 3.6)]
  assert report.curves(rows) == {'Progressive': {4: 3.6}, 'Base, DDIM': {8: 3.0}}
  assert [line['ratios'] for line in report.comparison(rows)] == [[None, None], [1.2, None]]


def test_the_figure_is_log_log_with_three_curves_and_the_floor():
  figure = report.distance_figure(
    {'rows': ROWS, 'metric': 'FD-digits', 'floor': {'value': 0.5, 'num_samples': 100}}
  )
  (axes,) = figure.axes
  assert axes.get_xscale() == axes.get_yscale() == 'log'
  curves = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
  assert curves['Progressive'] == [(2, 2.5)]
  assert curves['Base, DDIM'] == [(2, 20.0), (4, 2.0)]
  assert curves['Base, ancestral'] == [(4, 3.0)]
  assert [y for _, y in curves['Real against real']] == [0.5, 0.5]


def test_the_figure_of_cost_has_each_student_at_its_seconds_with_its_calls():
  rows = [*ROWS, *STUDENTS]
  costs = {'base': 0.0, 'progressive_0002': 7.0, 'progressive_0001': 9.0, 'knowledge': 5.0}
  costs |= {'consistency': 3.0, 'dmd': 2.0, 'dmd2': 4.0}
  stages = {name: {'cost': cost} for name, cost in costs.items()}
  figure = report.cost_figure(results_of(rows) | {'stages': stages})
  (axes,) = figure.axes
  curves = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
  assert [y for _, y in curves.pop('Real against real')] == [0.5, 0.5]
  assert curves == {
    'Progressive': [(7.0, 2.5), (9.0, 3.0)],
    'Knowledge': [(5.0, 6.0)],
    'Consistency': [(3.0, 4.0), (3.0, 5.0)],
    'DMD': [(2.0, 2.4)],
    'DMD2': [(4.0, 2.2)],
  }
  calls = {tuple(map(float, text.xy)): text.get_text() for text in axes.texts}
  assert calls == {
    point: '2' if point in ((7.0, 2.5), (3.0, 4.0)) else '1' for at in curves.values() for point in at
  }


def test_the_figure_of_health_has_what_was_seen_by_share_of_the_updates():
  dmd = [
    {'step': 5, 'loss': 1.0, 'dm_gradient': 0.3},
    {'step': 10, 'diversity': 0.5, 'fake_score_lag': 1.2, 'dm_gradient': 0.2},
  ]
  watched = {'dmd': dmd, 'knowledge': [{'step': 4, 'diversity': 0.75}, {'step': 16, 'diversity': 1.0}]}
  figure = report.health_figure(watched)
  found = {
    axes.get_title(): {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
    for axes in figure.axes
  }
  assert found == {
    'diversity relative to the data': {'dmd': [(1.0, 0.5)], 'knowledge': [(0.25, 0.75), (1.0, 1.0)]},
    'lag of the fake score': {'dmd': [(1.0, 1.2)]},
    'size of the DM gradient': {'dmd': [(0.5, 0.3), (1.0, 0.2)]},
  }


def results_of(rows):
  """What the page shows beside its rows."""
  return {
    'rows': rows,
    'metric': 'FD-<b>',
    'floor': {'value': 0.5, 'num_samples': 100},
    'extractor': {'name': 'digits', 'digest': 'ab' * 32, 'task': '<i>', 'held_out_accuracy': 0.99},
    'reference': {'num_images': 7},
    'held_out': {'value': 1.0, 'num_samples': 3},
    'versions': {'jax': '1'},
    'seconds': {'base': 2.0},
    'stages': {'base': {'cost': 0.0}, 'progressive_0002': {'cost': 7.0}},
  }


def written(directory, rows, watched):
  """The page, and the names of the figures beside it."""
  images = np.zeros((3, 8, 8, 1), np.uint8)
  report.write(tiny.config(), results_of(rows), {'base\n4 steps': images}, watched, directory)
  return (directory / 'index.html').read_text(), {path.stem for path in directory.glob('*.png')}


def test_what_the_page_shows_is_escaped(tmp_path):
  text, _ = written(tmp_path / 'report', ROWS, {})
  assert 'FD-&lt;b&gt;' in text and 'FD-<b>' not in text
  assert 'to tell &lt;i&gt; apart (99.0 %' in text


def test_guidance_has_a_column_where_a_row_has_it(tmp_path):
  text, _ = written(tmp_path / 'without', ROWS, {})
  assert '<th>guidance</th>' not in text
  text, _ = written(tmp_path / 'with', [*ROWS, ROWS[0] | {'guidance': 1.5, 'nfe': 16}], {})
  table = text.partition('All rows')[2].partition('</table>')[0]
  assert '<th>guidance</th>' in table
  assert table.count('<td>0</td>') == len(ROWS) and table.count('<td>1.5</td>') == 1


def test_cost_and_health_are_shown_where_there_are_students_and_such_as_were_looked_at(tmp_path):
  lines = [{'step': 4, 'loss': 1.0}]
  seen = report.Watched([*lines, {'step': 8, 'diversity': 0.9}], b'a picture')
  usual = {'frechet', 'samples'}
  text, figures = written(tmp_path / 'base', ROWS[:3], {'base': report.Watched(lines, None)})
  assert figures == usual and text.count('<img') == 2
  text, figures = written(tmp_path / 'students', ROWS, {'base': report.Watched(lines, None)})
  assert figures == {*usual, 'cost'} and text.count('<img') == 3
  text, figures = written(tmp_path / 'watched', ROWS, {'progressive_0002': seen})
  assert figures == {*usual, 'cost', 'health'} and text.count('<img') == 5
  assert base64.b64encode(b'a picture').decode() in text


def test_a_grid_puts_every_image_where_it_belongs():
  images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((1, 4, 4, 1), np.uint8)
  sheet = pictures.grid(images, columns=3, gap=2)
  assert sheet.shape == (2 * 6 + 2, 3 * 6 + 2, 1)
  for k in range(5):
    top, left = 2 + 6 * (k // 3), 2 + 6 * (k % 3)
    assert (sheet[top : top + 4, left : left + 4] == k).all()
  assert (sheet[8:12, 14:18] == 255).all()
  assert (sheet == 255).sum() == sheet.size - 5 * 16


@pytest.mark.parametrize('channels', [1, 3])
def test_png_and_npz_hold_the_images(tmp_path, channels):
  images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, channels)).astype(np.uint8)
  pictures.save(pictures.check_out(tmp_path / 'x.npz', 4), images, np.arange(4))
  with np.load(tmp_path / 'x.npz', allow_pickle=False) as arrays:
    np.testing.assert_array_equal(arrays['images'], images)
    assert arrays['labels'].tolist() == [0, 1, 2, 3]
  pictures.save(pictures.check_out(tmp_path / 'x.png', 4), images, None)
  with Image.open(tmp_path / 'x.png') as image:
    sheet = np.asarray(image).reshape(70, 70, channels)
  np.testing.assert_array_equal(sheet[2:34:4, 2:34:4], images[0])
  np.testing.assert_array_equal(sheet[36:68:4, 36:68:4], images[3])
  assert sorted(path.name for path in tmp_path.iterdir()) == ['x.npz', 'x.png']


def test_out_has_to_be_a_png_or_npz_in_a_directory(tmp_path):
  assert pictures.check_out(tmp_path / 'x.png', 1) == (tmp_path / 'x.png', '.png')
  for out in (None, tmp_path / 'x.gif', tmp_path / 'no' / 'x.png'):
    with pytest.raises(UserError, match='--out'):
      pictures.check_out(out, 1)


def test_a_damaged_extractor_is_named_and_not_used(finished, tmp_path):
  whole = (finished / 'extractor.safetensors').read_bytes()
  path = tmp_path / 'extractor.safetensors'
  for position in (12, len(whole) // 2):
    content = bytearray(whole)
    content[position] ^= 1
    for damaged in (bytes(content), whole[: len(whole) // 2]):
      path.write_bytes(damaged)
      with pytest.raises(DamagedError, match=r'extractor\.safetensors is damaged'):
        features.load_or_train(path, None, None)
      assert path.read_bytes() == damaged


def test_the_stored_extractor_is_the_one_of_the_results(finished):
  extractor = features.load_or_train(finished / 'extractor.safetensors', None, None)
  results = json.loads((finished / 'results.json').read_text())
  assert extractor.digest == results['extractor']['digest']
  images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 1)).astype(np.uint8)
  assert extractor(images).shape == (7, 64)
  np.testing.assert_allclose(extractor(images)[:2], extractor(images[:2]), rtol=1e-5)


def rows_of(**overrides):
  config = tiny.config(**overrides)
  stages = tiny.plan(**overrides)[0]
  return [(stages[place].name, *rest) for place, *rest in measure.rows(stages, config)]


def test_the_base_is_measured_under_every_sampler_and_each_student_at_its_own_steps():
  names = tuple(samplers.SAMPLERS)
  assert rows_of(evaluation__samplers=names) == [
    *(('base', 'ema', name, steps) for steps in (4, 2, 1) for name in names),
    ('progressive_0002', 'ema', 'ddim', 2),
    ('progressive_0001', 'ema', 'ddim', 1),
  ]


def test_further_averages_are_measured_at_their_stages_own_steps():
  averages = {'train__ema_decay': (0.9, 0.5, 0.2), 'distill__ema_decay': (0.0, 0.8)}
  assert rows_of(evaluation__samplers=('heun',), distill__start_steps=2, **averages) == [
    ('base', 'ema', 'heun', 2),
    ('base', 'ema', 'heun', 1),
    ('base', 'ema_0.5', 'ddim', 2),
    ('base', 'ema_0.2', 'ddim', 2),
    ('progressive_0001', 'ema', 'ddim', 1),
    ('progressive_0001', 'ema_0.8', 'ddim', 1),
  ]


def test_rows_of_more_steps_than_wanted_are_left_out():
  limits = {'distill__start_steps': 16, 'evaluation__max_steps': 4, 'train__ema_decay': (0.9, 0.5)}
  assert rows_of(evaluation__samplers=('ddim',), **limits) == [
    *(('base', 'ema', 'ddim', steps) for steps in (4, 2, 1)),
    *((f'progressive_000{steps}', 'ema', 'ddim', steps) for steps in (4, 2, 1)),
  ]
