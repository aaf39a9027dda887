"""Every file of a workdir, damaged in every way: the right values or a message; never wrong values."""

import gc
import itertools
import json
import os
import pathlib
import re
import shutil

import jax
import numpy as np
import pytest

from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.evaluation import results
from diffusion_distillation.stages import extending, provenance
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.system import logs, sharding
from diffusion_distillation.system.checkpoints import Checkpoints, digest
from tests import disasters, tiny
from tests.disasters import CONFIG, LAST, PLAN
from tests.restart_test import COMMAND, outcome


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
  path.write_bytes(b'')


def flip(path):
  content = bytearray(path.read_bytes())
  if content:
    content[len(content) // 2] ^= 0x04
  path.write_bytes(bytes(content))


def garbage(path):
  path.write_bytes(np.random.Generator(np.random.Philox(7)).bytes(max(path.stat().st_size, 64)))


def empty_directory(path):
  shutil.rmtree(path)
  path.mkdir()


OF_FILES = {
  'half': truncate,
  'empty': empty,
  'gone': pathlib.Path.unlink,
  'flipped': flip,
  'garbage': garbage,
}
WEIGHTS = f'{LAST}/model/weights.safetensors'
DESCRIPTIONS = ['config.json', 'dataset.json', f'{LAST}/stage.json', f'{LAST}/model/model.json']
OF_DIRECTORIES = {'emptied': empty_directory, 'gone': shutil.rmtree}


@pytest.fixture(autouse=True)
def one_device(monkeypatch):
  """Restoring to one is quicker than to eight."""
  monkeypatch.setattr(sharding, '_in_use', [sharding._make(jax.devices()[:1], 1)])


@pytest.fixture(autouse=True)
def nothing_left():
  """Reads that failed in the background are told when they are collected: here, and not in the output of a later test."""
  yield
  gc.collect()


@pytest.fixture(scope='module')
def like():
  return PLAN[LAST].abstract_state


@pytest.fixture(scope='module')
def whole(finished, like):
  """Digest of the newest state of the last stage."""
  state, _ = Checkpoints(finished / LAST).restore(like, set_aside=False)
  assert int(state.step) == 8
  return digest(state)


def parts(root, of_files):
  """Names, below `root`, of its files, or of its directories and itself."""
  kind = pathlib.Path.is_file if of_files else pathlib.Path.is_dir
  found = [root, *root.rglob('*')]
  return sorted(os.path.relpath(path, root) for path in found if kind(path))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('kind', 'of_files'),
  [*((kind, True) for kind in OF_FILES), *((kind, False) for kind in OF_DIRECTORIES)],
)
def test_no_damage_to_a_checkpoint_gives_wrong_values(
  finished, tmp_path, like, whole, caplog, kind, of_files
):
  """Alone in its stage: what comes back is bit for bit what was saved, or nothing and a warning."""
  original = finished / LAST / 'checkpoints' / '8'
  noticed = []
  names = parts(original, of_files)
  for k, name in enumerate(names):
    stage_dir = tmp_path / str(k)
    copy = shutil.copytree(original, stage_dir / 'checkpoints' / '8')
    (OF_FILES if of_files else OF_DIRECTORIES)[kind](copy / name)
    caplog.clear()
    restored = Checkpoints(stage_dir).restore(like, set_aside=False)
    if restored is None:
      noticed.append(name)
      assert not copy.exists() or f'damaged checkpoint {copy}: ' in caplog.text
      assert 'Traceback' not in caplog.text.split('damaged checkpoint')[-1]
    else:
      assert digest(restored[0]) == whole, name
  assert len(noticed) >= 3, noticed
  if of_files:
    assert {'_CHECKPOINT_METADATA', 'state/_METADATA'} & set(noticed), noticed


@pytest.mark.parametrize('kind', OF_FILES)
def test_the_older_checkpoint_is_used_instead_of_a_damaged_one(finished, tmp_path, caplog, kind):
  workdir = shutil.copytree(finished, tmp_path / 'workdir')
  shutil.rmtree(workdir / LAST / 'model')  # a finished model is read from there
  newest = workdir / LAST / 'checkpoints' / '8'
  files = [path for path in newest.rglob('*') if path.is_file()]
  OF_FILES[kind](max(files, key=lambda path: path.stat().st_size))
  model = disasters.load(workdir)
  assert model.step == 5 and f'damaged checkpoint {newest}' in caplog.text
  OF_FILES[kind](workdir / LAST / 'checkpoints' / '5' / 'state' / '_METADATA')
  model = disasters.load(workdir)
  assert model is None or model.step == 5


def reopened(workdir):
  """What a run reads of a workdir before it trains: digest of the last stage, None if there is none."""
  workdirs.check_made_with(workdir, CONFIG)
  stages, images = workdirs.plan_for(workdir, CONFIG)
  extending.check_configs(workdir, stages, CONFIG)
  finished = [provenance.is_finished(workdir, stage) for stage in stages]
  workdirs.claim(workdir, CONFIG)
  workdirs.claim_images(workdir, images.images)
  model = disasters.load(workdir)
  assert model is None or finished[-1]
  return model and model.digest


@pytest.mark.parametrize('name', DESCRIPTIONS)
def test_damaged_descriptions_end_in_a_message_or_are_written_again(finished, tmp_path, name):
  workdir = shutil.copytree(finished, tmp_path / 'workdir')
  healthy = reopened(workdir)
  told = 0
  for kind, damage in OF_FILES.items():
    shutil.copy(finished / name, workdir / name)
    damage(workdir / name)
    try:
      found = reopened(workdir)
    except UserError as error:
      told += 1
      assert str(workdir / name) in str(error), (kind, error)
    else:
      # What is gone is written again, or is as if never begun; nobody may read the flipped byte.
      assert kind in ('gone', 'flipped'), kind
      assert found in (healthy, None)
  assert told >= 3


@pytest.mark.parametrize('name', DESCRIPTIONS)
@pytest.mark.parametrize(
  'text', ['null', '[]', '{}', '{"config": 3}', '{"classes": 3}', '{"config": {"train": []}}']
)
def test_a_description_that_holds_something_else_is_named(finished, tmp_path, name, text):
  """Valid JSON that nobody here wrote."""
  for path in (*DESCRIPTIONS, WEIGHTS):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    shutil.copy(finished / path, tmp_path / path)
  (tmp_path / name).write_text(text)
  try:
    found = reopened(tmp_path)
  except UserError as error:
    assert str(tmp_path / name) in str(error)
  else:
    assert name == 'config.json'  # which is written again, if nothing in it differs
    assert found == json.loads((finished / LAST / 'stage.json').read_text())['digest']


@pytest.mark.parametrize('kind', OF_FILES)
def test_damaged_weights_of_a_finished_model_are_named(finished, tmp_path, kind):
  workdir = shutil.copytree(finished, tmp_path / 'workdir')
  OF_FILES[kind](workdir / WEIGHTS)
  with pytest.raises(
    DamagedError, match=f'{re.escape(str(workdir / WEIGHTS))} (is|does not) .*restore it from a copy'
  ):
    disasters.load(workdir)


def test_damaged_results_give_no_wrong_row(finished, tmp_path, caplog):
  old, path = json.loads((finished / 'results.json').read_text()), tmp_path / 'results.json'
  now = {name: old[name] for name in ('extractor', 'reference')}
  whole = results.known_rows(finished / 'results.json', now)
  assert len(whole) == 8
  texts = ['null', '{}', '{"rows": []}', '{"extractor": 3}']
  texts += [json.dumps(now | {'rows': rows}) for rows in (None, [1], [{}])]
  for damage in (*OF_FILES.values(), *(lambda path, text=text: path.write_text(text) for text in texts)):
    shutil.copy(finished / 'results.json', path)
    damage(path)
    caplog.clear()
    rows = results.known_rows(path, now)
    assert rows in ({}, whole) or damage is flip
    assert rows or not path.exists() or 'is damaged' in caplog.text or damage is flip


def test_damaged_metrics_lose_lines_and_nothing_else(finished, tmp_path):
  original = finished / LAST / 'metrics.jsonl'
  lines = logs.read(original)
  assert [line['step'] for line in lines] == [4, 8]
  for damage in OF_FILES.values():
    stage_dir = pathlib.Path(shutil.copytree(finished / LAST, tmp_path / damage.__name__))
    damage(stage_dir / 'metrics.jsonl')
    writer = logs.MetricsWriter(stage_dir, 4)
    writer.write(8, {'loss': 1.5})
    writer.close()
    found = logs.read(stage_dir / 'metrics.jsonl')
    assert [line['step'] for line in found] in ([4, 8], [8]), damage
    assert found[-1] == {'step': 8, 'loss': 1.5}


@pytest.mark.slow
def test_damaged_compiled_programs_do_not_stop_a_run(finished, tmp_path, monkeypatch):
  """Half of a program, as a killed process may leave one in jax's cache: compiled again."""
  cache = pathlib.Path(shutil.copytree(os.environ['JAX_COMPILATION_CACHE_DIR'], tmp_path / 'cache'))
  programs = [path for path in cache.rglob('*-cache') if path.is_file()]
  assert programs
  for path, damage in zip(programs, itertools.cycle([truncate, empty, garbage, flip])):
    damage(path)
  monkeypatch.setenv('JAX_COMPILATION_CACHE_DIR', str(cache))
  workdir = shutil.copytree(finished, tmp_path / 'workdir')
  disasters.cut_back(workdir)
  code, _, err = tiny.run_main(*COMMAND, f'--workdir={workdir}')
  assert code == 0 and 'Traceback' not in err, err
  assert outcome(workdir) == outcome(finished)


def test_damage_is_an_error_of_its_own_exit_code(finished, tmp_path):
  workdir = shutil.copytree(finished, tmp_path / 'workdir')
  truncate(workdir / LAST / 'stage.json')
  with pytest.raises(DamagedError):
    reopened(workdir)
  code, _, err = tiny.run_cli(*COMMAND, f'--workdir={workdir}')
  assert code == 3
  disasters.assert_told(err, 'stage.json is damaged', 'restore it')
