"""Runs on images of one's own: folders, broken files, prepared copies, streams; told apart by class or by turn."""

import json
import pathlib
import shutil
import signal
import sys
import time

import numpy as np
import pytest
from PIL import Image

from configs import default
from diffusion_distillation import cli, datasets, modes
from diffusion_distillation.datasets import prepared
from diffusion_distillation.evaluation import features
from diffusion_distillation.run import run as run_module
from tests import tiny
from tests.cli_test import written
from tests.exit_codes_test import options

pytestmark = pytest.mark.slow

CLASSES = ('cat', 'dog')
CHANGES = {
  'dataset__name': 'folder',
  'dataset__label_dropout': 0.3,
  'model__conditional': True,
  'model__ch_mult': (1,),
  'train__learning_rate': 0.1,
  'train__ema_decay': (0.9,),
  'distill__start_steps': 1,  # no rounds
  'evaluation__num_samples': 16,
  'evaluation__samplers': ('ddim',),
}
STREAMED = ['--config.dataset.in_memory_gb=0', '--config.dataset.workers=1']


def draw(path, *seed):
  """A picture that has no symmetry, dark or light by the first seed, to be cut and resized to 8x8."""
  path.parent.mkdir(parents=True, exist_ok=True)
  noise = np.random.default_rng(seed).integers(0, 60, (8, 12, 3))
  ramp = np.add.outer(10 * np.arange(8), np.arange(12))[..., None]
  Image.fromarray((noise + ramp + 90 * seed[0]).astype(np.uint8)).save(path)


def config(**changes):
  return tiny.config(**CHANGES | changes)


def command(folder, workdir):
  return [*tiny.flags(**CHANGES, dataset__path=folder), f'--workdir={workdir}']


def read(path):
  return json.loads(path.read_text())


@pytest.fixture(scope='module')
def animals(tmp_path_factory):
  """30 cats, 30 dogs, and the path of the cat that is cut short, one of those that are trained on."""
  root = tmp_path_factory.mktemp('pictures') / 'animals'
  for label, name in enumerate(CLASSES):
    for k in range(30):
      draw(root / name / f'{k}.png', label, k)
  broken = root / 'cat' / '0.png'
  broken.write_bytes(broken.read_bytes()[:80])
  assert (str(broken), 0) in datasets.open_split(settings(root), 'train').files
  return root, broken


def settings(root, **changes):
  return datasets.Settings.of(config(dataset__path=str(root), **changes).dataset)


@pytest.fixture(scope='module')
def whole(animals, tmp_path_factory):
  """A run in memory that nothing interrupts, in this process: its workdir, and what it says."""
  workdir = tmp_path_factory.mktemp('whole') / 'workdir'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(features, '_UPDATES', 60)
    code, out, err = tiny.run_cli(*command(animals[0], workdir))
  assert code == 0, err
  return workdir, out + err


def test_a_folder_by_class_is_trained_on_and_measured(animals, whole):
  root, _ = animals
  workdir, _ = whole
  results = read(workdir / 'results.json')
  assert [row['metric'] for row in results['rows']] == ['FD-animals'] == [results['metric']]
  assert results['extractor']['task'] == 'classes'
  assert results['skipped'] == {'train': 1, 'held_out': 0}
  assert results['reference']['num_images'] == 60 - 3 - 1  # a twentieth is held out, one is broken
  assert results['held_out']['num_samples'] == 3
  images = datasets.open_split(settings(root), 'train')
  assert read(workdir / 'dataset.json') == {
    'name': 'animals',
    'num_images': 57,
    'image_shape': [8, 8, 3],
    'classes': list(CLASSES),
    'identity': images.identity,
    'label_counts': [sum(label == k for _, label in images.files) for k in range(2)],
  }
  assert read(workdir / 'base' / 'stage.json')['network']['num_classes'] == 2


def test_a_broken_file_is_named_once(animals, whole):
  _, broken = animals
  _, text = whole
  (line,) = [line for line in text.splitlines() if str(broken) in line and 'such as' not in line]
  assert 'skipped an image of animals' in line and 'cannot be decoded' in line
  assert text.count('skipped an image') == 1 and 'Traceback' not in text


def test_what_is_trained_on_and_what_is_not_is_told_before_a_run(whole):
  lines = [' '.join(line.split()) for line in whole[1].splitlines()]
  assert 'images of animals, 8x8x3' in lines
  (train,) = [line for line in lines if line.startswith('to train on 57 images of 2 classes, ')]
  (held_out,) = [line for line in lines if line.startswith('held out 3 images of ')]
  (broken,) = [line for line in lines if line.startswith('of them 1 broken, such as ')]
  assert lines.index(train) < lines.index(broken) < lines.index(held_out)


def workers_of(pid):
  """What the processes that this one has spawned to read images have mapped into memory."""
  found = {}
  for process in pathlib.Path('/proc').glob('[0-9]*'):
    try:
      parent = int((process / 'stat').read_text().rpartition(')')[2].split()[1])
      if parent == pid and 'datasets.reader' in (process / 'cmdline').read_text():
        found[process.name] = (process / 'maps').read_text()
    except OSError:
      pass  # it has ended meanwhile
  return found


@pytest.fixture(scope='module')
def resumed(animals, whole, tmp_path_factory):
  """The same run, streamed through a worker and stopped, and ended from a prepared copy.

  Its workdir, the copy, what the two processes say, and all that was mapped by the first one's worker.
  """
  root, copy = animals[0], tmp_path_factory.mktemp('prepared') / 'copy'
  workdir, told = tmp_path_factory.mktemp('resumed') / 'workdir', []
  mapped = set()
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr('diffusion_distillation.system.interrupts.install', lambda: None)
    prepare = config(dataset__path=str(root), dataset__prepared=str(copy), dataset__workers=0)
    assert cli.run(cli.Options('prepare', prepare, default.get_config(), None)) == 0

    process = tiny.start_main(*command(root, workdir), *STREAMED, devices=8)
    while process.poll() is None and not (workdir / 'base' / 'metrics.jsonl').exists():
      time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    while process.poll() is None:
      mapped.update(
        line.split('/')[-1] for maps in workers_of(process.pid).values() for line in maps.splitlines()
      )
      time.sleep(0.02)
    told.append(process.communicate())
    assert process.returncode == 75, told
    assert 1 <= max(int(path.name) for path in (workdir / 'base' / 'checkpoints').iterdir()) < 12

    shutil.copy(whole[0] / 'extractor.safetensors', workdir)  # of fewer updates
    prepared_copy = f'--config.dataset.prepared={copy}'
    code, *last = tiny.run_main(*command(root, workdir), prepared_copy, *STREAMED, devices=8)
    assert code == 0, last
  return workdir, copy, [''.join(texts) for texts in (*told, last)], mapped


def test_streamed_stopped_and_resumed_from_a_copy_it_ends_like_the_run_in_memory(whole, resumed):
  one, other = whole[0], resumed[0]
  assert read(one / 'base' / 'stage.json')['digest'] == read(other / 'base' / 'stage.json')['digest']
  assert read(one / 'dataset.json') == read(other / 'dataset.json')
  mine, theirs = read(one / 'results.json'), read(other / 'results.json')
  for key in ('skipped', 'reference', 'held_out', 'floor'):
    assert mine[key] == theirs[key], key
  for row in (*mine['rows'], *theirs['rows']):
    del row['seconds_per_image']
  assert mine['rows'] == theirs['rows']
  lines = [(path / 'base' / 'metrics.jsonl').read_text().splitlines() for path in (one, other)]
  assert [json.loads(line)['step'] for line in lines[0]] == [
    json.loads(line)['step'] for line in lines[1]
  ]


def test_a_copy_tells_of_the_broken_file_what_the_folder_does(animals, resumed):
  _, copy, (first, last), _ = resumed
  info = prepared.read_info(copy)
  assert info['finished'] and len(info['splits']['train']['broken']) == 1
  (line,) = [line for line in last.splitlines() if 'skipped an image' in line]
  assert str(animals[1]) in line and 'cannot be decoded' in line
  assert first.count('skipped an image') <= 1 and 'Traceback' not in first + last


@pytest.mark.skipif(sys.platform != 'linux', reason='looks at /proc')
def test_a_process_that_reads_images_loads_numpy_and_no_jax(resumed):
  """Of each worker jax would take some 200 MB, and seconds at the start."""
  names = resumed[3]
  assert any('multiarray' in name for name in names), 'no worker was seen'
  assert not [name for name in names if 'jax' in name.lower()]


@pytest.fixture
def quiet(monkeypatch):
  monkeypatch.setattr('diffusion_distillation.system.interrupts.install', lambda: None)


@pytest.mark.parametrize('mode', ['train', 'evaluate'])
def test_a_folder_that_has_changed_is_refused_before_anything_is_done(
  animals, whole, tmp_path, quiet, capsys, mode
):
  workdir = shutil.copytree(whole[0], tmp_path / 'workdir')
  root = shutil.copytree(animals[0], tmp_path / 'animals')
  draw(root / 'dog' / 'new.png', 1, 99)
  before = written(tmp_path)
  assert cli.run(options(workdir, mode=mode, config=config(dataset__path=str(root)))) == 2
  out, err = capsys.readouterr()
  path = workdir / 'dataset.json'
  assert err.startswith(
    f'error: {path}: this run began with other images: 57 of 2 classes, now 58 of 2; '
  )
  assert err.count('\n') == 1 and out == '' and written(tmp_path) == before


def test_a_folder_that_has_only_moved_is_the_same(animals, whole, tmp_path):
  root = shutil.copytree(animals[0], tmp_path / 'animals')
  modes.workdir.plan_for(whole[0], config(dataset__path=str(root)))
  shutil.move(root / 'dog', root / 'dot')
  moved = shutil.move(root, tmp_path / 'again')  # listings are kept by path
  with pytest.raises(cli.UserError, match='began with other images'):
    modes.workdir.plan_for(whole[0], config(dataset__path=str(moved)))


def test_a_conditional_model_is_sampled_by_name_or_without_a_class(whole, tmp_path, quiet, capsys):
  drawn = {}
  for given in (['cat'], ['dog', 'cat'], ['none']):
    out = tmp_path / 'x.npz'
    assert cli.run(options(whole[0], out=out, classes=given, steps=4)) == 0, capsys.readouterr()
    with np.load(out) as arrays:
      drawn[given[0]] = arrays['images'].astype(int), arrays['labels'].tolist()
  (cats, of_cats), (both, of_both), (untold, of_untold) = drawn.values()
  assert (of_cats, of_both, of_untold) == ([0] * 12, [1, 0] * 6, [-1] * 12)
  np.testing.assert_array_equal(both[1::2], cats[1::2])
  for one, other in ((both[::2], cats[::2]), (untold, cats), (untold[::2], both[::2])):
    assert (one != other).any(axis=(1, 2, 3)).all()


def test_a_flat_folder_has_no_classes_and_is_measured_by_quarter_turns(tmp_path, monkeypatch):
  """A whole run, but for the updates, which change nothing."""

  def train_step(recipe, state, frozen, batch):
    assert batch['cond'] is None
    counts = {'skipped': state.skipped, 'skipped_in_a_row': state.skipped_in_a_row}
    return state.replace(step=state.step + 1), counts | {'loss': 0.0 * state.step}

  monkeypatch.setattr(run_module, 'train_steps', train_step)
  monkeypatch.setattr(features, '_UPDATES', 40)
  for k in range(40):
    draw(tmp_path / 'flat' / f'{k}.png', 0, k)
  path = str(tmp_path / 'flat')
  changes = {'model__conditional': False, 'dataset__label_dropout': 0.0, 'evaluation__batch_size': 16}
  run_module.run(config(dataset__path=path, **changes), tmp_path / 'run')
  results = read(tmp_path / 'run' / 'results.json')
  assert results['metric'] == 'FD-flat' and results['extractor']['task'] == 'quarter turns'
  assert results['rows'][0]['value'] > 0 and results['skipped'] == {'train': 0, 'held_out': 0}
  assert read(tmp_path / 'run' / 'dataset.json')['classes'] == []
  assert 'tell quarter turns apart' in (tmp_path / 'run' / 'report' / 'index.html').read_text()
