"""Models as folders: what is written is read again, and all else is one clear line."""

import dataclasses
import functools
import json
import shutil

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from diffusion_distillation.diffusion.schedules import Cosine, Karras, LinearBeta
from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.networks import NETWORKS
from diffusion_distillation.networks.denoiser import Denoiser
from diffusion_distillation.networks.spaces import Pixels
from diffusion_distillation.networks.unet import UNet
from diffusion_distillation.stages import model
from diffusion_distillation.stages.model import StoredModel
from diffusion_distillation.system.checkpoints import digest
from tests.networks.denoiser_test import Small

UNET = UNet(out_ch=1, ch=8, emb_ch=8, ch_mult=(1,), num_res_blocks=1, num_groups=4)


def stored(network, schedule=Cosine(), seed=0, **fields):  # noqa: B008
  """A model whose parameters are zero nowhere; nothing is compiled."""
  if isinstance(network, UNet):
    network = dataclasses.replace(network, schedule=schedule)
  denoise = Denoiser(network, fields.pop('output', 'v'))
  tree = jax.eval_shape(lambda: denoise.init(jax.random.key(0), (8, 8, 1)))
  rng = np.random.default_rng(seed)
  params = jax.tree.map(lambda leaf: np.float32(0.3 * rng.normal(size=leaf.shape)), tree)
  usual = {'sampler': 'ddim', 'num_steps': 4}
  return StoredModel(denoise, params, schedule, Pixels(), (8, 8, 1), **usual | fields)


MODELS = {
  'unconditional': functools.partial(stored, UNET),
  'conditional': functools.partial(
    stored,
    dataclasses.replace(UNET, num_classes=3, time_input='t', attn_resolutions=(8,), num_heads=2),
    schedule=LinearBeta(beta_max=12.0),
    output='eps',
    sampler='multistep_consistency',
    num_steps=2,
    times='quadratic',
    clip_x=False,
    cond_dropout=0.1,
    class_names=('cat', 'dog', 'hen'),
    label_counts=(5, 0, 7),
    provenance={'stage': 'consistency', 'parent': {'stage': 'base', 'digest': 'ab'}, 'updates': 7},
    metrics=({'metric': 'FD', 'value': 1.25},),
  ),
  'network of its own': functools.partial(stored, Small(1, num_classes=3), schedule=Karras()),
}


@pytest.fixture(autouse=True)
def _small_is_a_network(monkeypatch):
  monkeypatch.setitem(NETWORKS, 'small', Small)


@pytest.fixture
def folder(tmp_path):
  """The folder of a conditional model."""
  model.write(tmp_path / 'model', MODELS['conditional']())
  return tmp_path / 'model'


def content(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def assert_equal(found, expected):
  for field in dataclasses.fields(StoredModel):
    if field.name not in ('params', 'digest'):
      assert getattr(found, field.name) == getattr(expected, field.name), field.name
  assert found.digest == digest(expected.params)
  assert jax.tree.structure(found.params) == jax.tree.structure(expected.params)
  jax.tree.map(np.testing.assert_array_equal, found.params, expected.params)


@pytest.mark.parametrize('name', MODELS)
def test_what_is_read_is_what_was_written_wherever_the_folder_is_moved_to(name, tmp_path):
  made = MODELS[name]()
  model.write(tmp_path / 'run' / 'stage' / 'model', made)
  assert set(content(tmp_path / 'run' / 'stage' / 'model')) == {model.DESCRIPTION, model.WEIGHTS}
  assert [path.name for path in (tmp_path / 'run' / 'stage').iterdir()] == ['model']
  shutil.move(tmp_path / 'run' / 'stage' / 'model', tmp_path / 'elsewhere')
  shutil.rmtree(tmp_path / 'run')
  assert_equal(model.read(tmp_path / 'elsewhere'), made)
  described = model.read(tmp_path / 'elsewhere', weights=False)
  assert described.params is None and described == dataclasses.replace(
    made, params=None, digest=digest(made.params)
  )


def test_how_a_network_is_computed_is_not_part_of_the_model(tmp_path):
  network = dataclasses.replace(UNET, dtype='bfloat16', remat=True)
  model.write(tmp_path / 'model', stored(network))
  assert_equal(model.read(tmp_path / 'model'), stored(UNET))


def test_the_description_and_the_weights_name_the_same_digest(folder):
  described = json.loads((folder / model.DESCRIPTION).read_text())
  with safetensors.safe_open(folder / model.WEIGHTS, 'numpy') as weights:
    assert weights.metadata() == {'digest': described['digest']}
  assert described['digest'] == digest(MODELS['conditional']().params)
  of_classes = {'count': 3, 'names': ['cat', 'dog', 'hen'], 'counts': [5, 0, 7]}
  assert described['conditioning'] == {'label': of_classes}


def test_a_folder_of_before_does_not_know_how_many_images_each_class_has(folder):
  path = folder / model.DESCRIPTION
  described = json.loads(path.read_text())
  del described['conditioning']['label']['counts']
  path.write_text(json.dumps(described))
  assert_equal(model.read(folder), dataclasses.replace(MODELS['conditional'](), label_counts=()))


def edited(*path, value=None):
  """Sets a value somewhere in the description, or removes it where it is None."""

  def damage(folder):
    found = json.loads((folder / model.DESCRIPTION).read_text())
    inner = functools.reduce(lambda tree, key: tree[key], path[:-1], found)
    if value is None:
      del inner[path[-1]]
    else:
      inner[path[-1]] = value
    (folder / model.DESCRIPTION).write_text(json.dumps(found))

  return damage


def with_weights(change):
  """Changes the arrays by name."""

  def damage(folder):
    flat = safetensors.numpy.load_file(folder / model.WEIGHTS)
    change(flat)
    safetensors.numpy.save_file(flat, folder / model.WEIGHTS)

  return damage


def flipped(name, position):
  """One bit of a file."""

  def damage(folder):
    data = bytearray((folder / name).read_bytes())
    data[position] ^= 1
    (folder / name).write_bytes(data)

  return damage


def cut_off(name):
  return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-40])


def another_s_weights(folder):
  model.write(folder.with_name('other'), MODELS['conditional'](seed=1))
  shutil.copy(folder.with_name('other') / model.WEIGHTS, folder)


# What is done to the folder; the error, and words of its one line.
DAMAGES = {
  'unknown field': (edited('future', value=1), UserError, "'future' is not known"),
  'newer format': (edited('format', value=2), UserError, 'format 2 is not known'),
  'missing field': (edited('space'), DamagedError, "no 'space' in it"),
  'unknown network': (edited('network', 'name', value='unett'), UserError, "did you mean 'unet'"),
  'unknown argument': (
    edited('network', 'arguments', 'depth', value=3),
    UserError,
    "network 'unet' has no argument 'depth' in this version",
  ),
  'missing argument': (edited('network', 'arguments', 'emb_ch'), UserError, "'emb_ch'"),
  'unknown schedule': (edited('schedule', 'name', value='square'), UserError, "schedule='square'"),
  'bad schedule': (edited('schedule', 'arguments', 'beta_min', value=-1), UserError, 'beta_min'),
  'unknown space': (edited('space', 'name', value='voxels'), UserError, "space='voxels'"),
  'space without arguments': (edited('space', 'name', value='latents'), DamagedError, "KeyError('vae')"),
  'unknown output': (edited('output', value='w'), UserError, "output='w'"),
  'unknown sampler': (edited('sampler', value='dpm'), UserError, "sampler='dpm'"),
  'unknown times': (edited('times', value='cubic'), UserError, "times='cubic'"),
  'no steps': (edited('num_steps', value=0), DamagedError, 'num_steps=0'),
  'no size': (edited('image_shape', value=[8, 0, 1]), DamagedError, '(8, 0, 1)'),
  'no width': (edited('network', 'arguments', 'emb_ch', value=0), DamagedError, 'ZeroDivision'),
  'wrong shape': (
    with_weights(lambda flat: flat.update({'dense0/bias': np.zeros(9, np.float32)})),
    DamagedError,
    "'dense0/bias' has shape (9,), its network needs (8,)",
  ),
  'missing weight': (with_weights(lambda flat: flat.pop('conv_out/bias')), DamagedError, "out/bias' is"),
  'one weight too many': (
    with_weights(lambda flat: flat.update({'extra': np.zeros(1, np.float32)})),
    DamagedError,
    "'extra' does not belong to the network",
  ),
  'weights of another model': (another_s_weights, DamagedError, 'its digest differs'),
  'flipped bit of a weight': (flipped(model.WEIGHTS, -5), DamagedError, 'its digest differs'),
  'flipped bit of the header': (flipped(model.WEIGHTS, 9), DamagedError, 'is damaged'),
  'weights cut off': (cut_off(model.WEIGHTS), DamagedError, 'is damaged'),
  'no weights': (lambda folder: (folder / model.WEIGHTS).unlink(), DamagedError, 'is missing'),
  'description cut off': (cut_off(model.DESCRIPTION), DamagedError, 'is damaged'),
  'description of another kind': (
    lambda folder: (folder / model.DESCRIPTION).write_text('[1, 2]'),
    DamagedError,
    'no JSON object',
  ),
  'no description': (
    lambda folder: (folder / model.DESCRIPTION).unlink(),
    UserError,
    'holds no model',
  ),
}


def refused(folder):
  """The error with which a folder is refused: one line that names it."""
  with pytest.raises(UserError) as caught:
    model.read(folder)
  assert '\n' not in str(caught.value) and str(folder) in str(caught.value)
  return caught.value


@pytest.mark.parametrize('case', DAMAGES)
def test_a_folder_that_is_not_what_was_written_is_one_clear_line(case, folder):
  damage, error, words = DAMAGES[case]
  damage(folder)
  found = refused(folder)
  assert type(found) is error and words in str(found)


def places(tree, path=()):
  """Paths to everything in a description."""
  inner = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
  return [path, *(place for key, value in inner for place in places(value, (*path, key)))]


def test_whatever_is_in_the_description_a_refusal_is_one_line(tmp_path):
  model.write(tmp_path / 'model', stored(Small(1, num_classes=3), metrics=({'value': 1.0},)))
  whole = json.loads((tmp_path / 'model' / model.DESCRIPTION).read_text())
  refusals = 0
  for path in places(whole)[1:]:
    for value in (-1, 0, 1.5, 'x', [], [1], {}, {'a': 1}):
      (tmp_path / 'model' / model.DESCRIPTION).write_text(json.dumps(whole))
      edited(*path, value=value)(tmp_path / 'model')
      try:
        model.read(tmp_path / 'model')
      except UserError:
        refused(tmp_path / 'model')
        refusals += 1
  assert refusals > 100
