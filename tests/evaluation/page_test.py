"""The report and the comparison in a browser: nothing is wider than the window, in light and dark, and nothing is fetched."""

import numpy as np
import pytest

from diffusion_distillation.evaluation import comparing, neighbours, report, report_contents
from tests import browser, tiny
from tests.evaluation.comparing_test import DEFAULT, run
from tests.evaluation.rows import ROWS, STUDENTS, results_of

pytestmark = pytest.mark.slow


def noise(*shape):
  return np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)


def measured():
  """Rows that have everything that the report can show."""
  by_class = {'count': [50] * 12, 'accuracy': [0.5] * 12, 'frechet': [3.0] * 12}
  more = {'error': 0.1, 'num_drawn': 600, 'class_accuracy': 0.5, 'by_class': by_class}
  metrics = {'frechet': 2.0, 'kid': 0.1, 'precision': 0.6, 'recall': 0.5, 'inception_score': 7.0}
  rows = [r | more | {'metrics': metrics} for r in (*ROWS, *STUDENTS)]
  return rows + [rows[0] | {'guidance': w, 'nfe': 8} for w in (0.5, 1.0, 2.0, 4.0)]


def seen():
  distances = neighbours.Distances(np.linspace(1, 2, 50), np.linspace(1, 3, 50))
  nearest = [noise(8, 3, 8, 8, 3)] * 2
  lines = [{'step': k, 'diversity': k / 9, 'dm_gradient': 0.1} for k in (3, 6, 9)]
  return report_contents.ReportContents(
    {f'stage_{k}\n1 step': noise(16, 8, 8, 3) for k in range(3)},
    {'dmd': report_contents.Watched(lines, None)},
    neighbours.Neighbours(noise(8, 8, 8, 3), *nearest, distances, distances, 1000),
    'dmd',
    (
      report_contents.ByGuidance(
        'base', (0.0, 0.5, 1.0, 2.0, 4.0), tuple(range(10)), noise(10, 5, 8, 8, 3)
      ),
    ),
    tuple(f'a class with a rather long name {k}' for k in range(12)),
    report_contents.ByText(
      ('a large red circle on blue, ' * 9, 'x' * 300, 'blue'),
      tuple(f'progressive_{k:04d}, {k} steps, guidance 1.5' for k in range(1, 9)),
      noise(3, 8, 200, 200, 3),
    ),
  )


@pytest.fixture(scope='module')
def pages(tmp_path_factory):
  base = tmp_path_factory.mktemp('pages')
  rows = measured()
  stages = {row['stage']: {'cost': 1000.0 * k} for k, row in enumerate(rows)}
  report.write(tiny.config(), results_of(rows, stages=stages), seen(), base / 'report')
  runs = [
    str(run(base / name, rows, train__batch_size=size))
    for name, size in (('the_first_run', 16), ('another_run', 32))
  ]
  comparing.compare(runs, DEFAULT, base / 'comparison')
  return base


@pytest.fixture(scope='module')
def shown(tmp_path_factory):
  if browser.find() is None:
    pytest.skip('there is no chromium')
  page = browser.Browser(tmp_path_factory.mktemp('profile'))
  yield page
  page.close()


WIDER = """[...document.querySelectorAll('body *')]
  .filter(e => !e.parentElement.closest('.wide') && e.getBoundingClientRect().right > innerWidth + 0.5)
  .map(e => e.outerHTML.slice(0, 90)).join('; ')"""


@pytest.mark.parametrize('name', ['report', 'comparison'])
@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_nothing_is_wider_than_the_window_or_fetched(pages, shown, name, scheme):
  emulated = [{'name': 'prefers-color-scheme', 'value': scheme}]
  shown.call('Emulation.setEmulatedMedia', features=emulated)
  address = f'file://{pages / name / "index.html"}'
  for width in (400, 320, 1280):
    shown.resize(width, 900)
    shown.call('Page.navigate', url=address)
    shown.wait(f'location.href == "{address}" && document.readyState == "complete"')
    shown.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert shown.evaluate('document.documentElement.scrollWidth') <= width
    assert shown.evaluate(WIDER) == ''
    # What is wider than its box can be scrolled there, and every picture is drawn.
    assert shown.evaluate(
      "[...document.querySelectorAll('.wide')].every(e => getComputedStyle(e).overflowX == 'auto')"
    )
    assert shown.evaluate('[...document.images].every(i => i.complete && i.width > 20)')
  paper = shown.evaluate('getComputedStyle(document.body).backgroundColor')
  assert paper == {'light': 'rgb(255, 255, 255)', 'dark': 'rgb(20, 24, 31)'}[scheme]
  source = shown.evaluate("document.querySelector('picture img').currentSrc")
  darker = shown.evaluate("document.querySelector('picture source').srcset")
  assert (source == darker) == (scheme == 'dark')
  assert shown.errors == []
  assert {a for a in shown.addresses if not a.startswith('data:')} <= {
    f'file://{pages / other / "index.html"}' for other in ('report', 'comparison')
  }
