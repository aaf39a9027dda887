"""A whole run of a student with adapters, at tiny size: trained, interrupted, resumed, exported, and refused with others."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util

import diffusion_distillation
from diffusion_distillation.errors import DamagedError, StorageError, UserError
from diffusion_distillation.evaluation import sampling
from diffusion_distillation.interop import lora, lora_writer
from diffusion_distillation.networks import lora as networks_lora
from diffusion_distillation.run import loop, monitor
from diffusion_distillation.run import run as runs
from diffusion_distillation.stages import adapters, model, provenance, workdir
from diffusion_distillation.system import sharding
from tests import text_model, tiny
from tests.text_runs_test import _first_two, _Killed

pytestmark = pytest.mark.slow

CHANGES = {'methods': ('dmd',), 'dmd__regression': 0.0, 'dmd__ema_decay': (0.5,)}
CHANGES |= {'lora__rank': 2, 'lora__scale': 0.5, 'log__health_every': 2}
CHANGES |= {
  'compute__teacher_dtype': 'bfloat16'
}  # which is not that of the weights that the student adapts
WATCHED = []  # the weights that the monitor has drawn with


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A finished run, killed in its third update and resumed, and one that was not, with their config."""
  directories = []
  for stops in (True, False):
    directory, c = text_model.begin(tmp_path_factory.mktemp('lora'), **CHANGES)
    if stops:
      with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, '_dispatches', _first_two(loop._dispatches))
        with pytest.raises(_Killed):
          runs.run(c, directory)
    with pytest.MonkeyPatch.context() as patch:
      patch.setattr(monitor.measure, 'drawer', _noting(monitor.measure.drawer))
      runs.run(c, directory)
    directories.append(directory)
  return (*directories, c)


def _noting(drawer):
  """`measure.drawer` whose drawers note the weights that they draw all images of at once with."""

  @dataclasses.dataclass(frozen=True)
  class Noting(sampling.Drawer):
    def draw(self, params, *args, **arguments):
      WATCHED.append(sharding.to_host(params))
      return super().draw(params, *args, **arguments)

  def made(*args):
    found = drawer(*args)
    return Noting(**{field.name: getattr(found, field.name) for field in dataclasses.fields(found)})

  return made


def final(directory, name='dmd'):
  return diffusion_distillation.load(directory / name / 'model').stored


def test_an_interrupted_run_ends_as_an_uninterrupted_one_with_the_adapters_in_its_weights(run):
  killed, other, _ = run
  found, base = final(killed), final(killed, 'base')
  assert found.digest == final(other).digest != base.digest
  content = [(of / 'dmd' / 'model' / adapters.FILE).read_bytes() for of in (killed, other)]
  assert content[0] == content[1]
  flat, before = (traverse_util.flatten_dict(of.params, sep='/') for of in (found, base))
  changed = {name for name in flat if (flat[name] != before[name]).any()}
  projections = {name.removesuffix('/kernel') for name in changed}
  assert projections == set(networks_lora.adapted(base.params)) and len(projections) == 8
  expected = {'rank': 2, 'scale': 0.5, 'modules': networks_lora.ATTENTION}
  assert found.provenance['lora'] == expected | {'networks': ['fake_score', 'student']}
  stored = adapters.read(killed / 'dmd' / 'model', base.params)
  merged = networks_lora.merged_on_host(base.params, stored.factors, stored.scale)
  jax.tree.map(np.testing.assert_array_equal, merged, found.params)


def test_the_monitor_watches_the_student_that_is_stored(run):
  directory = run[1]
  path = directory / 'dmd' / 'metrics.jsonl'
  lines = [json.loads(line) for line in path.read_text().splitlines()]
  watched = [line['step'] for line in lines if 'brightness' in line]
  assert watched == [2, 4] and (directory / 'dmd' / 'denoisings.png').is_file()
  close = functools.partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-7)
  jax.tree.map(close, WATCHED[-1], final(directory).params)


def test_weights_that_are_only_in_the_checkpoint_are_merged_when_they_are_read(run, tmp_path):
  killed, _, c = run
  directory = shutil.copytree(killed, tmp_path / 'run')
  stage = workdir.plan_for(directory, c)[0][-1]
  found = provenance.load_model(directory, stage, c)
  last = provenance.load_model(directory, stage, c, ('last',)).use('last')
  assert found.digest == final(killed).digest != last.digest
  assert last.digest == json.loads((directory / 'dmd' / 'stage.json').read_text())['digests']['last']
  shutil.rmtree(directory / 'dmd' / 'model')
  runs.run(c, directory)  # from the last checkpoint
  assert final(directory).digest == found.digest
  shutil.rmtree(directory / 'base' / 'model')
  model.write(directory / 'base' / 'model', final(killed))  # another model in the place of the base
  with pytest.raises(DamagedError, match='holds other weights than those that dmd was trained from'):
    provenance.load_model(directory, stage, c, ('last',))


def test_a_finished_stage_is_refused_with_another_rank(run):
  killed, _, _ = run
  _, c = text_model.begin(killed.parent / 'other', **CHANGES | {'lora__rank': 4})
  with pytest.raises(UserError, match=r'made with another config: lora\.rank was 2, is 4'):
    runs.run(c, killed)


def test_the_adapters_are_exported_and_lead_to_the_student(run, tmp_path):
  """Read as foreign ones are and merged into the imported weights, they are the student's weights up to rounding."""
  killed, _, _ = run
  out = tmp_path / 'student.safetensors'
  flags = ['--mode=export', '--format=lora', f'--workdir={killed}', f'--out={out}']
  code, printed, err = tiny.run_cli(*flags)
  assert code in (0, None), err
  assert 'parameters of adapters of 8 modules, scale 0.5, for the weights of base (' in printed
  student, base = final(killed).params, final(killed, 'base').params
  merged = lora.merged(out, base, 1.0)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7), merged, student)
  moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), base, student)
  assert max(jax.tree.leaves(moved)) > 1e-5
  code, _, err = tiny.run_cli(*flags)
  assert code == UserError.exit_code and 'exists already; name a new file' in err
  with pytest.raises(UserError, match='base/model holds no adapters, because its model was not trained'):
    lora_writer.export(killed / 'base' / 'model', tmp_path / 'b.safetensors')
  with pytest.raises(UserError, match=r'must end with \.safetensors'):
    lora_writer.export(killed / 'dmd' / 'model', tmp_path / 'folder')
  assert [path.name for path in tmp_path.iterdir() if path.suffix] == ['student.safetensors']


def _changed(folder, **changes):
  """Writes a model's folder again with other values; its adapters stay."""
  kept = folder / adapters.FILE
  content = kept.read_bytes() if kept.is_file() else None
  model.write(folder, dataclasses.replace(model.read(folder), **changes), anew=True)
  if content is not None:
    kept.write_bytes(content)


def test_adapters_are_compared_with_the_weights_if_the_base_is_there_and_is_no_student(run, tmp_path):
  directory = shutil.copytree(run[0], tmp_path / 'run')
  base, student = (directory / name / 'model' for name in ('base', 'dmd'))
  params, made = model.read(student).params, model.read(base).provenance
  parent = {'stage': 'first', 'weights': 'ema', 'digest': 'x'}

  def export(name):
    return lora_writer.export(student, tmp_path / f'{name}.safetensors')

  trained_here = {key: value for key, value in made.items() if key != 'imported'} | {'parent': None}
  _changed(base, provenance=trained_here)
  assert 'not compared' not in export('trained')
  _changed(base, provenance=trained_here | {'parent': parent})
  with pytest.raises(UserError, match='these adapters change the weights of base, which is a student'):
    export('of_a_student')
  _changed(base, provenance=made)
  _changed(student, params=jax.tree.map(lambda leaf: leaf + 1, params), digest=None)
  with pytest.raises(StorageError, match='do not lead to the weights of the model; nothing was written'):
    export('of_other_weights')
  _changed(base, params=params, digest=None)  # as beside a model that was moved into another run
  assert 'the adapters were not compared with the weights' in export('moved')
  shutil.rmtree(base)
  assert 'the adapters were not compared with the weights' in export('alone')
  written = {path.stem for path in tmp_path.iterdir() if path.suffix}
  assert written == {'trained', 'moved', 'alone'}
