"""Bad input: one clear line, a non-zero exit, and nothing changed."""

import json
import os
import subprocess
import sys

import pytest

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
    ['progressive_0008', 'progressive_0002, progressive_0001'],
  ),
  'sample none': (
    ['--mode=sample', '--workdir={finished}', '--out=x.png', '--num_samples=0'],
    ['num_samples'],
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
  places = {'workdir': root / 'workdir', 'finished': finished, 'typo': typo}
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


def test_a_second_run_in_one_workdir_is_refused(finished, tmp_path):
  from diffusion_distillation import workdir
  from diffusion_distillation.errors import UserError

  with (
    workdir.open_workdir(tmp_path, tiny.config()),
    pytest.raises(UserError, match='another run is using'),
  ):
    workdir.open_workdir(tmp_path, tiny.config())
  workdir.open_workdir(tmp_path, tiny.config()).close()
