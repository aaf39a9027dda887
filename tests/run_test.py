"""A whole run through main.py, as a user starts it: what it leaves, and, in this process, what can be done with it."""

import hashlib
import html.parser
import itertools
import json
import shutil

import numpy as np
import pytest
from PIL import Image

from diffusion_distillation import datasets
from diffusion_distillation.datasets import loading
from diffusion_distillation.errors import NumericalError
from diffusion_distillation.evaluation.report import measured
from diffusion_distillation.run import run as run_module
from tests import tiny

STAGES = ['base', 'progressive_0002', 'progressive_0001']


def tree_digest(workdir):
  """Names and contents of all files."""
  files = sorted(path for path in workdir.rglob('*') if path.is_file() and path.name != '.lock')
  return {
    str(path.relative_to(workdir)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
  }


@pytest.fixture(scope='module')
def results(finished):
  return json.loads((finished / 'results.json').read_text())


def test_results_have_a_row_for_each_stage_sampler_and_step_count(results):
  names = ('stage', 'weights', 'sampler', 'num_steps')
  rows = {tuple(row[name] for name in names) for row in results['rows']}
  undistilled = {('base', 'ema', sampler, n) for sampler in ('ddim', 'ancestral') for n in (4, 2, 1)}
  students = {('progressive_0002', 'ema', 'ddim', 2), ('progressive_0001', 'ema', 'ddim', 1)}
  assert rows == undistilled | students
  assert len(results['rows']) == len(rows)


def test_rows_say_what_was_measured(results):
  for row in results['rows']:
    assert row['metric'] == 'FD-digits'
    assert row['method'] == ('denoising' if row['stage'] == 'base' else 'progressive')
    assert row['nfe'] == row['num_steps'] and row['grid'] == 'uniform'
    assert row['num_samples'] == 48 and row['seed'] == 1 and row['clip_x'] is True
    assert row.get('gamma') == (0.0 if row['sampler'] == 'ancestral' else None)
    assert np.isfinite(row['value']) and row['value'] > results['floor']['value'] > 0
    assert 0 < row['seconds_per_image'] < 1


def test_one_step_is_the_same_for_both_samplers(results):
  """From t = 1 to t = 0 the ancestral step adds no noise and DDIM's is x: the same images."""
  values = {
    row['sampler']: row['value'] for row in results['rows'] if row['stage'] == 'base' and row['nfe'] == 1
  }
  assert values['ddim'] == pytest.approx(values['ancestral'], rel=1e-6)


def test_floor_and_held_out_images_are_reported_with_their_numbers(results):
  """The floor is at the size of the rows, so it is far above the larger held-out set's at this size."""
  floor, held_out = results['floor'], results['held_out']
  assert (floor['num_samples'], held_out['num_samples']) == (48, 360)
  assert floor['value'] > held_out['value'] > 0


def test_results_name_extractor_versions_and_seconds(results):
  assert results['extractor']['name'] == 'digits' and len(results['extractor']['digest']) == 64
  assert results['extractor']['held_out_accuracy'] > 0.97
  assert results['extractor']['task'] == 'classes'
  assert results['reference']['num_images'] == 1437
  assert results['skipped'] == {'train': 0, 'held_out': 0}
  assert {'jax', 'flax', 'optax', 'orbax-checkpoint', 'python'} <= results['versions'].keys()
  assert all(results['seconds'][stage] > 0 for stage in STAGES)


def test_results_tell_what_each_stage_comes_from_and_what_it_cost(results):
  """The seconds of all that was trained from the base on."""
  stages, seconds = results['stages'], results['seconds']
  assert list(stages) == STAGES
  assert stages['base'] == {'method': 'denoising', 'parent': None, 'start': None, 'cost': 0.0}
  cost = 0.0
  for parent, name in itertools.pairwise(STAGES):
    cost += seconds[name]
    expected = {'method': 'progressive', 'parent': parent, 'start': parent}
    assert stages[name] == expected | {'cost': pytest.approx(cost)}


def test_lineage_leads_from_the_last_student_to_the_base(finished):
  lineages = [json.loads((finished / name / 'stage.json').read_text()) for name in STAGES]
  assert lineages[0]['parent'] is lineages[0]['start'] is None
  for parent, child in itertools.pairwise(lineages):
    expected = {'stage': parent['stage'], 'weights': 'ema', 'digest': parent['digest']}
    assert child['parent'] == child['start'] == expected
  for lineage, steps in zip(lineages, (4, 2, 1), strict=True):
    assert lineage['finished'] and lineage['num_steps'] == steps and lineage['output'] == 'v'
    assert (lineage['network_name'], lineage['space']) == ('unet', 'pixels')
    assert 'data_range' not in lineage and lineage['sampler'] == 'ddim'
    assert lineage['pairs'] is lineage['distance'] is None
    assert lineage['schedule'] == {'name': 'Cosine', 'logsnr_min': -20.0, 'logsnr_max': 20.0}
    assert lineage['config']['train']['num_updates'] == 12


def test_metrics_and_events_of_every_stage(finished):
  for name, updates in zip(STAGES, (12, 8, 8), strict=True):
    lines = [json.loads(line) for line in (finished / name / 'metrics.jsonl').read_text().splitlines()]
    assert [line['step'] for line in lines] == list(range(4, updates + 1, 4))
    assert all(np.isfinite(line['loss']) and line['skipped'] == 0 for line in lines)
    assert list((finished / name).glob('events.out.tfevents.*'))


def test_the_learning_rate_goes_to_zero_within_each_round_and_not_in_the_base(finished):
  def rates(name):
    lines = (finished / name / 'metrics.jsonl').read_text().splitlines()
    return [json.loads(line)['learning_rate'] for line in lines]

  for name in STAGES[1:]:
    first, last = rates(name)
    assert first / last == pytest.approx((8 + 7 + 6 + 5) / (4 + 3 + 2 + 1), rel=1e-5)
  assert rates('base') == sorted(rates('base'))


class Page(html.parser.HTMLParser):
  """Collects the tags of a page, and what it would fetch."""

  def __init__(self, text):
    super().__init__()
    self.links, self.tags = [], []
    self.feed(text)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.links += [value for name, value in attrs if name in ('src', 'srcset', 'href')]


def test_the_report_is_one_page_that_fetches_nothing(finished, results):
  text = (finished / 'report' / 'index.html').read_text()
  page = Page(text)
  assert page.tags.count('img') == 4 + 2 * 3 + 3  # figures, two strips a stage, and the nearest images
  assert all(link.startswith('data:image/png;base64,') for link in page.links)
  assert 'width=device-width' in text
  assert all(
    f'<td>{row["num_drawn"]}</td><td>{measured(row["value"], row["error"])}' in text
    for row in results['rows']
  )
  assert 'train.num_updates' in text


def test_the_report_has_its_pictures(finished):
  for name in ('frechet', 'seconds', 'cost', 'nearest', 'samples'):
    with Image.open(finished / 'report' / f'{name}.png') as image:
      assert image.width > 400 and np.asarray(image.convert('L')).std() > 5


@pytest.mark.parametrize('stage', [None, 'base'])
def test_npz_samples_from_the_workdir_alone(finished, tmp_path, stage):
  before = tree_digest(finished)
  out = tmp_path / 'samples.npz'
  chosen = [f'--stage={stage}'] if stage else []
  arguments = [
    '--mode=sample',
    f'--workdir={finished}',
    '--num_samples=5',
    '--seed=3',
    f'--out={out}',
    *chosen,
  ]
  code, text, err = tiny.run_cli(*arguments)
  assert code == 0, err
  assert (stage or 'progressive_0001') in text
  with np.load(out, allow_pickle=False) as arrays:
    assert list(arrays) == ['images', 'arr_0']
    assert arrays['images'].shape == (5, 8, 8, 1) and arrays['images'].dtype == np.uint8
  assert tree_digest(finished) == before


def test_a_second_run_changes_nothing_but_the_report(finished, tmp_path):
  """Finished stages are not trained again, measured rows not measured again."""
  workdir = shutil.copytree(finished, tmp_path / 'workdir')
  code, _, err = tiny.run_cli(*tiny.flags(), f'--workdir={workdir}')
  assert code == 0, err
  before, after = tree_digest(finished), tree_digest(workdir)
  changed = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
  assert {name for name in changed if not name.startswith('report/')} <= {'results.json'}
  old, new = (json.loads((path / 'results.json').read_text()) for path in (finished, workdir))
  assert old['rows'] == new['rows']
  assert [line.split()[0] for line in err.splitlines() if line.endswith('  finished')] == STAGES


@pytest.mark.slow
@pytest.mark.parametrize('extractor_too', [False, True])
def test_evaluate_measures_again_and_finds_the_same(finished, tmp_path, extractor_too):
  workdir = shutil.copytree(finished, tmp_path / 'workdir')
  (workdir / 'results.json').unlink()
  if extractor_too:
    (workdir / 'extractor.safetensors').unlink()
  shutil.rmtree(workdir / 'report')
  code, _, err = tiny.run_cli('--mode=evaluate', f'--workdir={workdir}')
  assert code == 0, err
  old, new = (json.loads((path / 'results.json').read_text()) for path in (finished, workdir))
  assert old['extractor'] == new['extractor']
  assert [row['value'] for row in old['rows']] == pytest.approx(
    [row['value'] for row in new['rows']], rel=1e-6
  )
  assert (workdir / 'report' / 'index.html').exists()
  assert all(
    (workdir / name / 'stage.json').read_text() == (finished / name / 'stage.json').read_text()
    for name in STAGES
  )


def test_the_held_out_split_is_held_out():
  settings = datasets.Settings.of(tiny.config().dataset)
  train, test = (datasets.open_split(settings, role) for role in datasets.ROLES)
  assert (len(train), len(test)) == (1437, 360)
  every = np.concatenate([train.images, test.images]).reshape(1797, -1)
  from sklearn.datasets import load_digits

  original = np.round(load_digits().data * 255 / 16).astype(np.uint8)
  assert sorted(map(bytes, every)) == sorted(map(bytes, original))


def test_images_are_closed_however_a_run_ends(tmp_path, monkeypatch):
  """Processes that read them would keep the run's own from ending."""
  closed = []

  def fit(*args):
    raise NumericalError('diverged')

  monkeypatch.setattr(run_module, 'fit', fit)
  monkeypatch.setattr(loading.Loader, 'close', lambda self: closed.append(self))
  with pytest.raises(NumericalError, match='diverged'):
    run_module.run(tiny.config(), tmp_path / 'run')
  assert len(closed) == 1


@pytest.mark.slow
def test_training_that_diverges_ends_with_exit_code_4(tmp_path):
  """The other codes are reached in cli_test.py (2), chaos_damage_test.py (3), chaos_disk_test.py (5), machines_test.py (75)."""
  given = tiny.flags(train__learning_rate=1e38, max_skipped=1)
  code, _, err = tiny.run_cli(*given, f'--workdir={tmp_path / "run"}')
  assert code == 4 and 'error: stage base: loss or gradient not finite' in err
