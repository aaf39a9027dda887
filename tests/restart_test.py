"""Killed, stopped or damaged, and started again: the end is the one of a run that was never stopped."""

import hashlib
import json
import shutil
import signal
import time

import pytest

from tests import tiny

STAGES = ['base', 'progressive_0002', 'progressive_0001']
COMMAND = tiny.flags()


def outcome(workdir):
  """Digests of all stages, all measured values, and the models' folders."""
  digests = [json.loads((workdir / name / 'stage.json').read_text())['digest'] for name in STAGES]
  rows = json.loads((workdir / 'results.json').read_text())['rows']
  models = {name: model_folder(workdir / name / 'model') for name in STAGES}
  return digests, [(row['stage'], row['sampler'], row['nfe'], row['value']) for row in rows], models


def model_folder(folder):
  """The digest of each file; of model.json, without the seconds that anything took."""
  found = {path.name: path.read_bytes() for path in folder.iterdir()}
  described = json.loads(found['model.json'])
  del described['provenance']['seconds']
  for row in described['metrics']:
    del row['seconds_per_image']
  found['model.json'] = json.dumps(described).encode()
  return {name: hashlib.sha256(content).hexdigest() for name, content in found.items()}


def steps_logged(workdir, stage):
  path = workdir / stage / 'metrics.jsonl'
  return [json.loads(line)['step'] for line in path.read_text().splitlines()]


def wait_for(condition, process):
  """Polls until `condition()`, for as long as the process lives; False if it ended first."""
  while process.poll() is None:
    if condition():
      return True
    time.sleep(0.01)
  return False


@pytest.mark.slow
def test_killed_again_and_again_it_ends_like_the_uninterrupted_run(finished, tmp_path):
  """SIGKILL around the saves of each stage, and while measuring."""
  workdir = tmp_path / 'workdir'
  command = [*COMMAND, f'--workdir={workdir}']
  moments = [
    lambda: (workdir / 'base' / 'checkpoints' / '5').exists(),
    lambda: (workdir / 'base' / 'checkpoints' / '12').exists(),
    lambda: list((workdir / 'progressive_0002' / 'checkpoints').glob('*')),
    lambda: (workdir / 'progressive_0001' / 'metrics.jsonl').exists(),
    lambda: (workdir / 'results.partial.json').exists(),
  ]
  killed = 0
  for moment in moments:
    if moment():
      continue  # the last kill came later than it was meant to
    process = tiny.start_main(*command)
    if wait_for(moment, process):
      process.kill()
    process.communicate()
    killed += process.returncode == -signal.SIGKILL
  assert killed >= 3
  code, _, err = tiny.run_main(*command)
  assert code == 0, err
  assert outcome(workdir) == outcome(finished)
  for stage in STAGES:
    assert steps_logged(workdir, stage) == steps_logged(finished, stage)


@pytest.mark.slow
def test_sigterm_saves_first_and_says_so(finished, tmp_path):
  workdir = tmp_path / 'workdir'
  command = [*COMMAND, f'--workdir={workdir}']
  process = tiny.start_main(*command)
  assert wait_for(lambda: (workdir / 'base' / 'metrics.jsonl').exists(), process)
  process.send_signal(signal.SIGTERM)
  _, err = process.communicate(timeout=600)
  assert process.returncode == 75, err
  assert 'SIGTERM' in err.splitlines()[-1] and 'Traceback' not in err
  saved = [int(path.name) for path in (workdir / 'base' / 'checkpoints').iterdir()]
  assert max(saved) >= 1
  code, _, err = tiny.run_main(*command)
  assert code == 0, err
  assert outcome(workdir) == outcome(finished)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_is_passed_over_and_trained_again(finished, tmp_path):
  workdir = shutil.copytree(finished, tmp_path / 'workdir')
  shutil.rmtree(workdir / 'progressive_0002' / 'model')  # from which a finished stage is read otherwise
  newest = workdir / 'progressive_0002' / 'checkpoints' / '8'
  victim = max(
    (path for path in newest.rglob('*') if path.is_file()), key=lambda path: path.stat().st_size
  )
  content = bytearray(victim.read_bytes())
  content[len(content) // 2] ^= 1
  victim.write_bytes(bytes(content))
  code, _, err = tiny.run_main(*COMMAND, f'--workdir={workdir}')
  assert code == 0, err
  assert f'damaged checkpoint {newest}' in err
  assert (workdir / 'progressive_0002' / 'damaged' / '8').is_dir()
  assert outcome(workdir) == outcome(finished)


def cut_short(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_finished_stage_of_which_nothing_whole_is_left_is_not_silently_trained_again(
  finished, tmp_path
):
  workdir = shutil.copytree(finished, tmp_path / 'workdir')
  for path in (workdir / 'base' / 'checkpoints').rglob('_METADATA'):
    cut_short(path)
  shutil.rmtree(workdir / 'base' / 'model')  # a finished stage is read from there
  code, _, err = tiny.run_cli(*COMMAND, f'--workdir={workdir}')
  assert code == 3 and 'no complete checkpoint is left' in err.splitlines()[-1], err
  assert len(list((workdir / 'base' / 'damaged').iterdir())) == 2


@pytest.mark.slow
def test_damaged_results_are_measured_again(finished, tmp_path):
  workdir = shutil.copytree(finished, tmp_path / 'workdir')
  cut_short(workdir / 'results.json')
  code, _, err = tiny.run_main(*COMMAND, f'--workdir={workdir}')
  assert code == 0 and 'results.json is damaged' in err, err
  assert outcome(workdir) == outcome(finished)


def test_a_stage_whose_parent_was_replaced_is_refused(finished, tmp_path):
  workdir = shutil.copytree(finished, tmp_path / 'workdir')
  path = workdir / 'progressive_0001' / 'stage.json'
  lineage = json.loads(path.read_text())
  lineage['parent']['digest'] = '0' * 64
  path.write_text(json.dumps(lineage))
  code, _, err = tiny.run_cli(*COMMAND, f'--workdir={workdir}')
  assert code == 2
  assert err.splitlines()[-1].startswith('error:') and 'parent' in err.splitlines()[-1]
  assert str(path) in err
