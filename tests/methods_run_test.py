"""All methods in one workdir: one run through main.py, then killed and stopped on the way, sampled and changed."""

import json
import os
import shutil
import signal

import numpy as np
import pytest
from orbax.checkpoint import v1 as ocp
from PIL import Image

from configs import default
from diffusion_distillation import cli
from diffusion_distillation.evaluation import measure
from diffusion_distillation.interop import importing
from diffusion_distillation.run import run as run_module
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.system import sharding
from diffusion_distillation.system.checkpoints import Checkpoints, digest
from tests import tiny
from tests.restart_test import wait_for

STUDENTS = ('knowledge', 'consistency', 'dmd', 'dmd2')
ROUNDS = ('progressive_0002', 'progressive_0001')
ALL = ('base', *ROUNDS, *STUDENTS)
OVERRIDES = {
  'model__ch_mult': (1,),
  'methods': ('progressive', *STUDENTS),
  'pairs__num_pairs': 40,
  'pairs__sampler': 'ddim',
  'pairs__num_steps': 4,
  'pairs__batch_size': 2,
  'consistency__num_updates': 16,
  'consistency__start_intervals': 2,
  'consistency__end_intervals': 6,
  'consistency__solver': 'ddim',
  'consistency__target_decay': 0.25,
  'consistency__sample_steps': (1, 2),
  'knowledge__num_updates': 6,
  'dmd__num_updates': 6,
  'dmd__start': 'progressive_0001',
  'dmd2__num_updates': 24,
  'dmd2__fake_updates': 2,
  'dmd2__start': 'progressive_0002',
  'dmd2__num_steps': 2,
  'dmd2__gan_head': 'strided',
  'dmd2__joint_clip': True,
  'evaluation__samplers': ('ddim',),
  'log__health_every': 6,
} | {
  f'{name}__{key}': value
  for name in STUDENTS
  for key, value in {'batch_size': 16, 'warmup': 0, 'learning_rate': 1e-3, 'ema_decay': (0.5,)}.items()
}
COMMAND = tiny.flags(**OVERRIDES)


@pytest.fixture(scope='module')
def ran(finished, tmp_path_factory):
  """A run of all methods: its workdir, and what was said."""
  workdir = tiny.with_extractor(tmp_path_factory.mktemp('methods') / 'workdir', finished)
  code, _, err = tiny.run_main(*tiny.flags(**OVERRIDES), f'--workdir={workdir}')
  assert code == 0, err
  return workdir, err


def read(workdir, name, file='stage.json'):
  return json.loads((workdir / name / file).read_text())


def metrics(workdir, name):
  return [json.loads(line) for line in (workdir / name / 'metrics.jsonl').read_text().splitlines()]


def measured(workdir):
  rows = json.loads((workdir / 'results.json').read_text())['rows']
  return [(row['stage'], row['sampler'], row['num_steps'], row['nfe'], row['value']) for row in rows]


def content(workdir):
  files = [path for path in workdir.rglob('*') if path.is_file() and path.name != '.lock']
  return {str(path.relative_to(workdir)): path.read_bytes() for path in files}


@pytest.mark.slow
def test_one_run_has_every_method_s_results_and_curves(ran):
  workdir, err = ran
  rows = measured(workdir)
  assert [row[:-1] for row in rows] == [
    *(('base', 'ddim', steps, steps) for steps in (4, 2, 1)),
    ('progressive_0002', 'ddim', 2, 2),
    ('progressive_0001', 'ddim', 1, 1),
    ('knowledge', 'ddim', 1, 1),
    ('consistency', 'multistep_consistency', 1, 1),
    ('consistency', 'multistep_consistency', 2, 2),
    ('dmd', 'ddim', 1, 1),
    ('dmd2', 'multistep_consistency', 2, 2),
  ]
  assert all(np.isfinite(value) for *_, value in rows)
  page = (workdir / 'report' / 'index.html').read_text()
  for caption in ('Progressive', 'Knowledge', 'Consistency', 'DMD', 'DMD2', 'Base, DDIM'):
    assert f'{caption}</th>' in page, caption
  for name in ('cost', 'health_diversity', 'frechet', 'samples'):
    with Image.open(workdir / 'report' / f'{name}.png') as picture:
      assert min(picture.size) > 100
  assert page.count('Denoisings of noised samples') == 2  # what both scores of the DMDs make of samples
  told = [line.split()[0] for line in err.splitlines() if 'network calls' in line]
  assert told == [*ALL[:3], 'pairs', *STUDENTS, 'evaluation']


@pytest.mark.slow
def test_lineage_and_cost_name_what_each_student_comes_from(ran):
  workdir, _ = ran
  lineages = {name: read(workdir, name) for name in ALL}
  models = {
    name: {'stage': name, 'weights': 'ema', 'digest': found['digest']}
    for name, found in lineages.items()
  }
  of_pairs = lineages['knowledge']['pairs']
  assert len(of_pairs) == 64 and len(list((workdir / 'pairs').glob('*.npy'))) == 20
  drawing = read(workdir, 'pairs', 'pairs.json')['seconds']
  stages = json.loads((workdir / 'results.json').read_text())['stages']
  needed = {'knowledge': (), 'consistency': (), 'dmd': ROUNDS, 'dmd2': ROUNDS[:1]}
  for name, rounds in needed.items():
    found, with_pairs = lineages[name], name in ('knowledge', 'dmd')
    assert found['finished'] and found['parent'] == models['base']
    assert found['start'] == models[rounds[-1] if rounds else 'base']
    assert found['pairs'] == (of_pairs if with_pairs else None) and found['distance'] is None
    assert found['method'] == stages[name]['method'] == name
    seconds = sum(lineages[stage]['seconds'] for stage in (name, *rounds))
    assert stages[name]['cost'] == pytest.approx(seconds + drawing * with_pairs)
  samplers = [lineages[name]['sampler'] for name in STUDENTS]
  assert samplers == ['ddim', 'multistep_consistency', 'ddim', 'multistep_consistency']


@pytest.mark.slow
def test_students_are_looked_at_and_the_fake_score_is_watched(ran):
  workdir, _ = ran
  for name in STUDENTS:
    lines = metrics(workdir, name)
    looks = [line['step'] for line in lines if 'diversity' in line]
    count = lines[-1]['step']
    assert looks == sorted({*range(6, count + 1, 6), count})
    assert all(line['saturation'] == 0.0 for line in lines if 'diversity' in line)  # the digits are grey
    assert set(read(workdir, name, 'health.json')) == {'spread', 'brightness', 'saturation'}
    assert (workdir / name / 'denoisings.png').exists() == name.startswith('dmd')
    assert [('fake_loss' in line) for line in lines] == [name.startswith('dmd')] * len(lines)
  lags = [line.get('fake_score_lag') for line in metrics(workdir, 'dmd2')]
  losses = [line['fake_loss'] for line in metrics(workdir, 'dmd2')]
  assert lags[0] is None and lags[1] == pytest.approx(losses[1] / losses[0])
  last = metrics(workdir, 'dmd2')[-1]
  assert {'critic_loss', 'gan_loss', 'dm_gradient', 'head_grad_norm', 'grad_norm'} <= set(last)
  assert 'regression' in metrics(workdir, 'dmd')[-1] and 'regression' not in last
  assert [line['intervals'] for line in metrics(workdir, 'consistency')][-1] > 2


def states(workdir):
  """Digest of each stage's whole last state: all networks, all optimizers, averages; of the model; of the pairs."""
  found = {}
  for name in ALL:
    newest = workdir / name / 'checkpoints' / str(Checkpoints(workdir / name).steps()[-1])
    saved = ocp.metadata(newest).custom_metadata['sha256']
    found[name] = (saved, read(workdir, name)['digest'], read(workdir, name)['pairs'])
  return found


@pytest.mark.slow
def test_killed_and_stopped_again_and_again_it_ends_bit_for_bit_the_same(ran, tmp_path):
  """SIGKILL while pairs are drawn, SIGTERM in consistency and in DMD2, between turns of its generator."""
  reference, _ = ran
  workdir = shutil.copytree(reference, tmp_path / 'workdir')
  for name in ('pairs', 'knowledge', 'consistency', 'dmd2'):
    shutil.rmtree(workdir / name)
  command = [*COMMAND, f'--workdir={workdir}']
  moments = [
    (signal.SIGKILL, lambda: (workdir / 'pairs' / '00002.npy').exists()),
    (signal.SIGTERM, lambda: (workdir / 'consistency' / 'metrics.jsonl').exists()),
    (signal.SIGTERM, lambda: (workdir / 'dmd2' / 'checkpoints' / '5').exists()),
  ]
  ended = []
  for number, moment in moments:
    process = tiny.start_main(*command)
    if wait_for(moment, process):
      process.send_signal(number)
    _, err = process.communicate(timeout=900)
    ended.append(process.returncode)
    assert process.returncode in (75, -signal.SIGKILL), err
    assert not (workdir / 'dmd2' / 'stage.json').exists() or not read(workdir, 'dmd2')['finished']
  assert ended == [-signal.SIGKILL, 75, 75]
  code, _, err = tiny.run_main(*command)
  assert code == 0, err
  assert states(workdir) == states(reference)
  assert measured(workdir) == measured(reference)
  assert content(workdir / 'pairs').keys() == content(reference / 'pairs').keys()
  for name in STUDENTS:
    steps = [[line['step'] for line in metrics(place, name)] for place in (workdir, reference)]
    assert set(steps[0]) == set(steps[1])


def in_process(mode, workdir, monkeypatch, capsys, config=None, **changes):
  """`main.py` without its process: exit code, stdout and stderr."""
  monkeypatch.setattr('diffusion_distillation.system.interrupts.install', lambda: None)
  code = cli.run(cli.Options(mode, config, default.get_config(), workdir, **changes))
  return code, *capsys.readouterr()


@pytest.mark.slow
@pytest.mark.parametrize(
  ('stage', 'steps', 'calls'),
  [
    ('dmd', None, '1 ddim step, 1 network call'),
    ('consistency', 4, '4 multistep_consistency steps, 4 network calls'),
  ],
)
def test_sampling_uses_the_stage_s_own_sampler(ran, tmp_path, monkeypatch, capsys, stage, steps, calls):
  out = tmp_path / 'x.npz'
  asked = {'stage': stage, 'steps': steps, 'num_samples': 16, 'out': out}
  code, said, _ = in_process('sample', ran[0], monkeypatch, capsys, **asked)
  assert code == 0 and f'16 images of {stage} in {calls} each' in said
  images = np.load(out, allow_pickle=False)['images']
  if steps:
    other = in_process('sample', ran[0], monkeypatch, capsys, sampler='ddim', **asked)
    assert other[0] == 0 and '4 ddim steps' in other[1]
    assert (np.load(out, allow_pickle=False)['images'] != images).any()
  assert images.shape == (16, 8, 8, 1) and images.std() > 0


@pytest.mark.slow
def test_evaluate_measures_the_same_again_and_plan_changes_nothing(ran, tmp_path, monkeypatch, capsys):
  workdir = shutil.copytree(ran[0], tmp_path / 'workdir')
  code, _, err = tiny.run_main('--mode=evaluate', f'--workdir={workdir}')
  assert code == 0, err
  assert measured(workdir) == measured(ran[0])
  before = content(workdir)
  config = tiny.config(**OVERRIDES | {'log__measured_updates': 0})
  code, _, said = in_process('plan', workdir, monkeypatch, capsys, config=config)
  assert code == 0 and content(workdir) == before
  lines = [line.split() for line in said.splitlines() if 'network calls' in line]
  assert [words[0] for words in lines if words[-1] == 'finished'] == list(ALL)
  assert [words[0] for words in lines] == [*ALL, 'evaluation']  # no pairs: none are needed any more


@pytest.mark.slow
def test_students_start_from_the_stage_that_is_named_and_the_fake_score_from_the_teacher(
  ran, tmp_path, monkeypatch
):
  """A step that moves nothing: what a stage ends with is what it began with."""

  def step(recipe, state, frozen, batch):
    counts = {'skipped': state.skipped, 'skipped_in_a_row': state.skipped_in_a_row}
    return state.replace(step=state.step + 1), counts | {'loss': 1.0}

  monkeypatch.setattr(sharding, 'compile_step', lambda _: step)
  monkeypatch.setattr(measure, 'evaluate', lambda *_, **__: None)
  workdir = shutil.copytree(ran[0], tmp_path / 'workdir')
  config = tiny.config(**OVERRIDES | {'log__health_every': 0})
  for name in ('dmd', 'dmd2'):
    shutil.rmtree(workdir / name)
  run_module.run(config, workdir)
  planned = {stage.name: stage for stage in workdirs.plan_for(workdir, config)[0]}
  for name, start in (('dmd', 'progressive_0001'), ('dmd2', 'progressive_0002')):
    assert read(workdir, name)['digest'] == read(workdir, start)['digest']
    like = planned[name].abstract_state
    state, _ = Checkpoints(workdir / name).restore(like, set_aside=False)
    fake_score = digest(sharding.to_host(state.params['fake_score']))
    assert fake_score == read(workdir, 'base')['digest'] != read(workdir, start)['digest']


CHANGED = {
  'pairs': ({'pairs__num_steps': 5}, 'num_steps was 4, is 5'),
  'section': ({'dmd__num_updates': 5}, 'dmd.num_updates was 6, is 5'),
  'start': ({'dmd__start': 'base'}, 'dmd.start was progressive_0001, is base'),
  'seed': ({'seed': 1}, 'seed was 0, is 1'),
}


@pytest.mark.slow
@pytest.mark.parametrize('case', CHANGED)
def test_a_changed_config_is_refused_under_stages_that_are_there(
  ran, tmp_path, monkeypatch, capsys, case
):
  workdir = shutil.copytree(ran[0], tmp_path / 'workdir')
  before = content(workdir)
  changes, text = CHANGED[case]
  config = tiny.config(**OVERRIDES | changes)
  code, _, err = in_process('train', workdir, monkeypatch, capsys, config=config)
  last = err.splitlines()[-1]
  assert code == 2 and last.startswith('error: ') and text in last, err
  assert {k for k, v in content(workdir).items() if before.get(k) != v} <= {'config.json'}


@pytest.mark.slow
def test_a_config_that_is_refused_is_not_kept(ran, tmp_path, monkeypatch, capsys):
  """Or else the next --mode=sample would be refused with the same words."""
  workdir = shutil.copytree(ran[0], tmp_path / 'workdir')
  before = content(workdir)
  config = tiny.config(**OVERRIDES | {'dmd__num_updates': 5})
  assert in_process('train', workdir, monkeypatch, capsys, config=config)[0] == 2
  asked = {'stage': 'dmd', 'num_samples': 8, 'out': tmp_path / 'x.npz'}
  assert in_process('sample', workdir, monkeypatch, capsys, **asked)[0] == 0
  assert content(workdir) == before


@pytest.mark.slow
@pytest.mark.parametrize('name', ['dmd', 'consistency'])
def test_a_student_of_another_run_is_imported_as_what_it_is(ran, tmp_path, monkeypatch, name):
  """Under its name, with its sampler, and the run goes on from there."""
  monkeypatch.setattr(measure, 'evaluate', lambda *_, **__: None)
  changes = {'methods': ('progressive', name)}
  config = tiny.config(**OVERRIDES | changes)
  model = importing.from_workdir(config, default.get_config(), ran[0] / name, tmp_path / 'run')
  theirs, found = read(ran[0], name), read(tmp_path / 'run', name)
  assert model.stage.name == name and found['digest'] == theirs['digest']
  assert (found['method'], found['sampler']) == (theirs['method'], theirs['sampler'])
  run_module.run(config, tmp_path / 'run')


@pytest.mark.slow
@pytest.mark.parametrize('what', ['parent', 'start', 'pairs'])
def test_a_stage_whose_teacher_start_or_pairs_were_others_is_refused(
  ran, tmp_path, monkeypatch, capsys, what
):
  workdir = shutil.copytree(ran[0], tmp_path / 'workdir')
  found = read(workdir, 'dmd')
  other = 'f' * 64 if what == 'pairs' else found[what] | {'digest': 'f' * 64}
  (workdir / 'dmd' / 'stage.json').write_text(json.dumps(found | {what: other}))
  before = content(workdir / 'dmd')
  config = tiny.config(**OVERRIDES)
  code, _, err = in_process('train', workdir, monkeypatch, capsys, config=config)
  last = err.splitlines()[-1]
  assert code == 2 and f'{os.path.join("dmd", "stage.json")}: {what} is' in last, err
  assert content(workdir / 'dmd') == before
