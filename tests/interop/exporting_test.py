"""Export: what is written draws the model's images without this package, and nothing is written otherwise."""

import ast
import dataclasses
import json
import os
import re
import runpy
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import traverse_util
from PIL import Image

from diffusion_distillation.diffusion import samplers, times
from diffusion_distillation.errors import StorageError, UserError
from diffusion_distillation.evaluation.loading import LoadedModel, load
from diffusion_distillation.interop import exporting, model_card, stablehlo
from diffusion_distillation.networks import NETWORKS, conditioning
from diffusion_distillation.stages import model
from diffusion_distillation.system import interrupts
from tests import tiny
from tests.evaluation.sampling_test import assert_same_images
from tests.networks.denoiser_test import Small
from tests.stages import model_test
from tests.stages.model_test import stored

FILES = ['README.md', 'model.json', 'run.py', 'sampler.stablehlo', 'samples.png', 'weights.safetensors']
DISTILLED = {
  'stage': 'student',
  'method': 'progressive',
  'updates': 7,
  'parent': {'stage': 'teacher', 'weights': 'ema', 'digest': 'abcdef' * 10},
}
IMPORTED = {'source': 'model', 'folder': '/home/somebody/models/teacher', 'provenance': DISTILLED}
MADE = {'stage': 'base', 'method': 'denoising', 'updates': 0, 'imported': IMPORTED}
GUIDED = dataclasses.replace(model_test.UNET, num_classes=3, guidance=(0.0, 4.0))
ROW = {'sampler': 'ddim', 'num_steps': 3, 'grid': 'uniform', 'nfe': 3, 'weights': 'ema'}
ROW |= {'num_samples': 500, 'metric': 'FD-digits', 'metrics': {'frechet': 1.25}}
MODELS = {
  'unconditional': stored(Small(1), num_steps=3, provenance=MADE, metrics=(ROW,)),
  'conditional': stored(
    Small(1, num_classes=3),
    sampler='multistep_consistency',
    num_steps=2,
    clip_x=False,
    times='karras',
    class_names=('cat', 'dog', 'hen'),
  ),
  'guided': stored(GUIDED, num_steps=2),
}


@pytest.fixture(scope='module', autouse=True)
def _small_is_a_network():
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(NETWORKS, 'small', Small)
    yield


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  """With a finished stage of the name of each model."""
  directory = tmp_path_factory.mktemp('workdir')
  for name, of in MODELS.items():
    model.write(directory / name / 'model', of)
    (directory / name / 'stage.json').write_text('{}')
  (directory / 'config.json').write_text(json.dumps({'dataset': {'name': 'digits'}}))
  return directory


@pytest.fixture(scope='module', params=MODELS)
def exported(request, workdir, tmp_path_factory):
  """The model, the folder, and what the command says."""
  out = tmp_path_factory.mktemp('out') / 'new' / 'folder'
  given = out
  if request.param == 'conditional':
    out.mkdir(parents=True)  # a folder that is there, but empty
    given = out.parent.parent / 'link'
    given.symlink_to(out)
  line = exporting.export(workdir, request.param, given)
  return load(workdir / request.param), out, line


def run_script(out, images, monkeypatch, *args):
  monkeypatch.setattr(sys, 'argv', ['run.py', f'--out={images}', *args])
  runpy.run_path(str(out / 'run.py'), run_name='__main__')
  with np.load(images, allow_pickle=False) as arrays:
    return dict(arrays)


def test_a_folder_is_written_and_nothing_beside_it(exported):
  _, out, line = exported
  assert sorted(path.name for path in out.iterdir()) == FILES
  assert [path.name for path in out.parent.iterdir()] == ['folder']
  assert line.startswith(f'{out}: ') and ' network call' in line
  with Image.open(out / 'samples.png') as picture:
    assert picture.size == (138, 138)  # 4 x 4 images of 32 pixels, and gaps


def test_the_script_draws_what_the_model_draws_for_any_number(exported, tmp_path, monkeypatch, capsys):
  loaded, out, _ = exported
  for num in (5, 2):
    arrays = run_script(out, tmp_path / 'x.npz', monkeypatch, f'--num={num}', '--seed=4')
    assert_same_images(arrays['images'], loaded.sample(num, seed=4))
  assert capsys.readouterr().out.endswith('x.npz: 2 images\n')
  if loaded.stored.class_names:
    arrays = run_script(
      out, tmp_path / 'x.npz', monkeypatch, '--num=5', '--seed=4', '--classes', '2', '-1'
    )
    assert arrays['labels'].tolist() == [2, -1, 2, -1, 2]
    assert_same_images(arrays['images'], loaded.sample(5, seed=4, labels=[2, -1]))


def test_the_script_takes_the_weight_of_guidance_of_models_that_do(
  exported, tmp_path, monkeypatch, capsys
):
  loaded, out, _ = exported
  args = (out, tmp_path / 'x.npz', monkeypatch, '--num=5', '--seed=4', '--guidance=3')
  if not conditioning.weights(loaded.stored.denoise.conditioning):
    with pytest.raises(SystemExit):
      run_script(*args)
    assert 'this sampler does not take a weight of guidance' in capsys.readouterr().err
    return
  assert_same_images(run_script(*args)['images'], loaded.sample(5, seed=4, guidance=3.0))


def test_other_formats_do_not_take_the_weight_of_guidance(workdir, tmp_path):
  for format in set(exporting.FORMATS) - {'jax'}:
    with pytest.raises(
      UserError, match=r"takes 'guidance' as an input, which only --format=jax supports"
    ):
      exporting.export(workdir, 'guided', tmp_path / 'out', format)
  assert not list(tmp_path.iterdir())


def test_the_script_imports_jax_numpy_and_the_standard_library_alone(exported):
  _, out, _ = exported
  imported = set()
  for node in ast.walk(ast.parse((out / 'run.py').read_text())):
    if isinstance(node, ast.Import):
      imported |= {alias.name.partition('.')[0] for alias in node.names}
    assert not isinstance(node, ast.ImportFrom)
  assert imported - set(sys.stdlib_module_names) == {'jax', 'numpy'}


def test_weights_are_the_models_and_no_constants_of_the_program(exported):
  loaded, out, _ = exported
  of = loaded.stored
  assert load(out).stored.digest == model.digest(of.params)  # checked when it is read
  program = jax.export.deserialize(bytearray((out / 'sampler.stablehlo').read_bytes()))
  flat = traverse_util.flatten_dict(of.params, sep='/')
  (weights, z, *rest), _ = jax.tree.unflatten(program.in_tree, program.in_avals)
  assert {name: value.shape for name, value in weights.items()} == {k: v.shape for k, v in flat.items()}
  assert program.platforms == ('cpu', 'cuda', 'tpu')
  assert str(z.shape[0]) == 'b' and z.shape[1:] == (8, 8, 1)
  expected = ['int32', 'uint32'] if of.class_names else []
  assert [str(value.dtype) for value in rest] == (
    ['int32', 'float32'] if conditioning.weights(of.denoise.conditioning) else expected
  )


def test_the_description_says_nothing_of_the_machine(exported):
  loaded, out, _ = exported
  found = json.loads((out / 'model.json').read_text())
  expected = json.loads(json.dumps(model.describe(loaded.stored)))
  if 'imported' in expected['provenance']:
    expected['provenance']['imported']['folder'] = 'teacher'
  assert found == expected
  assert '/home' not in (out / 'README.md').read_text()


def test_the_card_says_what_it_was_made_from_and_how_it_was_measured(exported):
  loaded, out, _ = exported
  card = (out / 'README.md').read_text()
  assert card.startswith(
    '---\nlibrary_name: jax\npipeline_tag: unconditional-image-generation\ntags:\n- diffusion\n'
  )
  told = 'evaluations. It takes the weight of guidance as an input: 0 to 4.\n' in card
  assert told == bool(conditioning.weights(loaded.stored.denoise.conditioning))
  assert '](samples.png)' in card
  if loaded.stored.class_names:
    assert '- Dataset: digits\n' in card
    assert 'Class-conditional (3 classes)' in card and '| 1 | dog |' in card
    assert (
      '2 multistep_consistency steps: 2 network evaluations' in card
      and 'No measurements are recorded' in card
    )
  elif loaded.stored.metrics:
    assert '- distillation\n- progressive\n---\n' in card
    assert '- Updates: 7\n- Teacher: teacher (weights ema, digest abcdefabcdef)\n' in card
    assert '- Imported from: model, teacher\n' in card and '- Dataset: not recorded' in card
    assert '| 3 ddim (uniform) | 3 | ema | 500 | frechet 1.25 |' in card and 'distance FD-digits' in card


def test_the_card_says_under_which_circumstances_a_row_was_measured():
  low = {'guidance': 1.5, 'guidance_interval': [0.3, None], 'dtype': 'bfloat16'}
  rows = (ROW | {'guidance': 0.0, 'dtype': 'float32'}, ROW | low)
  card = model_card.render(
    model.describe(dataclasses.replace(MODELS['unconditional'], metrics=rows)),
    exporting.FORMATS['jax'],
    None,
  )
  assert '| 3 ddim (uniform) | 3 |' in card
  assert '| 3 ddim (uniform), guidance W = 1.5 for 0.3 < sigma / alpha, bfloat16 | 3 |' in card
  assert 'these files draw without guidance' in card and 'these files compute in float32' in card
  told = model.describe(dataclasses.replace(MODELS['guided'], metrics=rows))
  assert '`frechet` is the' in card and '`clip_score`' not in card
  scores = [row | {'metric': 'CLIP score', 'metrics': {'clip_score': 25.0}} for row in told['metrics']]
  other = model_card.render(told | {'metrics': scores}, exporting.FORMATS['jax'], None)
  assert 'clip_score 25' in other and '`clip_score` is the mean' in other and 'frechet' not in other
  assert 'these files take W as an input' in model_card.render(told, exporting.FORMATS['jax'], None)


def test_a_signal_during_a_compilation_leaves_nothing_behind(workdir, tmp_path, monkeypatch):
  def write(drawer, params, grid, folder):
    (folder / 'half').write_text('')
    for cleanup in interrupts._cleanups:  # as before a signal ends the process
      cleanup()
    found.extend(tmp_path.iterdir())
    raise KeyboardInterrupt

  found = []
  monkeypatch.setitem(exporting.FORMATS, 'slow', exporting.FORMATS['jax']._replace(write=write))
  with pytest.raises(KeyboardInterrupt):
    exporting.export(workdir, 'unconditional', tmp_path / 'a' / 'b', 'slow')
  assert not found and not interrupts._cleanups


def test_text_from_a_model_is_neither_markdown_nor_html_nor_yaml():
  """Folders name classes, and a model may come from anybody."""
  bad = '![x](http://x)|<img src=x>\n---\n# `a: *b*'
  made = {'stage': bad, 'method': bad, 'versions': {'jax': bad}}
  of = dataclasses.replace(MODELS['conditional'], provenance=made, class_names=('cat', bad, 'hen'))
  card = model_card.render(model.describe(of), exporting.FORMATS['jax'], bad)
  plain = r'!\[x\](http://x)\|&lt;img src=x&gt; --- # \`a: \*b\*'
  assert f'| 1 | {plain} |\n| 2 | hen |' in card and f'\n# {plain}\n' in card
  assert f'- Dataset: {plain}\n- Method: {plain}\n- Versions: jax {plain}\n' in card
  assert re.search(r'\n- diffusion\n- [\w-]+\n---\n', card) and card.count('\n---\n') == 1


def test_attention_is_lowered_for_all_platforms_without_custom_calls():
  """Nothing is compiled."""
  of = model_test.stored(model_test.MODELS['conditional']().denoise.network)
  drawer = LoadedModel(of).drawer(samplers.DDIM(), True, 4)
  flat = traverse_util.flatten_dict(of.params, sep='/')
  text = stablehlo.lower(drawer, flat, times.uniform(2)).mlir_module()
  calls = set(re.findall(r'custom_call @(\w+)', text))
  assert calls <= {'shape_assertion'} and 'stablehlo.convolution' in text


@pytest.mark.parametrize('change', ['two levels', 'many', 'one batch size'])
def test_files_that_draw_other_images_are_not_kept(workdir, tmp_path, monkeypatch, change):
  model_images = load(workdir / 'unconditional').sample(16, seed=0)

  def write(drawer, params, grid, folder):
    (folder / 'half').write_text('')

    def draw(z, keys, labels):
      images = model_images[: len(z)].copy()
      if change == 'two levels':
        images[0, 0, 0, 0] ^= 2  # one value, but by two levels
      elif change == 'many':
        images[0] ^= 1
      elif len(z) == 3:
        images = images[::-1]
      return images

    return draw

  monkeypatch.setitem(exporting.FORMATS, 'wrong', exporting.FORMATS['jax']._replace(write=write))
  with pytest.raises(StorageError, match='draw other images than the model'):
    exporting.export(workdir, 'unconditional', tmp_path / 'a' / 'b', 'wrong')
  assert not list(tmp_path.iterdir())


def refused(workdir, *args):
  code, out, err = tiny.run_cli('--mode=export', f'--workdir={workdir}', *args)
  assert code == 2 and not out and err.startswith('error: ') and err.count('\n') == 1
  return err


def test_what_cannot_be_exported_is_one_line(workdir, tmp_path, monkeypatch):
  monkeypatch.delitem(NETWORKS, 'small')  # which has no section of a config
  monkeypatch.setattr('diffusion_distillation.system.interrupts.install', lambda: None)
  new, full = tmp_path / 'new', tmp_path / 'full'
  full.mkdir()
  (full / 'x').write_text('')
  assert 'needs --out' in refused(workdir)
  assert 'is not empty' in refused(workdir, f'--out={full}')
  assert 'is a file' in refused(workdir, f'--out={full / "x"}')
  assert 'not a writable directory' in refused(workdir, f'--out={full / "x" / "y"}')
  message = refused(workdir, f'--out={new}', '--format=tflite')
  assert "'tflite'" in message and 'jax' in message
  message = refused(workdir, f'--out={new}', '--stage=base')
  assert 'no finished stage of that name' in message and 'conditional, guided, unconditional' in message
  assert 'no finished stage' in refused(
    workdir, f'--out={new}', f'--stage=../{workdir.name}/conditional'
  )
  assert 'holds no model' in refused(tmp_path, f'--out={new}')
  assert sorted(path.name for path in tmp_path.iterdir()) == ['full']


def test_without_the_package_that_serializes_programs_nothing_is_written(workdir, tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'flatbuffers', None)
  monkeypatch.setattr(stablehlo.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match='pip install flatbuffers'):
    exporting.export(workdir, 'unconditional', tmp_path / 'new')
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
  'flag',
  [
    '--steps=2',
    '--sampler=ddim',
    '--times=0,1',
    '--noclip_x',
    '--gamma=0',
    '--guidance=1',
    '--guidance_interval=0,1',
    '--weights=last',
  ],
)
def test_flags_of_sampling_are_refused(flag, workdir, tmp_path, monkeypatch):
  monkeypatch.delitem(NETWORKS, 'small')
  monkeypatch.setattr('diffusion_distillation.system.interrupts.install', lambda: None)
  name = flag.strip('-').removeprefix('no').partition('=')[0]
  err = refused(workdir, f'--out={tmp_path / "out"}', flag)
  assert f'--{name} only applies to --mode=sample' in err
  assert not (tmp_path / 'out').exists()


@pytest.mark.slow
def test_the_script_runs_where_this_package_and_its_libraries_are_missing(exported, tmp_path):
  loaded, out, _ = exported
  missing = tmp_path / 'missing'
  missing.mkdir()
  for name in ('diffusion_distillation', 'flax', 'safetensors', 'optax', 'orbax', 'absl'):
    (missing / f'{name}.py').write_text('raise ImportError("not here")\n')
  path = os.pathsep.join([str(missing), os.environ.get('PYTHONPATH', '')])
  command = [sys.executable, out / 'run.py', '--num=4', '--seed=1', f'--out={tmp_path / "x.npz"}']
  subprocess.run(command, check=True, cwd=tmp_path, env=os.environ | {'PYTHONPATH': path})
  with np.load(tmp_path / 'x.npz') as arrays:
    assert_same_images(arrays['images'], loaded.sample(4, seed=1))
