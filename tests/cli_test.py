"""Bad input: one clear line, a non-zero exit, and nothing changed."""

import importlib.util

import pytest

from tests import bad_data, tiny

# What is asked, and what the one line has to say. {workdir} is not there; {finished} is a finished run.
TRAIN = ['--config=configs/digits.py', '--workdir={workdir}']
SAMPLE = ['--mode=sample', '--workdir={finished}', '--out=x.png']
CASES = {
  'mistyped key': ([*TRAIN, '--config.train.bach_size=8'], ['bach_size', 'batch_size']),
  'mistyped key in the file': (
    ['--config={typo}', '--workdir={workdir}'],
    ['num_update', 'num_updates'],
  ),
  'wrong type': ([*TRAIN, '--config.train.batch_size=many'], ['train.batch_size', 'many']),
  'no config file': (['--config=configs/none.py', '--workdir={workdir}'], ['configs/none.py']),
  'no config': (['--workdir={workdir}'], ['--config']),
  'no workdir': (['--config=configs/digits.py'], ['--mode=train needs --workdir']),
  'plan without workdir': (['--mode=plan', TRAIN[0]], ['--mode=plan needs --workdir']),
  'sample without workdir': (['--mode=sample', '--out=x.png'], ['--mode=sample needs --workdir']),
  'evaluate without workdir': (['--mode=evaluate'], ['--mode=evaluate needs --workdir']),
  'import without workdir': (
    ['--mode=import', TRAIN[0], '--source=google', '--checkpoint={typo}'],
    ['--mode=import needs --workdir'],
  ),
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
  'micro-batches and batch': (
    [*TRAIN, '--config.train.micro_batches=3'],
    ['train.batch_size=64', 'train.micro_batches=3', '8 devices', 'multiple of 24'],
  ),
  'rounds and micro-batches': (
    [*TRAIN, '--config.distill.micro_batches=16'],
    ['distill.batch_size=64', 'distill.micro_batches=16', 'multiple of 128'],
  ),
  'a factor of one': ([*TRAIN, '--config.distill.factor=1'], ['distill.factor=(1,)', 'at least 2']),
  'a factor too large': (
    [*TRAIN, '--config.distill.factor=(8,2)'],
    ['start_steps=32', 'end_steps=1', 'distill.factor=(8, 2)', '128'],
  ),
  'unknown decay': (
    [*TRAIN, '--config.train.decay=cosin'],
    ['train.decay', 'cosin', "did you mean 'cosine'"],
  ),
  'unknown decay of rounds': ([*TRAIN, '--config.distill.decay=exp'], ['distill.decay', 'linear']),
  'unknown weights to distill': (
    [*TRAIN, '--config.distill.from_weights=best'],
    ['distill.from_weights', 'best', 'last'],
  ),
  'unknown schedule': (
    [*TRAIN, '--config.schedule.name=linear'],
    ['schedule.name', "did you mean 'linear_beta'"],
  ),
  'unknown time input': (
    [*TRAIN, '--config.model.time_input=cos'],
    ['time_input', 'cos', 'inv_cos', 'sigmoid'],
  ),
  'unknown sampler to measure': (
    [*TRAIN, "--config.evaluation.samplers=('ddim','hein')"],
    ['sampler', 'hein', "did you mean 'heun'"],
  ),
  'variance out of range': (
    [*TRAIN, '--config.evaluation.gamma=2'],
    ['evaluation', 'gamma=2.0', '[0, 1]'],
  ),
  'no sampler to measure': ([*TRAIN, '--config.evaluation.samplers=()'], ['evaluation.samplers=()']),
  'nothing to measure': (
    [
      *TRAIN,
      '--config.distill.end_steps=4',
      '--config.distill.factor=2',
      '--config.evaluation.max_steps=2',
    ],
    ['evaluation.max_steps=2', 'distill.end_steps=4'],
  ),
  'images of another size': (
    [*TRAIN, '--config.dataset.image_size=16'],
    ['dataset.image_size=16', 'digits', 'size 8'],
  ),
  'plan without config': (['--mode=plan', '--workdir={workdir}'], ['--mode=plan', '--config']),
  'plan of a bad config': (
    [*TRAIN, '--mode=plan', '--config.train.micro_batches=3'],
    ['train.batch_size=64', 'train.micro_batches=3'],
  ),
  'import from nowhere': ([*TRAIN, '--mode=import'], ['--source', 'google', 'workdir']),
  'import from another source': (
    [*TRAIN, '--mode=import', '--source=gogle'],
    ['--source', "did you mean 'google'"],
  ),
  'import of nothing': ([*TRAIN, '--mode=import', '--source=google'], ['--checkpoint']),
  'import of a missing file': (
    [*TRAIN, '--mode=import', '--source=google', '--checkpoint={workdir}/x'],
    ['--checkpoint={workdir}/x', 'No such file'],
  ),
  'import of a missing stage': (
    [*TRAIN, '--mode=import', '--source=workdir', '--checkpoint={workdir}/base'],
    ['--checkpoint={workdir}/base', 'stage.json'],
  ),
  'features of nothing': (['--mode=features', '--out=x.npz'], ['--mode=features needs --images']),
  'features without weights': (
    ['--mode=features', '--images={directory}', '--out=x.npz'],
    ['--mode=features needs --inception'],
  ),
  'features of a missing folder': (
    ['--mode=features', '--images={workdir}', '--inception={typo}', '--out=x.npz'],
    ['--images={workdir}', 'no such file or directory'],
  ),
  'features of a folder without images': (
    ['--mode=features', '--images={directory}', '--inception={typo}', '--out=x.npz'],
    ['--images={directory} holds no image'],
  ),
  'features as a picture': (
    ['--mode=features', '--images={directory}', '--inception={typo}', '--out=x.png'],
    ['--out=x.png', 'ends in .npz'],
  ),
  'import without config': (
    ['--mode=import', '--source=google', '--checkpoint={typo}', '--workdir={workdir}'],
    ['--mode=import', '--config'],
  ),
  'import of something else': (
    [*TRAIN, '--mode=import', '--source=google', '--checkpoint={typo}'],
    ['--checkpoint={typo}', 'ema_params'],
  ),
  'workdir below a file': ([TRAIN[0], '--workdir={typo}/run'], ['cannot write', '{typo}/run']),
  'workdir read only': ([TRAIN[0], '--workdir=/proc/run'], ['cannot write', '/proc/run']),
  'unknown output': ([*TRAIN, '--config.model.output=score'], ['model.output', 'score', 'eps']),
  'unknown weighting': ([*TRAIN, '--config.weighting=snr_trunk'], ['snr_trunk', 'snr_trunc']),
  'groups and width': ([*TRAIN, '--config.model.num_groups=5'], ['num_groups=5', '32']),
  'levels and size': ([*TRAIN, '--config.model.ch_mult=(1,1,1,1,1)'], ['5 levels', '8x8']),
  'no updates': ([*TRAIN, '--config.train.num_updates=0'], ['train.num_updates=0']),
  'fraction of an update': (
    [*TRAIN, '--config.distill.num_updates=(8.5,)'],
    ['distill.num_updates=(8.5,)', 'integers'],
  ),
  'rate that is a word': (
    [*TRAIN, '--config.distill.learning_rate=("a",)'],
    ['distill.learning_rate', 'numbers'],
  ),
  'an average twice': ([*TRAIN, '--config.train.ema_decay=(0.9,0.9)'], ['train.ema_decay', 'twice']),
  'a sampler twice': (
    [*TRAIN, '--config.evaluation.samplers=("heun","heun")'],
    ['evaluation.samplers', 'twice'],
  ),
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
  'evaluate with a factor of one': (
    ['--mode=evaluate', '--workdir={finished}', *tiny.flags(), '--config.distill.factor=1'],
    ['distill.factor=(1,)', 'at least 2'],
  ),
  'sample seed': (['--mode=sample', '--workdir={finished}', '--out=x.png', '--seed=-1'], ['seed']),
  'sample with what is no sampler': (
    [*SAMPLE, '--sampler=dimm'],
    ['--sampler', 'dimm', "did you mean 'ddim'"],
  ),
  'gamma of another sampler': ([*SAMPLE, '--gamma=0.5'], ['--gamma', '--sampler=ancestral']),
  'more factors than rounds': (
    [*TRAIN, '--config.distill.factor=(2,2,2,2,2,2)'],
    ['distill.factor=(2, 2, 2, 2, 2, 2)', 'rounds, 5'],
  ),
  'plan of another config': (
    ['--mode=plan', '--config=configs/digits.py', '--workdir={finished}'],
    ['another config', 'model.ch was 8, is 32'],
  ),
  'sample with unknown weights': (
    [*SAMPLE, '--weights=ema_0.5'],
    ['--weights', 'ema_0.5', "'ema', 'last'"],
  ),
  'sample at times that fall': ([*SAMPLE, '--times=0,0.5,0.25,1'], ['--times=0,0.5,0.25,1', 'increase']),
  'sample at times that stop short': ([*SAMPLE, '--times=0,0.5'], ['--times=0,0.5', 'end with 1']),
  'sample at words': ([*SAMPLE, '--times=0,half,1'], ['--times=0,half,1', 'half']),
  'sample by times and steps': (
    [*SAMPLE, '--times=0,1', '--steps=1'],
    ['--steps', '--times', 'not both'],
  ),
  'sample with too much noise': ([*SAMPLE, '--sampler=ancestral', '--gamma=2'], ['gamma']),
  'sample in no steps': ([*SAMPLE, '--steps=0'], ['steps']),
  'classes without classes': (
    [*SAMPLE, '--classes=3'],
    ['--classes=3', 'progressive_0001', 'unconditional'],
  ),
  'sample from nothing': (
    ['--mode=sample', '--workdir={workdir}', '--out=x.png'],
    ['{workdir}', 'holds no model'],
  ),
  'evaluate nothing': (['--mode=evaluate', '--workdir={workdir}'], ['holds no run']),
} | bad_data.CASES


def written(*roots):
  files = [path for root in roots for path in root.rglob('*') if path.name != '.lock']
  return {path: path.stat().st_mtime_ns for path in files}


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
  places |= bad_data.images(root)
  before = written(root, finished)
  found = importlib.util.find_spec
  outcomes = {}
  with pytest.MonkeyPatch.context() as patch:
    # Nothing is downloaded, wherever TensorFlow is installed.
    without = lambda name, *more: None if name == 'tensorflow' else found(name, *more)  # noqa: E731
    patch.setattr(importlib.util, 'find_spec', without)
    for case, (arguments, _) in CASES.items():
      code, out, err = tiny.run_cli(*(argument.format(**places) for argument in arguments))
      outcomes[case] = code, out + err
  return places, outcomes, (before, written(root, finished))


@pytest.mark.parametrize('case', CASES)
def test_one_line_says_what_is_wrong(outcomes, case):
  places, results, _ = outcomes
  code, text = results[case]
  assert code == 2, text
  lines = text.strip().splitlines()
  assert len(lines) == 1 and lines[0].startswith('error: '), text
  for word in CASES[case][1]:
    assert word.format(**places) in lines[0]


def test_bad_input_leaves_everything_as_it_was(outcomes):
  places, _, (before, after) = outcomes
  assert after == before and not places['workdir'].exists()


@pytest.mark.slow
@pytest.mark.parametrize('case', ['mistyped key', 'batch and devices'])
def test_main_py_says_and_returns_the_same(outcomes, case):
  """A flag that is refused while flags are parsed, and a config that is refused later."""
  places, results, _ = outcomes
  command = [argument.format(**places) for argument in CASES[case][0]]
  code, out, err = tiny.run_main(*command, devices=8)
  assert (code, out + err) == results[case]
