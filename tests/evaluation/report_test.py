"""How results are shown: the figures, the page and its tables."""

import base64
import html.parser
import io
import warnings

import matplotlib
import numpy as np
import pytest
from PIL import Image

from diffusion_distillation.evaluation import (
  curves,
  figures,
  report,
  report_contents,
)
from tests import tiny
from tests.evaluation.rows import ROWS, STUDENTS, clip_results_of, results_of


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
  """Figures are made, but not turned into pixels, which takes long; returns the function that does it."""
  really = figures.to_png
  monkeypatch.setattr(figures, 'to_png', lambda figure, theme: b'png')
  return really


def lines_of(axes):
  return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}


def test_the_figure_is_log_log_with_three_curves_and_the_floor():
  (axes,) = figures.by_calls(curves.by_calls(ROWS), results_of(ROWS)).axes
  assert axes.get_xscale() == axes.get_yscale() == 'log'
  found = lines_of(axes)
  assert found['Progressive'] == [(2, 2.5)]
  assert found['Base, DDIM'] == [(2, 20.0), (4, 2.0)]
  assert found['Base, ancestral'] == [(4, 3.0)]
  assert [y for _, y in found['Real against real']] == [0.5, 0.5]
  assert not axes.containers


def test_the_figure_of_a_clip_score_is_linear_and_has_no_floor():
  results = clip_results_of(ROWS)
  (axes,) = figures.by_calls(curves.by_calls(results['rows']), results).axes
  assert axes.get_yscale() == 'linear' and axes.get_ylabel() == 'CLIP score'
  assert list(lines_of(axes)) == ['Progressive', 'Base, DDIM', 'Base, ancestral']


def test_a_single_number_of_network_calls_stands_in_the_middle_of_its_axis():
  """With error bars and a grid, as in a notebook, matplotlib finds no limits of its own and warns."""
  rows = [ROWS[0] | {'error': 0.1}]
  with warnings.catch_warnings(), matplotlib.rc_context({'axes.grid': True}):
    warnings.simplefilter('error')
    figure = figures.by_calls(curves.by_calls(rows), results_of(rows))
    figures.to_png(figure, figures.LIGHT)
  low, high = figure.axes[0].get_xlim()
  assert low * high == rows[0]['nfe'] ** 2 and low < high


def test_a_row_with_an_error_has_a_bar():
  rows = [ROWS[0] | {'error': 0.25}, *ROWS[1:]]
  (axes,) = figures.by_calls(curves.by_calls(rows), results_of(rows)).axes
  (bar,) = axes.containers
  ((segment,),) = (collection.get_segments() for collection in bar[2])
  np.testing.assert_allclose(segment, [[4.0, 1.75], [4.0, 2.25]])


def test_the_figure_of_cost_has_each_student_at_its_seconds_with_its_calls():
  rows = [*ROWS, *STUDENTS]
  costs = {'base': 0.0, 'progressive_0002': 7.0, 'progressive_0001': 90.0, 'knowledge': 50.0}
  costs |= {'consistency': 30.0, 'dmd': 20.0, 'dmd2': 40.0}
  results = results_of(rows, stages={name: {'cost': cost} for name, cost in costs.items()})
  (axes,) = figures.by_cost(curves.by_cost(results), results).axes
  found = lines_of(axes)
  assert [y for _, y in found.pop('Real against real')] == [0.5, 0.5]
  assert found == {
    'Progressive': [(7.0, 2.5), (90.0, 3.0)],
    'Knowledge': [(50.0, 6.0)],
    'Consistency': [(30.0, 4.0), (30.0, 5.0)],
    'DMD': [(20.0, 2.4)],
    'DMD2': [(40.0, 2.2)],
  }
  calls = {tuple(map(float, text.xy)): text.get_text() for text in axes.texts}
  assert calls[7.0, 2.5] == '2' and calls[90.0, 3.0] == calls[20.0, 2.4] == '1'
  assert axes.get_xlabel().startswith('seconds of training')


def written(directory, rows, seen=None, **more):
  """The page, and the names of the figures beside it."""
  images = np.zeros((3, 8, 8, 1), np.uint8)
  seen = report_contents.ReportContents({'base\n4 steps': images}) if seen is None else seen
  report.write(tiny.config(), results_of(rows, **more), seen, directory)
  return (directory / 'index.html').read_text(), {path.stem for path in directory.glob('*.png')}


def watched(**stages):
  return report_contents.ReportContents(
    {}, {name: report_contents.Watched(*found) for name, found in stages.items()}
  )


@pytest.mark.parametrize(
  ('value', 'error', 'text', 'signed'),
  [
    (52.1827, 1.56, '52.2 ± 1.6', '+52.2 ± 1.6'),
    (20.019, 0.6, '20.02 ± 0.60', '+20.02 ± 0.60'),
    (1056.6, 32.1, '1057 ± 32', '+1057 ± 32'),
    (0.0123456, 0.0001, '0.01235 ± 0.00010', '+0.01235 ± 0.00010'),
    (7.320832, None, '7.321', '+7.32'),
    (-0.5, 0.0, '-0.5', '-0.5'),
  ],
)
def test_a_value_has_the_digits_that_its_error_leaves(value, error, text, signed):
  assert report.measured(value, error) == text and report.signed((value, error)) == signed
  assert report.measured(None) == report.signed(None) == ''


def test_what_the_page_shows_is_escaped(tmp_path):
  text, _ = written(tmp_path / 'report', ROWS)
  assert 'FD-&lt;b&gt;' in text and 'FD-<b>' not in text
  assert 'to tell &lt;i&gt; apart (99.0 %' in text


def test_guidance_has_a_column_where_a_row_has_it(tmp_path):
  text, _ = written(tmp_path / 'without', ROWS)
  assert '<th>guidance</th>' not in text
  text, _ = written(tmp_path / 'with', [*ROWS, ROWS[0] | {'guidance': 1.5, 'nfe': 16}])
  table = text.partition('All rows')[2].partition('</table>')[0]
  assert '<th>guidance</th>' in table
  assert table.count('<td>0</td>') == len(ROWS) and table.count('<td>1.5</td>') == 1


def test_every_metric_has_a_column_and_errors_stand_beside_values(tmp_path):
  rows = [ROWS[0] | {'error': 0.25, 'metrics': {'frechet': 2.0, 'kid': 0.125, 'recall': 0.5}}, *ROWS[1:]]
  text, _ = written(tmp_path / 'report', rows)
  table = text.partition('All rows')[2].partition('</table>')[0]
  for cell in (
    '<th>KID</th>',
    '<th>recall</th>',
    '<td>2.00 ± 0.25</td>',
    '<td>0.125</td>',
    '<td>0.5</td>',
  ):
    assert table.count(cell) == 1, cell
  assert 'frechet' not in table and 'one standard error' in text


def test_a_figure_that_has_nothing_to_show_is_left_out(tmp_path):
  lines = [{'step': 4, 'loss': 1.0}]
  once, twice = [*lines, {'step': 8, 'diversity': 0.9}], [{'step': 4, 'diversity': 0.5}]
  untimed = [r | {'seconds_per_image': 0.0} for r in ROWS[:3]]
  text, found = written(tmp_path / 'base', untimed, watched(base=(lines, None)))
  assert found == {'frechet'} and text.count('<img') == 1 and 'Health' not in text
  text, found = written(tmp_path / 'students', ROWS, watched(base=(lines, None)))
  assert found == {'frechet', 'seconds', 'cost'} and text.count('<img') == 3
  # One check of a student's samples is a number, not a curve.
  text, found = written(tmp_path / 'once', ROWS, watched(progressive_0002=(once, b'a picture')))
  assert found == {'frechet', 'seconds', 'cost'} and text.count('<img') == 4
  assert '<td>progressive_0002</td><td>0.9</td><td></td><td></td>' in text
  assert base64.b64encode(b'a picture').decode() in text
  many = watched(progressive_0002=([*twice, *once[1:]], None))
  _, found = written(tmp_path / 'once', ROWS, many)
  assert found == {'frechet', 'seconds', 'cost', 'health_diversity'}
  _, found = written(tmp_path / 'once', untimed, watched())  # in the same directory: old figures go
  assert found == {'frechet'}


def guided_rows():
  given = {'class_accuracy': 0.75, 'num_drawn': 100, 'nfe': 8}
  return [*ROWS, *(ROWS[0] | given | {'guidance': w, 'value': 2.0 - w / 4} for w in (1.0, 2.0))]


def test_guidance_is_shown_by_weight_and_class(tmp_path):
  images = np.zeros((2, 3, 8, 8, 1), np.uint8)
  grid = report_contents.ByGuidance('base', (0.0, 1.0, 2.0), (0, 1), images)
  seen = report_contents.ReportContents({}, by_guidance=(grid,), class_names=('cat', 'dog'))
  text, found = written(tmp_path / 'report', guided_rows(), seen)
  assert 'guidance' in found and text.count('<td class="pixels"><img') == 6
  assert '<th></th><th>0</th><th>1</th><th>2</th>' in text
  assert 'title="dog">dog</span></th>' in text and '<td>75.0 %</td>' in text
  text, found = written(tmp_path / 'none', ROWS)
  assert 'guidance' not in found and '<h2>Guidance' not in text


BY_CLASS = {'count': [100, 50], 'accuracy': [0.5, 0.75], 'frechet': [None, 12.5]}


def test_classes_have_a_line_each_with_errors(tmp_path):
  rows = [ROWS[0] | {'by_class': BY_CLASS}, *ROWS[1:]]
  seen = report_contents.ReportContents({}, class_names=('cat', 'dog'))
  text, _ = written(tmp_path / 'report', rows, seen)
  assert '<td>cat</td><td>50.0 ± 5.0 %</td>' in text  # sqrt(1/4 / 100)
  assert '<td>dog</td><td>75.0 ± 6.1 %<small>12.5</small></td>' in text
  assert 'Class by class' not in written(tmp_path / 'none', ROWS)[0]


def test_unconditional_models_show_the_shares_of_the_classes_beside_the_data_s(tmp_path):
  rows = [ROWS[0] | {'num_drawn': 100, 'by_class': {'share': [0.9, 0.1]}}, *ROWS[1:]]
  text, _ = written(
    tmp_path / 'report', rows, report_contents.ReportContents({}), class_shares=[0.5, 0.5]
  )
  assert '<td>1</td><td>50.0 %</td><td>10.0 ± 3.0 %</td>' in text


def test_an_extractor_of_other_classes_leaves_the_distances(tmp_path):
  rows = [ROWS[0] | {'by_class': {'count': [100, 50], 'frechet': [None, 12.5]}}, *ROWS[1:]]
  text, _ = written(tmp_path / 'report', rows, report_contents.ReportContents({}))
  assert '<td>1</td><td><small>12.5</small></td>' in text and 'errors of the share' not in text


def test_of_many_classes_the_worst_are_listed():
  accuracy = [1.0 - k / 100 for k in range(30)]
  rows = [ROWS[0] | {'by_class': {'count': [100] * 30, 'accuracy': accuracy}}]
  table = report.class_table(results_of(rows), [])
  assert [line['name'] for line in table['lines']] == [str(k) for k in range(29, 19, -1)]
  assert table['left_out'] == 20
  distances = [None, *(1.0 + k for k in range(29))]  # of an extractor of other classes
  rows = [ROWS[0] | {'by_class': {'count': [100] * 30, 'frechet': distances}}]
  table = report.class_table(results_of(rows), [])
  assert [line['name'] for line in table['lines']] == [str(k) for k in range(29, 19, -1)]


def test_a_class_is_shown_at_a_stage_s_largest_number_of_steps():
  rows = [r | {'by_class': {'count': [1], 'accuracy': [r['nfe'] / 4]}} for r in (ROWS[2], ROWS[0])]
  table = report.class_table(results_of(rows), [])
  assert table['columns'] == ['base, 4 steps'] and table['lines'][0]['cells'][0]['accuracy'] == 1.0


class Addresses(html.parser.HTMLParser):
  """What a page would fetch."""

  def __init__(self, text):
    super().__init__()
    self.found = []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    assert tag not in ('script', 'link', 'iframe', 'object')
    self.found += [value for name, value in attrs if name in ('src', 'srcset', 'href')]


def test_the_page_fetches_nothing_and_has_each_figure_for_light_and_dark(tmp_path, monkeypatch, undrawn):
  monkeypatch.setattr(figures, 'to_png', undrawn)
  monkeypatch.setattr(figures, '_DPI', 20)
  text, found = written(tmp_path / 'report', ROWS)
  addresses = Addresses(text).found
  assert all(address.startswith('data:image/png;base64,') for address in addresses)
  assert text.count('(prefers-color-scheme: dark)" srcset') == len(found - {'samples'}) == 3
  for name in found - {'samples'}:
    with Image.open(tmp_path / 'report' / f'{name}.png') as image:
      assert image.width == 96 and np.asarray(image.convert('L')).std() > 5
  pixels = [np.asarray(Image.open(io.BytesIO(base64.b64decode(a.partition(',')[2])))) for a in addresses]
  brightness = [np.median(image[..., :3]) for image in pixels[:2]]  # of the first figure
  assert brightness[0] < 50 and brightness[1] == 255
  assert 'url(' not in text and '@import' not in text and 'http' not in text.lower()


def test_samples_are_kept_for_a_comparison(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 1)).astype(np.uint8)
  text, _ = written(tmp_path / 'report', ROWS, report_contents.ReportContents({'dmd\n1 step': images}))
  assert text.count('alt="Samples of dmd, 1 step"') == 2  # in two halves
  with np.load(tmp_path / 'report' / 'samples.npz', allow_pickle=False) as arrays:
    np.testing.assert_array_equal(arrays['dmd, 1 step'], images)
