"""Bad input: one clear line, a non-zero exit, and nothing changed."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from configs import default
from diffusion_distillation import cli, datasets, sharding, train
from diffusion_distillation import workdir as workdirs
from diffusion_distillation.errors import DamagedError, NumericalError, Preempted, UserError
from tests import tiny

# Imports once, then carries out each command line in a fork of its own.
DRIVER = """
import json, os, sys, tempfile
import main
from absl import app
from diffusion_distillation import cli
outcomes = []
for arguments in json.load(sys.stdin):
  with tempfile.TemporaryFile('w+') as err:
    child = os.fork()
    if child == 0:
      os.dup2(err.fileno(), 2)
      os.dup2(err.fileno(), 1)
      sys.argv = ['main.py', *arguments]
      app.run(main.main, flags_parser=cli.parse_flags)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    err.seek(0)
    outcomes.append((code, err.read()))
json.dump(outcomes, sys.stdout)
"""

# What is asked, and what the one line has to say. {workdir} is not there; {finished} is a finished run.
TRAIN = ['--config=configs/digits.py', '--workdir={workdir}']
CASES = {
  'mistyped key': ([*TRAIN, '--config.train.bach_size=8'], ['bach_size', 'batch_size']),
  'mistyped key in the file': (
    ['--config={typo}', '--workdir={workdir}'],
    ['num_update', 'num_updates'],
  ),
  'wrong type': ([*TRAIN, '--config.train.batch_size=many'], ['train.batch_size', 'many']),
  'no config file': (['--config=configs/none.py', '--workdir={workdir}'], ['configs/none.py']),
  'no config': (['--workdir={workdir}'], ['--config']),
  'no workdir': (['--config=configs/digits.py'], ['workdir']),
  'unknown flag': ([*TRAIN, '--mod=train'], ['mod']),
  'stray word': ([*TRAIN, 'evaluate'], ['evaluate']),
  'unknown mode': ([*TRAIN, '--mode=test'], ['mode', 'evaluate']),
  'steps that do not halve': (
    [*TRAIN, '--config.distill.start_steps=24'],
    ['start_steps=24', 'end_steps=1'],
  ),
  'end above start': ([*TRAIN, '--config.distill.end_steps=64'], ['start_steps=32', 'end_steps=64']),
  'batch and devices': ([*TRAIN, '--config.train.batch_size=60'], ['train.batch_size=60', '8 devices']),
  'rounds and devices': (
    [*TRAIN, '--config.distill.batch_size=4'],
    ['distill.batch_size=4', '8 devices'],
  ),
  'no such data set': ([*TRAIN, '--config.dataset.name=cifar11'], ['cifar11', 'digits']),
  'workdir below a file': ([TRAIN[0], '--workdir={typo}/run'], ['cannot write', '{typo}/run']),
  'workdir read only': ([TRAIN[0], '--workdir=/proc/run'], ['cannot write', '/proc/run']),
  'unknown output': ([*TRAIN, '--config.model.output=score'], ['model.output', 'score', 'eps']),
  'unknown weighting': ([*TRAIN, '--config.weighting=snr_trunk'], ['snr_trunk', 'snr_trunc']),
  'groups and width': ([*TRAIN, '--config.model.num_groups=5'], ['num_groups=5', '32']),
  'levels and size': ([*TRAIN, '--config.model.ch_mult=(1,1,1,1,1)'], ['5 levels', '8x8']),
  'no updates': ([*TRAIN, '--config.train.num_updates=0'], ['train.num_updates=0']),
  'no groups': ([*TRAIN, '--config.model.num_groups=0'], ['model.num_groups=0']),
  'no levels': ([*TRAIN, '--config.model.ch_mult=()'], ['model.ch_mult=()']),
  'infinite rate': ([*TRAIN, '--config.train.learning_rate=inf'], ['train.learning_rate=inf']),
  'huge seed': ([*TRAIN, '--config.evaluation.seed=3000000000'], ['evaluation.seed=3000000000']),
  'schedule upside down': ([*TRAIN, '--config.schedule.logsnr_min=30.'], ['logsnr_min', 'logsnr_max']),
  'another config': (
    ['--config=configs/digits.py', '--workdir={finished}', '--config.seed=7'],
    ['another config', 'seed was 0, is 7', 'model.ch was 8, is 32', 'train.num_updates was 12, is'],
  ),
  'sample without out': (['--mode=sample', '--workdir={finished}'], ['--out', '.png', '.npz']),
  'sample to jpeg': (
    ['--mode=sample', '--workdir={finished}', '--out=x.jpg'],
    ['x.jpg', '.png', '.npz'],
  ),
  'sample into nowhere': (
    ['--mode=sample', '--workdir={finished}', '--out=/no/x.png'],
    ['/no', 'x.png'],
  ),
  'sample no stage': (
    ['--mode=sample', '--workdir={finished}', '--out=x.png', '--stage=progressive_0008'],
    ['progressive_0008', 'base, progressive_0002, progressive_0001'],
  ),
  'sample none': (
    ['--mode=sample', '--workdir={finished}', '--out=x.png', '--num_samples=0'],
    ['num_samples'],
  ),
  'sample to a directory': (
    ['--mode=sample', '--workdir={finished}', '--out={directory}'],
    ['directory'],
  ),
  'evaluate too few': (
    ['--mode=evaluate', '--workdir={finished}', *tiny.flags(), '--config.evaluation.num_samples=1'],
    ['evaluation.num_samples'],
  ),
  'evaluate another config': (
    ['--mode=evaluate', '--workdir={finished}', *tiny.flags(), '--config.seed=3'],
    ['another config', 'seed was 0, is 3'],
  ),
  'sample seed': (['--mode=sample', '--workdir={finished}', '--out=x.png', '--seed=-1'], ['seed']),
  'sample from nothing': (['--mode=sample', '--workdir={workdir}', '--out=x.png'], ['holds no run']),
  'evaluate nothing': (['--mode=evaluate', '--workdir={workdir}'], ['holds no run']),
}


@pytest.fixture(scope='module')
def outcomes(finished, tmp_path_factory):
  root = tmp_path_factory.mktemp('cli')
  typo = root / 'typo.py'
  typo.write_text(
    'from configs import default\n\n\ndef get_config():\n'
    '  c = default.get_config()\n  c.train.num_update = 3\n  return c\n'
  )
  (root / 'x.png').mkdir()
  places = {'workdir': root / 'workdir', 'finished': finished, 'typo': typo, 'directory': root / 'x.png'}
  before = {path: path.stat().st_mtime_ns for path in finished.rglob('*') if path.name != '.lock'}
  commands = [[argument.format(**places) for argument in arguments] for arguments, _ in CASES.values()]
  environment = os.environ | {'PYTHONPATH': str(tiny.ROOT)}
  done = subprocess.run(
    [sys.executable, '-c', DRIVER],
    input=json.dumps(commands),
    capture_output=True,
    text=True,
    cwd=tiny.ROOT,
    env=environment,
  )
  assert done.returncode == 0, done.stderr
  after = {path: path.stat().st_mtime_ns for path in finished.rglob('*') if path.name != '.lock'}
  assert before == after and not places['workdir'].exists()
  return places, dict(zip(CASES, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize('case', CASES)
def test_one_line_says_what_is_wrong(outcomes, case):
  places, results = outcomes
  code, text = results[case]
  assert code == 2, text
  lines = text.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith('error: '), text
  for word in CASES[case][1]:
    assert word.format(**places) in lines[0]


def options(workdir, **changes):
  fields = {'mode': 'sample', 'config': None, 'default': default.get_config(), 'stage': None}
  fields |= {'num_samples': 12, 'seed': 0, 'out': workdir / 'x.npz', 'rest': [], 'workdir': workdir}
  return cli.Options(**fields | changes)


def test_a_half_finished_conditional_run_of_colour_images_is_sampled_with_labels(tmp_path, monkeypatch):
  """Also: without its data set, which need not be at hand to sample from a workdir."""
  grey = datasets.load('digits', 'train')
  colour = datasets.ImageSet('rgb', grey.images.repeat(3, axis=-1), grey.labels, 10)
  monkeypatch.setitem(datasets.SOURCES, 'rgb', lambda split: colour)
  config = tiny.config(model__conditional=True, dataset__name='rgb', dataset__random_flip=True)
  workdirs.claim(tmp_path, config)
  stages, images = workdirs.plan_for(config)
  step = sharding.compile_step(train.train_step)
  train.fit(step, stages[0], None, images, tmp_path, config)
  monkeypatch.delitem(datasets.SOURCES, 'rgb')
  monkeypatch.setattr('diffusion_distillation.interrupts.install', lambda: None)
  assert cli.run(options(tmp_path)) == 0
  with np.load(tmp_path / 'x.npz', allow_pickle=False) as arrays:
    assert arrays['images'].shape == (12, 8, 8, 3) and arrays['images'].dtype == np.uint8
    assert arrays['labels'].tolist() == [*range(10), 0, 1]


def test_every_kind_of_error_has_its_exit_code(tmp_path, monkeypatch, capsys):
  kinds = {UserError: 2, DamagedError: 3, NumericalError: 4, Preempted: 75, OSError: 2}
  for kind, code in kinds.items():

    def fail(_, kind=kind):
      raise kind('what is wrong')

    monkeypatch.setitem(cli.MODES, 'sample', fail)
    monkeypatch.setattr('diffusion_distillation.interrupts.install', lambda: None)
    assert cli.run(options(tmp_path)) == code
    assert capsys.readouterr().err == 'error: what is wrong\n'


def test_a_second_run_in_one_workdir_is_refused(finished, tmp_path):
  with workdirs.lock_workdir(tmp_path), pytest.raises(UserError, match='another run is using'):
    workdirs.lock_workdir(tmp_path)
  workdirs.lock_workdir(tmp_path).close()
