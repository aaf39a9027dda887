"""The networks of Stable Diffusion give here what they give in diffusers and transformers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

from diffusion_distillation.diffusion.discrete import Discrete
from diffusion_distillation.errors import UserError
from diffusion_distillation.interop import diffusers, stable_diffusion
from diffusion_distillation.stages.companions import abstract_params
from tests import peers
from tests.parity_peers import weights

CASES = ('sd15_tiny', pytest.param('sd21_tiny', marks=pytest.mark.slow))
SCHEDULE = Discrete('scaled_linear', 1000, 0.00085, 0.012, steps_offset=1)
PARTS = {
  'unet': lambda folder: stable_diffusion.read_unet(folder, SCHEDULE),
  'vae': stable_diffusion.read_vae,
  'text_encoder': stable_diffusion.read_text_encoder,
}


@pytest.fixture(scope='module', params=CASES)
def case(request, tmp_path_factory):
  """(description, arrays, folder)."""
  described, arrays = peers.read(request.param)
  folder = tmp_path_factory.mktemp('peer') / 'pipeline'
  return described, arrays, peers.write_stable_diffusion(folder, described)


def test_the_unet_gives_the_recorded_output(case):
  described, arrays, folder = case
  network, read = stable_diffusion.read_unet(folder / 'unet', SCHEDULE)
  params = read()

  @jax.jit
  def call(z, timesteps, text):
    logsnr = SCHEDULE((timesteps + 1) / 1000)
    return network.apply({'params': params}, z, logsnr, {'text': text})

  for kind in ('', '_flat'):
    z = arrays[f'in/latent{kind or "_in"}_nhwc']
    ours = call(z, arrays[f'in/timesteps{kind}'], arrays['in/context'][: len(z)])
    peers.assert_close(described, f'unet{kind}', ours, arrays[f'out/unet{kind}_nhwc'])


def test_the_autoencoder_gives_the_recorded_moments_and_images(case):
  described, arrays, folder = case
  network, read = stable_diffusion.read_vae(folder / 'vae')
  params = read()
  encode, decode = (
    jax.jit(lambda h, name=name: network.apply({'params': params}, h, method=name))
    for name in ('encode', 'decode')
  )
  for kind in ('', '_flat'):
    found = encode(arrays[f'in/image{kind}_nhwc'])
    peers.assert_close(described, f'vae_mean{kind}', found.mean, arrays[f'out/vae_mean{kind}_nhwc'])
    theirs = arrays[f'out/vae_logvar{kind}_nhwc']
    peers.assert_close(described, f'vae_logvar{kind}', found.log_variance, theirs)
    image = decode(arrays[f'in/z{kind}_nhwc'])
    peers.assert_close(described, f'vae_decode{kind}', image, arrays[f'out/vae_decode{kind}_nhwc'])


def test_the_text_encoder_gives_the_recorded_embeddings(case):
  described, arrays, folder = case
  network, read = stable_diffusion.read_text_encoder(folder / 'text_encoder')
  params = read()
  tokens = jnp.asarray(arrays['in/input_ids'], jnp.int32)
  found = jax.jit(network.apply)({'params': params}, tokens)
  theirs = {
    name: arrays[f'out/text_{name}'] for name in ('last_hidden_state', 'pooled', 'hidden_states')
  }
  peers.assert_close(described, 'text_last_hidden_state', found.last, theirs['last_hidden_state'])
  peers.assert_close(described, 'text_pooled', found.pooled, theirs['pooled'])
  for ours, expected in zip(found.layers, theirs['hidden_states'], strict=True):
    peers.assert_close(described, 'text_hidden_states', ours, expected)


def test_the_final_norm_can_leave_out_the_last_layers(case):
  """As Stable Diffusion 2's text encoder does without its last layer: as if there were one layer less."""
  _, arrays, folder = case
  network, read = stable_diffusion.read_text_encoder(folder / 'text_encoder')
  params = read()
  tokens = jnp.asarray(arrays['in/input_ids'], jnp.int32)
  shorter = network.clone(num_hidden_layers=network.num_hidden_layers - 1)
  expected = shorter.apply({'params': params}, tokens)
  found = network.apply({'params': params}, tokens, 1)
  np.testing.assert_array_equal(found.last, expected.last)
  np.testing.assert_array_equal(found.pooled, expected.pooled)


@pytest.mark.parametrize('part', PARTS)
def test_a_state_dict_is_the_one_that_was_read(case, part):
  """The map of names is one to one, and no number is lost."""
  described, _, folder = case
  expected = peers.part_of(described, part)
  found = diffusers.state_dict(PARTS[part](folder / part)[1]())
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value)


PUBLISHED = {'to_q': 'query', 'to_k': 'key', 'to_v': 'value', 'to_out.0': 'proj_attn'}


def published(part, name, value):
  """A weight under the name, and in the shape, that published checkpoints have it."""
  if part == 'text_encoder':
    return f'text_model.{name}', value
  for new, old in PUBLISHED.items():
    if f'.{new}.' in name:
      return name.replace(new, old), value[:, :, None, None] if value.ndim == 2 else value
  return name, value


@pytest.mark.parametrize('part', ['vae', 'text_encoder'])
def test_published_names_are_the_same_network(case, part, tmp_path):
  _, _, folder = case
  network, params = PARTS[part](folder / part)
  state = safetensors.numpy.load_file(folder / part / peers.STABLE_DIFFUSION[part])
  renamed = dict(published(part, *item) for item in state.items())
  assert renamed.keys() != state.keys()
  if part == 'text_encoder':
    renamed['text_model.embeddings.position_ids'] = np.arange(77)[None]
  (tmp_path / 'config.json').write_text((folder / part / 'config.json').read_text())
  safetensors.numpy.save_file(renamed, tmp_path / peers.STABLE_DIFFUSION[part])
  again, found = PARTS[part](tmp_path)
  assert again == network
  jax.tree.map(np.testing.assert_array_equal, found(), params())


@pytest.mark.parametrize('part', PARTS)
def test_a_description_is_read_without_the_weights(case, part, tmp_path):
  _, _, folder = case
  (tmp_path / 'config.json').write_text((folder / part / 'config.json').read_text())
  _, read = PARTS[part](tmp_path)
  with pytest.raises(UserError, match=r'there is no .* and no other file of safetensors$'):
    read()


LEVELS = {'block_out_channels': [320, 640, 1280, 1280], 'layers_per_block': 2}
UNETS = {
  '1.5': (859_520_964, LEVELS | {'cross_attention_dim': 768, 'attention_head_dim': 8}),
  '2.1': (
    865_910_724,
    LEVELS
    | {
      'cross_attention_dim': 1024,
      'attention_head_dim': [5, 10, 20, 20],
      'use_linear_projection': True,
    },
  ),
}
VAE = {
  'block_out_channels': [128, 256, 512, 512],
  'down_block_types': ['DownEncoderBlock2D'] * 4,
  'up_block_types': ['UpDecoderBlock2D'] * 4,
  'layers_per_block': 2,
}
TEXT = {'hidden_size': 768, 'intermediate_size': 3072, 'num_attention_heads': 12}
TEXT_21 = {
  'hidden_size': 1024,
  'intermediate_size': 4096,
  'num_attention_heads': 16,
  'num_hidden_layers': 23,
  'hidden_act': 'gelu',
}


def names_of(params):
  """Names and shapes of a state dict, from the shapes of the parameters here."""
  flat = traverse_util.flatten_dict(params, sep='/')
  found = {
    diffusers.their_name(name): diffusers.their_shape(name, leaf.shape) for name, leaf in flat.items()
  }
  assert len(found) == len(flat)
  return found


def count(names):
  return sum(math.prod(shape) for shape in names.values())


def unet_names(config):
  """The names of a UNet2DConditionModel with four levels, transformers in three, by its own rules."""
  found = {'conv_in', 'conv_norm_out', 'conv_out', 'time_embedding.linear_1', 'time_embedding.linear_2'}
  resnet = ('norm1', 'conv1', 'time_emb_proj', 'norm2', 'conv2')
  block = (*('norm1', 'norm2', 'norm3', 'ff.net.0.proj', 'ff.net.2'), 'attn1.to_out.0', 'attn2.to_out.0')
  inner = {f'transformer_blocks.0.{name}' for name in block}
  wired = {f'transformer_blocks.0.attn{k}.to_{name}' for k in (1, 2) for name in 'qkv'}
  places = {f'down_blocks.{i}': (2, i < 3, i < 3, 'downsamplers') for i in range(4)}
  places |= {f'up_blocks.{i}': (3, i > 0, i < 3, 'upsamplers') for i in range(4)}
  weights = set()
  for name, (count, attends, resamples, kind) in places.items():
    found |= {f'{name}.{kind}.0.conv'} if resamples else set()
    for i in range(count):
      found |= {f'{name}.resnets.{i}.{part}' for part in resnet}
      if attends:
        found |= {f'{name}.attentions.{i}.{part}' for part in (*inner, 'norm', 'proj_in', 'proj_out')}
        weights |= {f'{name}.attentions.{i}.{part}.weight' for part in wired}
  shortcuts = ('down_blocks.1.resnets.0', 'down_blocks.2.resnets.0')
  shortcuts += tuple(f'up_blocks.{i}.resnets.{j}' for i in range(4) for j in range(3))
  found |= {f'{name}.conv_shortcut' for name in shortcuts}
  middle = {f'mid_block.resnets.{i}.{part}' for i in (0, 1) for part in resnet}
  found |= middle | {
    f'mid_block.attentions.0.{part}' for part in (*inner, 'norm', 'proj_in', 'proj_out')
  }
  weights |= {f'mid_block.attentions.0.{part}.weight' for part in wired}
  return weights | {f'{name}.{kind}' for name in found for kind in ('weight', 'bias')}


@pytest.mark.parametrize('version', ['1.5', pytest.param('2.1', marks=pytest.mark.slow)])
def test_the_unet_has_the_published_number_of_parameters_by_the_published_names(version, tmp_path):
  expected, config = UNETS[version]
  network = stable_diffusion.unet_of(tmp_path, config, SCHEDULE)
  network.check((64, 64, 4))
  names = names_of(stable_diffusion.abstract_unet(network))
  assert count(names) == expected and names.keys() == unet_names(config) and len(names) == 686
  projected = (1280, 1280) if version == '2.1' else (1280, 1280, 1, 1)
  assert names['mid_block.attentions.0.proj_in.weight'] == projected
  text = config['cross_attention_dim']
  assert names['down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight'] == (320, text)


def test_the_autoencoder_has_the_published_number_of_parameters(tmp_path):
  names = names_of(abstract_params(stable_diffusion.vae_of(tmp_path, VAE)))
  assert count(names) == 83_653_863 and len(names) == 248
  assert names['encoder.conv_out.weight'] == (8, 512, 3, 3) and names['quant_conv.weight'] == (
    8,
    8,
    1,
    1,
  )
  assert names['decoder.up_blocks.3.resnets.2.conv2.weight'] == (128, 128, 3, 3)


@pytest.mark.parametrize(('config', 'expected'), [(TEXT, 123_060_480), (TEXT_21, 340_387_840)])
def test_the_text_encoder_has_the_published_number_of_parameters(config, expected, tmp_path):
  network = stable_diffusion.text_encoder_of(tmp_path, config)
  names = names_of(abstract_params(network))
  assert count(names) == expected and len(names) == 16 * network.num_hidden_layers + 4


FORMS, FORMS_ARRAYS = peers.read('sd_forms')


def by_name(params):
  """Parameters whose values are functions of their names in diffusers."""
  state = {
    name: weights.tensor(name, shape, weights.kind_of(name, len(shape)))
    for name, shape in names_of(params).items()
  }
  return diffusers.convert(state, params, 'by name')


@pytest.mark.parametrize(
  'name', ['misc', *(pytest.param(n, marks=pytest.mark.slow) for n in FORMS['unet'] if n != 'misc')]
)
def test_forms_of_the_unet_give_the_recorded_output(name, tmp_path):
  """Blocks without attention, numbers for each level, no middle, classes, other embeddings and activations."""
  network = stable_diffusion.unet_of(tmp_path, FORMS['unet'][name], SCHEDULE)
  network.check((8, 8, 4))
  params = by_name(stable_diffusion.abstract_unet(network))
  cond = {'text': FORMS_ARRAYS['in/context']}
  cond |= {'label': FORMS_ARRAYS['in/labels']} if network.num_classes else {}
  assert network.conditioning.keys() == cond.keys()
  logsnr = SCHEDULE(jnp.asarray((FORMS_ARRAYS['in/timesteps'] + 1) / 1000, jnp.float32))
  found = jax.jit(network.apply)({'params': params}, FORMS_ARRAYS['in/latent_nhwc'], logsnr, cond)
  peers.assert_close(FORMS, name, found, FORMS_ARRAYS[f'out/{name}_nhwc'])


@pytest.mark.slow
@pytest.mark.parametrize('name', FORMS['vae'])
def test_forms_of_the_autoencoder_give_the_recorded_output(name, tmp_path):
  network = stable_diffusion.vae_of(tmp_path, FORMS['vae'][name])
  params = by_name(abstract_params(network))
  found = network.apply({'params': params}, FORMS_ARRAYS['in/image_nhwc'], method='encode')
  mean = FORMS_ARRAYS[f'out/{name}_mean_nhwc']
  image = network.apply({'params': params}, mean, method='decode')
  peers.assert_close(FORMS, f'{name}_mean', found.mean, mean)
  peers.assert_close(
    FORMS, f'{name}_logvar', found.log_variance, FORMS_ARRAYS[f'out/{name}_logvar_nhwc']
  )
  peers.assert_close(FORMS, f'{name}_decode', image, FORMS_ARRAYS[f'out/{name}_decode_nhwc'])
