"""Files of low-rank adapters, under each of the names that they have elsewhere, and their import."""

import json

import jax
import numpy as np
import pytest
import safetensors.numpy

import diffusion_distillation
from diffusion_distillation.errors import UserError
from diffusion_distillation.interop import diffusers, importing, lora, stable_diffusion
from tests import tiny
from tests.interop.stable_diffusion_import_test import config, write
from tests.interop.stable_diffusion_test import SCHEDULE

QUERY = 'down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q'
CONV = 'down_blocks.0.resnets.0.conv1'
RANK = 2


@pytest.fixture(scope='module')
def pipeline(tmp_path_factory):
  return write(tmp_path_factory.mktemp('peer') / 'pipeline', 'sd15_tiny')


@pytest.fixture(scope='module')
def params(pipeline):
  return stable_diffusion.read_unet(pipeline / 'unet', SCHEDULE)[1]()


@pytest.fixture(scope='module')
def factors(params):
  """(down, up) of a projection and of a 3x3 convolution by their names, in the layout of PyTorch."""
  state, rng, found = diffusers.state_dict(params), np.random.default_rng(0), {}
  for module in (QUERY, CONV):
    out, inside, *size = state[f'{module}.weight'].shape
    shapes = (RANK, inside, *size), (out, RANK, *(1 for _ in size))
    found[module] = tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)
  return found


def kohya(module):
  return f'lora_unet_{module.replace(".", "_")}'


NAMINGS = {
  'peft': lambda module: (f'unet.{module}.lora_A.weight', f'unet.{module}.lora_B.weight'),
  'older': lambda module: (f'unet.{module}.lora.down.weight', f'unet.{module}.lora.up.weight'),
  'kohya': lambda module: (f'{kohya(module)}.lora_down.weight', f'{kohya(module)}.lora_up.weight'),
}


def store(path, factors, naming, alpha=None, metadata=None):
  state = {}
  for module, both in factors.items():
    state |= dict(zip(NAMINGS[naming](module), both, strict=True))
    if alpha is not None and naming == 'kohya':
      state[f'{kohya(module)}.alpha'] = np.array(alpha, np.float32)
  safetensors.numpy.save_file(state, path, metadata)
  return path


def changed(params, factors, scale):
  """The weights with up . down times the scale, in the layout of PyTorch."""
  state = diffusers.state_dict(params)
  for module, (down, up) in factors.items():
    change = np.einsum('or,ri...->oi...', up.reshape(up.shape[:2]), down)
    state[f'{module}.weight'] = state[f'{module}.weight'] + scale * change
  return state


def assert_same(params, expected):
  found = diffusers.state_dict(params)
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize('naming', NAMINGS)
def test_adapters_are_merged_whatever_their_names(params, factors, naming, tmp_path):
  path = store(tmp_path / 'a.safetensors', factors, naming)
  assert_same(lora.merged(path, params, 0.5), changed(params, factors, 0.5))
  assert_same(lora.merged(path, params, 0.0), diffusers.state_dict(params))


def test_alpha_over_the_rank_multiplies_the_change(params, factors, tmp_path):
  expected = changed(params, factors, 6.0 / RANK)
  path = store(tmp_path / 'a.safetensors', factors, 'kohya', alpha=6.0)
  assert_same(lora.merged(path, params, 1.0), expected)
  metadata = {'lora_adapter_metadata': json.dumps({'unet.lora_alpha': 6, 'unet.alpha_pattern': {}})}
  path = store(tmp_path / 'b.safetensors', factors, 'peft', metadata=metadata)
  assert_same(lora.merged(path, params, 1.0), expected)


REFUSED = {
  'module': (
    {'unet.other.to_q.lora_A.weight': (2, 3)},
    None,
    'lora_A.weight is not a factor of a module',
  ),
  'kind': ({f'unet.{QUERY}.lora_magnitude': (2,)}, None, 'lora_magnitude is not a factor of a module'),
  'text': ({'lora_te_text_model_q.lora_up.weight': (2, 3)}, None, 'adapts the text encoder'),
  'half': ({f'unet.{QUERY}.lora_A.weight': (2, 32)}, None, 'has only one of its two factors'),
  'shape': (
    {f'unet.{QUERY}.lora_A.weight': (2, 5), f'unet.{QUERY}.lora_B.weight': (32, 2)},
    None,
    'do not fit a kernel of shape',
  ),
  'kernel': (
    {f'unet.{CONV}.lora_A.weight': (2, 32, 3, 3), f'unet.{CONV}.lora_B.weight': (32, 2, 3, 3)},
    None,
    'have shapes (2, 32, 3, 3) and (32, 2, 3, 3)',
  ),
  'dora': ({}, {'unet.use_dora': True}, 'use_dora=True is not supported'),
  'pattern': ({}, {'unet.alpha_pattern': {'to_q': 3}}, 'alpha_pattern='),
  'alpha': ({}, {'unet.lora_alpha': 'x'}, 'lora_alpha=x is not a number'),
  'metadata': ({}, [3], 'its lora_adapter_metadata is damaged'),
}


@pytest.mark.parametrize('what', REFUSED)
def test_adapters_that_do_not_fit_are_refused_in_one_line(params, what, tmp_path):
  shapes, metadata, words = REFUSED[what]
  state = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
  described = None if metadata is None else {'lora_adapter_metadata': json.dumps(metadata)}
  path = tmp_path / 'a.safetensors'
  safetensors.numpy.save_file(state, path, described)
  with pytest.raises(UserError) as caught:
    lora.merged(path, params, 1.0)
  assert str(caught.value).startswith(f'--lora={path}') and words in str(caught.value)
  assert '\n' not in str(caught.value)


def test_files_that_are_missing_or_pickles_are_refused(params, tmp_path):
  for name, words in (('none.safetensors', 'there is no such file'), ('a.bin', 'could run any code')):
    if name == 'a.bin':
      (tmp_path / name).write_bytes(b'\x80')
    with pytest.raises(UserError, match=words):
      lora.merged(tmp_path / name, params, 1.0)


@pytest.mark.slow
def test_a_folder_is_imported_with_adapters_and_says_so(pipeline, params, factors, tmp_path):
  path = store(tmp_path / 'a.safetensors', factors, 'kohya', alpha=1.0)
  importing.from_stable_diffusion(config(), config(), pipeline, tmp_path / 'run', path, 0.5)
  stored = diffusion_distillation.load(tmp_path / 'run' / 'base').stored
  expected = lora.merged(path, params, 0.5)
  assert jax.tree.all(jax.tree.map(lambda one, other: (one == other).all(), stored.params, expected))
  made = stored.provenance['imported']['lora']
  assert (made['file'], made['scale'], len(made['sha256'])) == ('a.safetensors', 0.5, 64)


def test_only_stable_diffusion_takes_adapters(tmp_path):
  flags = (
    '--mode=import',
    '--source=model',
    f'--checkpoint={tmp_path}',
    f'--workdir={tmp_path / "run"}',
  )
  code, _, err = tiny.run_cli(*flags, *tiny.flags(), '--lora=a.safetensors')
  assert code == UserError.exit_code
  assert '--lora only applies to --source=stable_diffusion' in err
