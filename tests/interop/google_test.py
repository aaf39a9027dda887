"""Models from elsewhere: the released code's checkpoints, and stages of other runs."""

import dataclasses
import hashlib
import itertools
import json
import pickle
import shutil

import jax
import numpy as np
import pytest
from flax import serialization, traverse_util

from configs import default
from diffusion_distillation import datasets
from diffusion_distillation.diffusion import times
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import features, measure
from diffusion_distillation.interop import google, importing
from diffusion_distillation.run import run
from diffusion_distillation.stages import provenance
from diffusion_distillation.stages.plan import plan
from diffusion_distillation.system.checkpoints import digest
from tests import parity_test, tiny

STUDENT, TEACHER = (parity_test.DATA / f'checkpoint_{name}' for name in ('student', 'teacher'))

# The sample's network, and rounds from 8 steps that take no time.
SAMPLE = {
  'dataset.name': 'cifar10',
  'dataset.image_size': 8,
  'model.output': 'both',
  'model.ch': 32,
  'model.emb_ch': 64,
  'model.ch_mult': (2, 1),
  'model.num_res_blocks': 1,
  'model.attn_resolutions': (8,),
  'model.num_heads': 1,
  'model.resblock_resample': False,
  'distill.start_steps': 8,
  'distill.num_updates': (2,),
  'distill.batch_size': 8,
  'checkpoint.every': 2,
  'log.every': 1,
  'log.measured_updates': 0,
  'log.health_every': 0,
  'log.seconds': 0.0,
  'evaluation.num_samples': 16,
  'evaluation.batch_size': 16,
  'evaluation.samplers': ('ddim',),
}


def sample_config(**overrides):
  c = default.get_config()
  c.update_from_flattened_dict(SAMPLE | {k.replace('__', '.'): v for k, v in overrides.items()})
  return c


def content(workdir):
  """All files by name, with their bytes."""
  files = (path for path in workdir.rglob('*') if path.is_file() and path.name != '.lock')
  return {path.relative_to(workdir): path.read_bytes() for path in files}


def read_lineage(stage_dir):
  return json.loads((stage_dir / 'stage.json').read_text())


def leaves(tree):
  return traverse_util.flatten_dict(tree, sep='/')


@pytest.fixture
def expected():
  """Names and shapes that our network wants."""
  return plan(sample_config(), (8, 8, 3), 10)[0].abstract_params


@pytest.mark.parametrize(('path', 'num_steps'), [(STUDENT, 4), (TEACHER, 8)])
def test_a_file_is_read_as_it_is(path, num_steps, expected):
  recorded = leaves(serialization.msgpack_restore(path.read_bytes())['ema_params'])
  old = {name for name, leaf in recorded.items() if leaf.ndim == 4 and leaf.shape[:3] == (1, 1, 1)}
  assert bool(old) == (path == TEACHER)
  checkpoint = google.read(path)
  assert checkpoint.num_sample_steps == num_steps
  assert checkpoint.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()

  params = google.fit(checkpoint.ema_params, expected, path)
  assert jax.tree.structure(params) == jax.tree.structure(expected)
  for name, leaf in leaves(params).items():
    assert leaf.shape == leaves(expected)[name].shape and leaf.dtype == np.float32
    assert leaf.tobytes() == recorded[name].tobytes(), name


def test_the_sample_is_our_network():
  planned = plan(sample_config(), (8, 8, 3), 10)[0]
  assert planned.denoise.output == parity_test.OURS.output
  network = dataclasses.replace(planned.denoise.network, schedule=None)
  assert network == parity_test.network()


def edited(change, tmp_path, **fields):
  """The student's file after `change(leaves)`, with other fields."""
  tree = serialization.msgpack_restore(STUDENT.read_bytes())
  parameters = leaves(tree['ema_params'])
  change(parameters)
  tree |= {'ema_params': traverse_util.unflatten_dict(parameters, sep='/')} | fields
  path = tmp_path / 'edited'
  path.write_bytes(serialization.msgpack_serialize(tree))
  return path


def replace(name, values):
  return lambda parameters: parameters.update({name: values})


def remove(*names):
  return lambda parameters: [parameters.pop(name) for name in names]


# What is done to the parameters, and what the message says.
MISFITS = {
  'another shape': (
    replace('conv_in/kernel', np.zeros((3, 3, 1, 32), np.float32)),
    ['conv_in/kernel has shape (3, 3, 1, 32)', 'needs (3, 3, 3, 32)'],
  ),
  'turned round': (
    replace('dense0/kernel', np.zeros((64, 32), np.float32)),
    ['dense0/kernel has shape (64, 32)', 'needs (32, 64)'],
  ),
  'one too many': (
    replace('temb/kernel', np.zeros(3, np.float32)),
    ['temb/kernel (3,) is not in it'],
  ),
  'whole numbers': (
    replace('dense0/bias', np.zeros(64, np.int32)),
    ['dense0/bias', 'int32', '(64,)'],
  ),
  'one missing': (remove('mid.attn_1/q/bias'), ['mid.attn_1/q/bias is missing']),
  'many missing': (
    remove('dense0/bias', 'dense1/bias', 'dense1/kernel', 'norm_out/bias', 'norm_out/scale'),
    ['dense0/bias is missing', 'dense1/kernel is missing', 'and 2 more'],
  ),
  'not a number': (
    replace('dense1/bias', np.full(64, np.nan, np.float32)),
    ['dense1/bias is not finite'],
  ),
}


def refused(config, path, into, source='google'):
  """The message with which an import is refused; nothing may have been written."""
  before = content(into) if into.exists() else None
  with pytest.raises(UserError) as caught:
    importing.READERS[source](config, default.get_config(), path, into)
  message = str(caught.value)
  assert '\n' not in message and str(path) in message
  assert before == (content(into) if into.exists() else None)
  return message


@pytest.mark.parametrize('case', MISFITS)
def test_a_parameter_that_does_not_fit_is_named(case, tmp_path):
  change, words = MISFITS[case]
  message = refused(sample_config(), edited(change, tmp_path), tmp_path / 'run')
  for word in words:
    assert word in message


class Trap:
  """Makes a file when it is unpickled."""

  def __init__(self, path):
    self.path = path

  def __reduce__(self):
    return self.path.touch, ()


FILES = {
  'text': lambda path: path.write_text('step: 3'),
  'empty': lambda path: path.touch(),
  'cut off': lambda path: path.write_bytes(STUDENT.read_bytes()[:-1000]),
  'a list': lambda path: path.write_bytes(serialization.msgpack_serialize([1, 2])),
  'no ema_params': lambda path: path.write_bytes(serialization.msgpack_serialize({'step': 3})),
  'no parameters': lambda path: path.write_bytes(serialization.msgpack_serialize({'ema_params': {}})),
  'an archive': lambda path: shutil.copy(parity_test.DATA / 'inputs.npz', path),
  'pickle': lambda path: path.write_bytes(pickle.dumps({'ema_params': Trap(path.with_name('trap'))})),
}


@pytest.mark.parametrize('kind', FILES)
def test_a_file_of_another_kind_is_refused_and_not_executed(kind, tmp_path):
  FILES[kind](tmp_path / 'file')
  message = refused(sample_config(), tmp_path / 'file', tmp_path / 'run')
  assert 'not a checkpoint of the released code' in message
  assert not (tmp_path / 'trap').exists()


def test_the_trap_would_have_worked(tmp_path):
  pickle.loads(pickle.dumps(Trap(tmp_path / 'trap')))
  assert (tmp_path / 'trap').exists()


def test_a_file_that_is_not_there_is_named(tmp_path):
  assert 'No such file' in refused(sample_config(), tmp_path / 'none', tmp_path / 'run')
  assert 'directory' in refused(sample_config(), tmp_path, tmp_path / 'run')


@pytest.mark.parametrize(
  ('in_the_file', 'start_steps', 'name'),
  [
    (4, 8, 'progressive_0004'),
    (4, 4, 'base'),
    (0, 8, 'base'),
  ],
)
def test_the_number_of_steps_says_which_stage_it_becomes(in_the_file, start_steps, name, tmp_path):
  path = edited(lambda parameters: None, tmp_path, num_sample_steps=in_the_file)
  config = sample_config(distill__start_steps=start_steps)
  model = importing.from_google(config, default.get_config(), path, tmp_path / 'run')
  assert model.stage.name == name and model.stage.num_steps == (in_the_file or start_steps)
  assert [stage.parent.name for stage in (tmp_path / 'run').glob('*/stage.json')] == [name]
  loaded = provenance.load_model(tmp_path / 'run', model.stage, config)
  assert loaded.digest == model.digest and loaded.step == model.stage.num_updates


def test_a_file_without_a_number_of_steps_is_a_base(tmp_path):
  tree = serialization.msgpack_restore(STUDENT.read_bytes())
  del tree['num_sample_steps']
  (tmp_path / 'file').write_bytes(serialization.msgpack_serialize(tree))
  assert google.read(tmp_path / 'file').num_sample_steps == 0


def test_a_number_of_steps_that_no_stage_has_lists_those_there_are(tmp_path):
  path = edited(lambda parameters: None, tmp_path, num_sample_steps=3)
  message = refused(sample_config(), path, tmp_path / 'run')
  assert 'distilled to 3 steps' in message and '8, 4, 2, 1' in message
  assert 'distill.start_steps=3' in message


@pytest.fixture(scope='module')
def imported(tmp_path_factory):
  """The student's file as a stage, by the flags of main.py: the workdir, and what was printed."""
  root = tmp_path_factory.mktemp('google')
  lines = ['from configs import default', '', '', 'def get_config():', '  c = default.get_config()']
  lines += [f'  c.update_from_flattened_dict({SAMPLE!r})', '  return c', '']
  (root / 'sample.py').write_text('\n'.join(lines))
  flags = [f'--config={root / "sample.py"}', f'--workdir={root / "run"}', '--mode=import']
  code, out, err = tiny.run_cli(*flags, '--source=google', f'--checkpoint={STUDENT}')
  assert code == 0, err
  return root / 'run', out


def test_an_imported_stage_says_where_it_is_from(imported, expected):
  workdir, out = imported
  params = google.fit(google.read(STUDENT).ema_params, expected, STUDENT)
  found = read_lineage(workdir / 'progressive_0004')
  assert found['finished'] and found['parent'] is None and found['num_steps'] == 4
  assert found['digest'] == digest(params)
  sha256 = hashlib.sha256(STUDENT.read_bytes()).hexdigest()
  assert found['imported'] == {'source': 'google', 'file': STUDENT.name, 'sha256': sha256}
  assert out.count('\n') == 1 and 'progressive_0004: imported, for 4 steps' in out
  assert found['digest'][:12] in out


def test_an_imported_stage_is_sampled_without_its_data(imported, tmp_path, expected):
  flags = ['--mode=sample', '--num_samples=6', '--seed=5', f'--out={tmp_path / "x.npz"}']
  code, out, err = tiny.run_cli(*flags, f'--workdir={imported[0]}')
  assert code == 0 and '6 images of progressive_0004 in 4 ddim steps' in out, err
  with np.load(tmp_path / 'x.npz') as arrays:
    images = arrays['images'].astype(int)
  stage = plan(sample_config(), (8, 8, 3), 10)[1]
  draw = measure.drawer(sample_config(), stage, 'ddim')
  params = google.fit(google.read(STUDENT).ema_params, expected, STUDENT)
  ours = draw.draw(params, times.uniform(4), 6, 5).astype(int)
  assert images.shape == (6, 8, 8, 3) and np.abs(images - ours).max() <= 1
  assert images.std() > 20


@pytest.mark.slow
def test_an_imported_stage_is_distilled_further_and_measured(imported, tmp_path, monkeypatch):
  monkeypatch.setitem(datasets.SOURCES, 'cifar10', tiny.colour_digits)
  monkeypatch.setattr(features, '_UPDATES', 20)
  workdir, config = tmp_path / 'run', sample_config()
  shutil.copytree(imported[0], workdir)
  run.run(config, workdir)

  names = ['progressive_0004', 'progressive_0002', 'progressive_0001']
  assert sorted(path.parent.name for path in workdir.glob('*/stage.json')) == sorted(names)
  stages = [read_lineage(workdir / name) for name in names]
  assert stages[0] == read_lineage(imported[0] / names[0])
  for parent, child in itertools.pairwise(stages):
    assert child['parent']['digest'] == parent['digest'] != child['digest']
  rows = json.loads((workdir / 'results.json').read_text())['rows']
  measured = {(row['stage'], row['num_steps'], row['digest']) for row in rows}
  undistilled = {(names[0], num_steps, stages[0]['digest']) for num_steps in (4, 2, 1)}
  assert measured == undistilled | {(s['stage'], s['num_steps'], s['digest']) for s in stages[1:]}


def test_a_stage_that_is_there_is_not_imported_over(imported, tmp_path):
  path = shutil.copytree(imported[0], tmp_path / 'run')
  with pytest.raises(UserError, match='progressive_0004 already exists'):
    importing.from_google(sample_config(), default.get_config(), STUDENT, path)
  assert content(path) == content(imported[0])


def test_a_run_of_another_config_takes_no_import(imported, tmp_path):
  path = shutil.copytree(imported[0], tmp_path / 'run')
  shutil.rmtree(path / 'progressive_0004')
  before, other = content(path), sample_config(seed=7)
  with pytest.raises(UserError, match='seed was 0, is 7'):
    importing.from_google(other, default.get_config(), STUDENT, path)
  assert content(path) == before
