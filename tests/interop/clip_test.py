"""CLIP gives here what it gives in transformers; its folders are read, or refused in one line."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

from diffusion_distillation.errors import UserError
from diffusion_distillation.interop import clip
from tests import peers

ROOT = peers.ROOT / 'clip_tiny'


def write(folder):
  """The case as a folder of transformers, with a tokenizer; its logit_scale is not read."""
  case, _ = peers.read('clip_tiny')
  entries = [entry for entry in case['parameters'] if entry['name'] != 'logit_scale']
  shutil.copytree(peers.ROOT / 'clip_tokenizer', folder)
  for name in ('config.json', 'preprocessor_config.json'):
    shutil.copy(ROOT / name, folder)
  state = peers.state_dict({'parameters': entries}) | {'logit_scale': np.array([2.6], np.float32)}
  state['vision_model.embeddings.position_ids'] = np.arange(17, dtype=np.float32)[
    None
  ]  # as in older files
  safetensors.numpy.save_file(state, folder / 'model.safetensors')
  return folder


@pytest.fixture(scope='module')
def case(tmp_path_factory):
  """(description, arrays, folder, model)."""
  described, arrays = peers.read('clip_tiny')
  folder = write(tmp_path_factory.mktemp('clip') / 'clip')
  return described, arrays, folder, clip.read(folder)


def images_of(arrays):
  return [arrays[f'in/image_{k}'] for k in range(4)]


def test_images_are_prepared_as_by_the_image_processor(case):
  _, arrays, _, model = case
  found = np.stack([model.preprocessing(image) for image in images_of(arrays)])
  assert found.dtype == np.float32
  np.testing.assert_allclose(found, arrays['out/pixel_values_nhwc'], rtol=0, atol=2e-6)


def test_the_image_encoder_gives_the_recorded_embeddings(case):
  described, arrays, _, model = case
  network = model.vision.clone(projection_dim=0)
  params = {key: value for key, value in model.vision_params.items() if key != 'visual_projection'}
  call = jax.jit(network.apply)
  values = jnp.asarray(arrays['out/pixel_values_nhwc'])
  found = call({'params': params}, values)
  peers.assert_close(described, 'vision_pooled', found, arrays['out/vision_pooled'])
  flat = call({'params': params}, 0.003 * values)
  peers.assert_close(described, 'vision_pooled_flat', flat, arrays['out/vision_pooled_flat'])
  embedded = model.of_images(images_of(arrays))
  peers.assert_close(described, 'image_embeds', embedded, arrays['out/image_embeds'])


def test_the_text_encoder_and_its_projection_give_the_recorded_embeddings(case, monkeypatch):
  described, arrays, _, model = case
  tokens = arrays['in/input_ids']
  monkeypatch.setattr(type(model.text), 'tokens', lambda self, texts: tokens[[int(t) for t in texts]])
  found = model.of_texts(['0', '1', '2', '3'])
  peers.assert_close(described, 'text_embeds', found, arrays['out/text_embeds'])
  np.testing.assert_allclose(np.linalg.norm(found, axis=-1), 1.0, rtol=1e-6)


def test_older_descriptions_repeat_what_differs_from_the_defaults(case, tmp_path):
  _, _, folder, model = case
  other = shutil.copytree(folder, tmp_path / 'clip')
  config = json.loads((other / 'config.json').read_text())
  for part in ('text_config', 'vision_config'):
    config[f'{part}_dict'] = config[part]
    config[part] = {'hidden_size': 7}
  (other / 'config.json').write_text(json.dumps(config))
  (other / 'preprocessor_config.json').write_text(
    json.dumps({'size': 32, 'crop_size': 32, 'resample': 3})
  )
  found = clip.read(other)
  assert (found.digest, found.vision, found.text.network) == (
    model.digest,
    model.vision,
    model.text.network,
  )
  assert found.preprocessing == model.preprocessing
  (other / 'preprocessor_config.json').unlink()
  assert clip.read(other).preprocessing == model.preprocessing


CONFIG, PROCESSOR = 'config.json', 'preprocessor_config.json'
REFUSED = {
  'model': (CONFIG, {'model_type': 'siglip'}, "model_type='siglip' is not supported; supported: clip"),
  'activation': (CONFIG, {'vision_config': {'hidden_act': 'relu'}}, "hidden_act='relu' is not one of"),
  'heads': (
    CONFIG,
    {'vision_config': {'num_attention_heads': 5}},
    'num_attention_heads=5 does not divide',
  ),
  'patches': (
    CONFIG,
    {'vision_config': {'patch_size': 33}},
    'patch_size=33 is larger than image_size=32',
  ),
  'no section': (CONFIG, {'text_config': [3]}, 'text_config is not an object'),
  'width': (
    CONFIG,
    {'projection_dim': 17},
    'text_projection.weight has shape (16, 24); (17, 24) is expected',
  ),
  'projection': (CONFIG, {'projection_dim': 'x'}, 'projection_dim'),
  'resample': (PROCESSOR, {'resample': 2}, 'resample=2 is not supported; supported: 3 (bicubic)'),
  'crop': (PROCESSOR, {'crop_size': 24}, 'crop_size=24, but the network takes images of 32x32'),
  'size': (PROCESSOR, {'size': {'height': 3}}, "size={'height': 3} and crop_size"),
  'no crop': (PROCESSOR, {'do_center_crop': False}, 'do_center_crop=False is not supported'),
  'mean': (PROCESSOR, {'image_mean': [0.5]}, 'image_mean'),
}


@pytest.mark.parametrize('what', REFUSED)
def test_what_is_not_supported_is_named_in_one_line(case, what, tmp_path):
  name, values, words = REFUSED[what]
  folder = shutil.copytree(case[2], tmp_path / 'clip')
  found = json.loads((folder / name).read_text())
  for key, value in values.items():
    merged = isinstance(value, dict) and key.endswith('_config')
    found[key] = found[key] | value if merged else value
  (folder / name).write_text(json.dumps(found))
  with pytest.raises(UserError) as caught:
    clip.read(folder)
  assert words in str(caught.value) and '\n' not in str(caught.value)


def test_folders_and_weights_that_are_missing_or_others_are_refused_in_one_line(case, tmp_path):
  with pytest.raises(UserError, match=r'^evaluation\.clip=nowhere: there is no such folder'):
    clip.read('nowhere')
  folder = shutil.copytree(case[2], tmp_path / 'clip')
  state = safetensors.numpy.load_file(folder / 'model.safetensors')
  for changed, words in (
    (
      {'vision_model.other.weight': np.zeros(3, np.float32)},
      'other.weight is not a weight of this network',
    ),
    ({'other': np.zeros(3, np.float32)}, 'other is not a weight of CLIPModel'),
    ({'text_projection.weight': None}, 'text_projection.weight is missing'),
    ({'visual_projection.weight': None}, 'visual_projection.weight is missing'),
  ):
    kept = {key: value for key, value in (state | changed).items() if value is not None}
    safetensors.numpy.save_file(kept, folder / 'model.safetensors')
    with pytest.raises(UserError, match=words):
      clip.read(folder)
  for name in ('vocab.json', 'tokenizer.json'):
    (folder / name).unlink()
  (folder / 'merges.txt').unlink()
  with pytest.raises(UserError, match='has no tokenizer'):
    clip.read(folder)
