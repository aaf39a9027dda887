"""Rows as curves and tables: by network evaluations, by time, by guidance, and how a student's health is shown."""

import pytest

from diffusion_distillation.evaluation import curves
from tests.evaluation.rows import ROWS, STUDENTS, row


def lines_of(rows):
  """The table without its errors, which these rows do not have."""
  lines = curves.comparison(rows)
  assert all(error is None for line in lines for error in line.pop('errors'))
  return lines


def test_the_table_compares_at_each_number_of_network_calls():
  assert lines_of(ROWS) == [
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
  assert curves.curves(rows) == {
    'Progressive': {2: 2.5},
    'Base, DDIM': {4: 2.0, 2: 20.0},
    'Base, ancestral': {4: 3.0},
    'Base, Heun': {8: 1.5, 4: 9.0},
  }
  assert lines_of(rows) == [
    {'nfe': 8, 'values': [None, None, None, 1.5], 'ratios': [None] * 4},
    {'nfe': 4, 'values': [None, 2.0, 3.0, 9.0], 'ratios': [None] * 4},
    {'nfe': 2, 'values': [2.5, 20.0, None, None], 'ratios': [1.25, None, None, None]},
  ]


def test_rounds_are_one_column_and_every_other_student_has_its_own():
  rows = [*ROWS, *STUDENTS]
  students = {caption: curve for caption, curve in curves.curves(rows).items() if 'Base' not in caption}
  assert students == {
    'Progressive': {2: 2.5, 1: 3.0},
    'Knowledge': {1: 6.0},
    'Consistency': {1: 5.0, 2: 4.0},
    'DMD': {1: 2.4},
    'DMD2': {1: 2.2},
  }
  assert list(curves.curves(rows)) == [*students, 'Base, DDIM', 'Base, ancestral']
  four, two, one = curves.comparison(rows)
  assert four['ratios'] == [None] * 7
  assert two['ratios'] == [1.25, None, 2.0, None, None, None, None]
  assert one['ratios'] == [1.5, 3.0, 2.5, 1.2, 1.1, None, None]


def test_without_ddim_there_is_nothing_to_take_the_ratio_to():
  rows = [row('base', 'heun', 8, 1.5), row('progressive_0004', 'ddim', 4, 2.5)]
  assert lines_of(rows) == [
    {'nfe': 8, 'values': [None, 1.5], 'ratios': [None, None]},
    {'nfe': 4, 'values': [2.5, None], 'ratios': [None, None]},
  ]


def test_a_model_that_was_imported_is_the_base_of_its_curves():
  rows = [row('progressive_0008', 'ddim', 8, 3.0), row('progressive_0004', 'ddim', 4, 3.6)]
  assert curves.curves(rows) == {'Progressive': {4: 3.6}, 'Base, DDIM': {8: 3.0}}
  assert [line['ratios'] for line in curves.comparison(rows)] == [[None, None], [1.2, None]]
  scores = [row | {'metric': 'CLIP score'} for row in rows]  # which may be negative
  assert [line['ratios'] for line in curves.comparison(scores)] == [[None, None]] * 2


def test_errors_stand_beside_their_values():
  rows = [ROWS[0] | {'error': 0.25}, *ROWS[1:]]
  assert [line['errors'] for line in curves.comparison(rows)] == [[None, 0.25, None], [None] * 3]
  (point,) = [p for p in curves.by_calls(rows)['Base, DDIM'] if p.error]
  assert point == (4, 2.0, 0.25, 4)


def test_rows_that_were_not_timed_have_no_place_by_seconds():
  rows = [*ROWS[:3], ROWS[3] | {'seconds_per_image': 0.0}]
  found = curves.by_seconds(rows)
  assert found == {
    'Base, DDIM': [(0.001, 2.0, None, 4), (0.001, 20.0, None, 2)],
    'Base, ancestral': [(0.001, 3.0, None, 4)],
  }
  assert curves.by_seconds(rows[3:]) == {}


def weighted(weights, **more):
  """The base and a student that takes the weight as an input, by weight; and a student without guidance."""
  rows = []
  for w in weights:
    measured = {'precision': 0.5 + w / 10, 'recall': 0.9 - w / 10}
    given = {'guidance': w, 'metrics': measured, 'class_accuracy': 0.8, 'num_drawn': 400} | more
    rows += [row('base', 'ddim', 4, 2.0 + w) | given, row('base', 'ddim', 2, 7.0 + w) | given]
    rows.append(row('guided', 'ddim', 2, 3.0 + w) | given)
  return [rows[0], *rows[1:], row('dmd', 'ddim', 1, 2.5)]


def test_quality_and_diversity_by_weight_of_what_was_measured_with_several():
  panels = curves.by_weight(weighted((0.0, 2.0)), 'FD-digits')
  assert list(panels) == ['FD-digits', 'precision', 'recall', 'class accuracy']
  assert panels['FD-digits'] == {
    'base, 4 steps': [(0.0, 2.0, None, 4), (2.0, 4.0, None, 4)],
    'guided, 2 steps': [(0.0, 3.0, None, 2), (2.0, 5.0, None, 2)],
  }
  assert [p[:2] for p in panels['recall']['guided, 2 steps']] == [(0.0, 0.9), (2.0, pytest.approx(0.7))]
  # The standard error of 0.8 from 400 samples is 0.02.
  assert panels['class accuracy']['base, 4 steps'][0] == (0.0, 0.8, pytest.approx(0.02), 4)


def test_one_weight_is_no_curve_and_a_metric_that_no_row_has_is_no_panel():
  assert curves.by_weight(weighted((1.5,)), 'FD-digits') == {}
  panels = curves.by_weight(weighted((0.0, 2.0), metrics={}, class_accuracy=None), 'FD-digits')
  assert list(panels) == ['FD-digits']
  rows = weighted((0.0, 2.0))  # of which the later ones are older, and lack metrics
  rows[3:] = [{k: v for k, v in r.items() if k != 'metrics'} for r in rows[3:]]
  assert list(curves.by_weight(rows, 'FD-digits')) == ['FD-digits', 'class accuracy']


def test_the_clip_score_of_samples_of_texts_has_a_panel():
  rows = [
    row | {'metrics': {'clip_score': 20.0 + k}, 'errors': {'clip_score': 0.5}}
    for k, row in enumerate(weighted((0.0, 2.0)))
  ]
  panels = curves.by_weight(rows, 'FID')
  assert list(panels) == ['FID', 'class accuracy', 'CLIP score']
  assert {point.error for point in panels['CLIP score']['base, 4 steps']} == {0.5}


def test_a_figure_of_too_many_curves_keeps_the_weight_at_which_the_base_is_best():
  rows = weighted((0.0, 1.0))
  assert curves.few(rows) == rows
  rows = weighted((4.0, 0.5, 1.0, 2.0))
  assert set(curves.curves(curves.few(rows))) == {
    'Guided, guidance 0.5',
    'DMD',
    'Base, DDIM, guidance 0.5',
  }
  scores = [row | {'metric': 'CLIP score'} for row in rows]  # whose highest is best
  assert 'Base, DDIM, guidance 4' in curves.curves(curves.few(scores))


def test_a_student_is_compared_with_the_base_of_the_same_guidance():
  rows = weighted((0.0, 2.0))
  captions, lines = list(curves.curves(rows)), curves.comparison(rows)
  at_two = next(line for line in lines if line['nfe'] == 2)
  ratios = dict(zip(captions, at_two['ratios'], strict=True))
  assert ratios['Guided'] == pytest.approx(3 / 2) and ratios['Guided, guidance 2'] == pytest.approx(
    5 / 4
  )
  assert ratios['Base, DDIM'] is ratios['Base, DDIM, guidance 2'] is None


def test_health_is_a_curve_only_of_what_was_looked_at_twice():
  dmd = [
    {'step': 5, 'loss': 1.0, 'dm_gradient': 0.3},
    {'step': 10, 'diversity': 0.5, 'fake_score_lag': 1.2, 'dm_gradient': 0.2},
  ]
  watched = {'dmd': dmd, 'knowledge': [{'step': 4, 'diversity': 0.75}, {'step': 16, 'diversity': 1.0}]}
  found = {
    name: {stage: [p[:2] for p in points] for stage, points in lines.items()}
    for name, (_, lines) in curves.health(watched).items()
  }
  assert found == {
    'diversity': {'knowledge': [(0.25, 0.75), (1.0, 1.0)]},
    'dm_gradient': {'dmd': [(0.5, 0.3), (1.0, 0.2)]},
  }
  assert curves.last_health(watched | {'base': [{'step': 1, 'loss': 1.0}]}) == [
    {'stage': 'dmd', 'diversity': 0.5, 'fake_score_lag': 1.2, 'dm_gradient': 0.2},
    {'stage': 'knowledge', 'diversity': 1.0, 'fake_score_lag': None, 'dm_gradient': None},
  ]


@pytest.mark.parametrize(
  ('seconds', 'unit'), [(100.0, 'seconds'), (180.0, 'minutes'), (9000.0, 'minutes'), (10800.0, 'hours')]
)
def test_times_are_told_in_a_unit_that_is_easy_to_read(seconds, unit):
  assert curves.time_unit(seconds)[0] == unit
