"""Finished runs side by side: what differs, what is refused, and what the page shows."""

import json

import numpy as np
import pytest

from configs import default
from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.evaluation import comparing, figures
from tests import tiny
from tests.evaluation.report_test import Addresses
from tests.evaluation.rows import ROWS, clip_results_of, results_of, row

DEFAULT = default.get_config()
SECOND = [ROWS[0] | {'value': 1.5}, ROWS[3] | {'value': 3.0}, row('dmd', 'ddim', 1, 2.0)]


@pytest.fixture(autouse=True)
def undrawn(monkeypatch):
  """Figures are made, but not turned into pixels, which takes long."""
  monkeypatch.setattr(figures, 'to_png', lambda figure, theme: b'png')


def run(directory, rows, samples=True, identity='i', results=None, **overrides):
  """A workdir with what is left of a finished run."""
  (directory / 'report').mkdir(parents=True)
  (directory / 'config.json').write_text(tiny.config(**overrides).to_json())
  (directory / 'dataset.json').write_text(json.dumps({'identity': identity}))
  (directory / 'results.json').write_text(json.dumps(results_of(rows, **results or {})))
  if samples:
    images = np.zeros((4, 8, 8, 1), np.uint8)
    np.savez(directory / 'report' / 'samples.npz', **{'base, 4 steps': images})
  return directory


@pytest.fixture
def runs(tmp_path):
  return [
    run(tmp_path / 'first', ROWS),
    run(tmp_path / 'second', SECOND, train__learning_rate=0.5, model__ch=16),
  ]


def test_rows_are_matched_by_what_they_measured_and_compared_with_the_first_run(runs):
  lines = comparing.table(comparing.read(list(map(str, runs)), DEFAULT))
  told = [
    (line['stage'], line['sampler'], line['nfe'], line['values'], line['differences']) for line in lines
  ]
  assert told == [
    ('base', 'ddim', 4, [2.0, 1.5], [(-0.5, None)]),
    ('base', 'ancestral', 4, [3.0, None], [None]),
    ('base', 'ddim', 2, [20.0, None], [None]),
    ('progressive_0002', 'ddim', 2, [2.5, 3.0], [(0.5, None)]),
    ('dmd', 'ddim', 1, [None, 2.0], [None]),
  ]


def test_the_error_of_a_difference_is_that_of_independent_runs(tmp_path):
  first = run(tmp_path / 'a', [ROWS[0] | {'error': 0.3}, ROWS[3] | {'error': 0.3}])
  second = run(tmp_path / 'b', [SECOND[0] | {'error': 0.4}, SECOND[1]])
  found = comparing.read([str(first), str(second)], DEFAULT)
  differences = [line['differences'] for line in comparing.table(found)]
  assert differences == [[(-0.5, pytest.approx(0.5))], [(0.5, None)]]
  assert not any('no error bars' in note for note in comparing.remarks(found))


def test_rows_of_two_weights_of_guidance_are_not_confused(tmp_path):
  guided = ROWS[0] | {'guidance': 2.0, 'nfe': 8, 'value': 9.0}
  first = run(tmp_path / 'a', [ROWS[0], guided])
  second = run(tmp_path / 'b', [guided | {'value': 10.0}])
  lines = comparing.table(comparing.read([str(first), str(second)], DEFAULT))
  assert [(line['guidance'], line['values']) for line in lines] == [
    (0.0, [2.0, None]),
    (2.0, [9.0, 10.0]),
  ]


def test_keys_that_differ_are_listed_with_the_values_of_all_runs(runs):
  found = comparing.differences(comparing.read(list(map(str, runs)), DEFAULT))
  assert found == [('model.ch', [8, 16]), ('train.learning_rate', [1e-3, 0.5])]


def test_the_page_and_the_text_show_both_runs(runs, tmp_path):
  out = tmp_path / 'out'
  code, text, err = tiny.run_cli('--mode=compare', f'--workdirs={runs[0]},{runs[1]}', f'--out={out}')
  assert code == 0, err
  lines = text.splitlines()
  assert lines[0].split() == [
    'stage',
    'sampler',
    'steps',
    'NFE',
    'first',
    'second',
    'second',
    '-',
    'first',
  ]
  assert lines[1].split() == ['base', 'ddim', '4', '4', '2', '1.5', '-0.5']
  assert lines[-1] == str(out / 'index.html')
  assert 'no error bars' in lines[-2]
  page = (out / 'index.html').read_text()
  assert '<td>model.ch</td>' in page.replace('<code>', '').replace('</code>', '')
  assert page.count('alt="base, 4 steps of first"') == page.count('alt="base, 4 steps of second"') == 2
  assert all(address.startswith('data:image/png;base64,') for address in Addresses(page).found)
  assert 'FD-&lt;b&gt;' in page and 'FD-<b>' not in page
  # The same command again writes the same page.
  assert tiny.run_cli('--mode=compare', f'--workdirs={runs[0]},{runs[1]}', f'--out={out}')[0] == 0


def test_without_out_the_page_is_in_the_report_of_the_first_run(runs):
  text = comparing.compare(list(map(str, runs)), DEFAULT, None)
  assert text.splitlines()[-1] == str(runs[0] / 'report' / 'comparison' / 'index.html')


def test_three_runs_and_one_without_samples(runs, tmp_path):
  third = run(tmp_path / 'more' / 'second', ROWS, samples=False)
  text = comparing.compare([str(path) for path in (*runs, third)], DEFAULT, tmp_path / 'out')
  head, first = (line.split() for line in text.splitlines()[:2])
  assert head[-1] == head[4] and head[5].endswith('/second') and head[6] == 'more/second'
  assert first[:3] == ['base', 'ddim', '4'] and first[-2:] == ['-0.5', '+0']
  assert [r.name for r in comparing.read([str(runs[0]), str(third)], DEFAULT)] == ['first', 'second']


def test_what_the_numbers_depend_on_is_pointed_out(tmp_path):
  fewer = {'floor': {'value': 0.5, 'num_samples': 50}, 'labels': 'data'}
  first = run(tmp_path / 'a', ROWS, results={'labels': 'balanced'})
  second = run(tmp_path / 'b', ROWS, results=fewer, evaluation__seed=7)
  notes = comparing.remarks(comparing.read([str(first), str(second)], DEFAULT))
  assert len(notes) == 4
  assert 'a: 100, b: 50' in notes[0] and 'a: balanced, b: data' in notes[1] and 'seeds' in notes[2]


def test_other_texts_are_pointed_out(tmp_path):
  texts = {
    'a': {'captions': {'name': 'shapes', 'digest': 'c'}},
    'b': {'prompts': {'file': 'p.txt', 'digest': 'p'}},
    'c': {'prompts': {'file': 'p.txt', 'digest': 'q'}},
    'd': {'prompts': {'file': 'copy.txt', 'digest': 'p'}},
  }
  given = {name: str(run(tmp_path / name, ROWS, results=of)) for name, of in texts.items()}

  def notes(names):
    found = comparing.remarks(comparing.read([given[name] for name in names], DEFAULT))
    return [note for note in found if 'texts' in note]

  assert notes('ab') == ['The texts that the samples are drawn for differ (a: shapes, b: p.txt).']
  assert len(notes('bc')) == 1 and not notes('bd')


EXTRACTOR = {'name': 'digits', 'digest': 'cd' * 32, 'task': 'classes', 'held_out_accuracy': 0.9}


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'results': {'extractor': EXTRACTOR}}, r'^b was measured with another feature extractor than a'),
    (
      {'results': {'reference': {'num_images': 8}}},
      r'^b was compared with other training images than a',
    ),
    ({'identity': 'j'}, r'^b was compared with other training images than a'),
    ({'results': {'metric': 'FID'}}, r'^b was measured as FID and a as FD-<b>'),
  ],
)
def test_numbers_that_mean_something_else_are_not_compared(tmp_path, changes, message):
  given = [str(run(tmp_path / 'a', ROWS)), str(run(tmp_path / 'b', ROWS, **changes))]
  with pytest.raises(UserError, match=message):
    comparing.compare(given, DEFAULT, tmp_path / 'out')
  assert not (tmp_path / 'out').exists()


FID = {
  'metric': 'FID',
  'dataset': 'cifar10',
  'extractor': EXTRACTOR | {'name': 'inception', 'held_out_accuracy': None},
  'reference': {'file': 'edm.npz', 'digest': 'e', 'content': 'mu, sigma', 'num_images': None},
}


def test_runs_with_statistics_from_a_file_name_it_and_their_dataset(tmp_path):
  given = [str(run(tmp_path / name, ROWS, results=FID)) for name in 'ab']
  comparing.compare(given, DEFAULT, tmp_path / 'out')
  page = (tmp_path / 'out' / 'index.html').read_text()
  assert 'on <b>cifar10</b>, measured as FID against the statistics in edm.npz, in' in page
  renamed = FID | {'reference': FID['reference'] | {'file': 'copy.npz'}}
  other = FID | {'reference': FID['reference'] | {'digest': 'f'}}
  given += [
    str(run(tmp_path / 'c', ROWS, results=renamed)),
    str(run(tmp_path / 'd', ROWS, results=other)),
  ]
  comparing.check(comparing.read(given[:3], DEFAULT))
  with pytest.raises(UserError, match=r'^d was compared with another evaluation.reference than a'):
    comparing.check(comparing.read(given, DEFAULT))
  plain = str(run(tmp_path / 'e', ROWS))
  with pytest.raises(UserError, match=r'measure both again with the same evaluation\.inception'):
    comparing.check(comparing.read([given[0], plain], DEFAULT))


def of_prompts(directory, rows, **more):
  run(directory, rows)
  (directory / 'results.json').write_text(json.dumps(clip_results_of(rows, **more)))
  return str(directory)


def test_runs_of_prompts_are_compared_by_their_clip_scores(tmp_path):
  given = [of_prompts(tmp_path / 'a', ROWS), of_prompts(tmp_path / 'b', SECOND)]
  text = comparing.compare(given, DEFAULT, tmp_path / 'out')
  assert text.splitlines()[1].split() == ['base', 'ddim', '4', '4', '2', '1.5', '-0.5']
  page = (tmp_path / 'out' / 'index.html').read_text()
  assert (
    'measured as CLIP score by vit, for the same texts.' in page and 'Larger values are bett' in page
  )
  assert {path.name for path in (tmp_path / 'out').iterdir()} == {'index.html', 'clip_score.png'}


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'clip': {'name': 'vit', 'digest': 'c'}}, r'^b was measured with another CLIP model than a'),
    ({'prompts': {'dataset': 'p', 'digest': 'e'}}, r'^b was measured with other prompts than a'),
  ],
)
def test_clip_scores_of_other_models_or_texts_are_not_compared(tmp_path, changes, message):
  given = [of_prompts(tmp_path / 'a', ROWS), of_prompts(tmp_path / 'b', ROWS, **changes)]
  with pytest.raises(UserError, match=message):
    comparing.check(comparing.read(given, DEFAULT))
  given[1] = str(run(tmp_path / 'c', ROWS))
  with pytest.raises(UserError, match=r'^c was measured as FD-<b> and a as CLIP score'):
    comparing.check(comparing.read(given, DEFAULT))


def test_runs_of_an_older_version_are_compared_with_new_ones(tmp_path):
  described = {'split': 'train', 'name': 'digits', 'digest': 'i', 'num_images': 7}
  older = run(tmp_path / 'a', ROWS)
  newer = run(tmp_path / 'b', ROWS, results={'reference': described})
  comparing.check(comparing.read([str(older), str(newer)], DEFAULT))


def test_bad_arguments_are_one_line_and_write_nothing(runs, tmp_path):
  first, second = runs
  (tmp_path / 'file').write_text('')
  (tmp_path / 'full').mkdir()
  (tmp_path / 'full' / 'mine.txt').write_text('')
  cases = [
    (['--workdirs='], 'needs --workdirs=A,B'),
    ([f'--workdirs={first}'], 'needs --workdirs=A,B'),
    ([f'--workdirs={first},{first}/../first'], 'two or more different runs'),
    ([f'--workdirs={first},{tmp_path}/none'], 'holds no run'),
    ([f'--workdirs={first},{second}', f'--workdir={first}'], 'instead of --workdir'),
    ([f'--workdirs={first},{second}', f'--out={tmp_path}/file'], 'is a file; name a folder'),
    ([f'--workdirs={first},{second}', f'--out={tmp_path}/full'], 'holds other files, such as mine.txt'),
  ]
  for arguments, message in cases:
    code, out, err = tiny.run_cli('--mode=compare', *arguments)
    assert code == 2 and out == '' and message in err and len(err.splitlines()) == 1, (arguments, err)
  (second / 'results.json').unlink()
  code, _, err = tiny.run_cli('--mode=compare', f'--workdirs={first},{second}')
  assert code == 2 and f'there is no {second}/results.json; finish the run' in err
  assert not (first / 'report' / 'comparison').exists()


def test_damaged_files_are_named(runs):
  given = list(map(str, runs))
  whole = (runs[1] / 'report' / 'samples.npz').read_bytes()
  (runs[1] / 'report' / 'samples.npz').write_bytes(whole[:-9])
  with pytest.raises(DamagedError, match=r'samples\.npz is damaged'):
    comparing.read(given, DEFAULT)
  (runs[1] / 'report' / 'samples.npz').unlink()
  for content in ('{"rows": []}', '{', '[]'):
    (runs[1] / 'results.json').write_text(content)
    with pytest.raises(DamagedError, match=r'results\.json is damaged'):
      comparing.read(given, DEFAULT)
