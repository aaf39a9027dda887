"""Weights of DINOv2 from files, and the extractor: any batch, any number of devices."""

import functools

import jax
import numpy as np
import pytest
import safetensors.numpy

from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import dinov2, given_images
from diffusion_distillation.evaluation.dinov2 import Dinov2Extractor, Weights
from diffusion_distillation.networks.dinov2 import Size
from diffusion_distillation.system import sharding, torch_files
from tests import peers


@functools.cache
def state(name='dinov2_reg4_tiny'):
  """The tensors of a case by transformers' names."""
  return peers.state_dict(peers.read(name)[0])


def original(given):
  """The same tensors by the names of the original code."""
  found = {}
  for name, value in given.items():
    for theirs, ours in (
      ('embeddings.position_embeddings', 'pos_embed'),
      ('embeddings.patch_embeddings.projection', 'patch_embed.proj'),
      ('embeddings.', ''),
      ('layernorm.', 'norm.'),
      ('encoder.layer.', 'blocks.'),
      ('layer_scale1.lambda1', 'ls1.gamma'),
      ('layer_scale2.lambda1', 'ls2.gamma'),
      ('attention.output.dense', 'attn.proj'),
    ):
      name = name.replace(theirs, ours)
    found[name] = value
  for k in range(2):
    for kind in ('weight', 'bias'):
      parts = [
        found.pop(f'blocks.{k}.attention.attention.{part}.{kind}') for part in ('query', 'key', 'value')
      ]
      found[f'blocks.{k}.attn.qkv.{kind}'] = np.concatenate(parts)
  return found


def test_both_forms_of_a_file_give_the_same_weights(tmp_path, monkeypatch):
  safetensors.numpy.save_file(state(), tmp_path / 'model.safetensors')
  theirs = dinov2.read_weights(tmp_path / 'model.safetensors', dinov2.KEY)
  (tmp_path / 'weights.pth').touch()
  monkeypatch.setattr(torch_files, 'read', lambda path, source: original(state()))
  ours = dinov2.read_weights(tmp_path / 'weights.pth', dinov2.KEY)
  assert (ours.size, ours.digest) == (theirs.size, theirs.digest)
  assert ours.size == Size(width=128, depth=2, hidden=256, registers=4, gated=False)
  jax.tree.map(np.testing.assert_array_equal, ours.params, theirs.params)
  assert Dinov2Extractor(ours).name == 'dinov2_vit12814_reg4'


def test_names_and_dimensions_of_the_public_sizes():
  for width, registers, name in ((1024, 0, 'dinov2_vitl14'), (1536, 4, 'dinov2_vitg14_reg4')):
    extractor = Dinov2Extractor(Weights({}, Size(width, 1, 1, registers), 'd'))
    assert (extractor.name, extractor.dimension) == (name, width)
    assert (extractor.metric, extractor.digest) == ('FD-DINOv2', 'd')


def having(name, value):
  return lambda found: found.update({name: np.asarray(value, np.float32)})


def without(*names):
  return lambda found: [found.pop(name) for name in names]


PROBLEMS = {
  'a missing tensor': (without('norm.bias'), 'x lacks norm.bias, so it is not a DINOv2 with patches'),
  'a missing block': (without('blocks.0.mlp.fc2.weight'), 'x lacks blocks.0.mlp.fc2.weight, so'),
  'no class token': (without('cls_token'), 'x lacks cls_token, so it is not'),
  'a block that is not counted': (having('blocks.7.norm1.bias', np.zeros(128)), 'x lacks blocks.2.'),
  'another head': (having('head.weight', np.zeros((5, 128))), 'x has head.weight, so it is not'),
  'larger patches': (
    having('patch_embed.proj.weight', np.zeros((128, 3, 16, 16))),
    r'has shape \(128, 3, 16, 16\) instead of \(128, 3, 14, 14\)',
  ),
  'no square of positions': (
    having('pos_embed', np.zeros((1, 28, 128))),
    'x has 128 channels and 28 positions, so it is not',
  ),
  'numbers that are none': (having('norm.bias', np.full(128, np.inf)), 'norm.bias has numbers that are'),
  'a scalar': (having('cls_token', 1.0), r'x has cls_token of shape \(\), so it is not'),
}


@pytest.mark.parametrize('name', PROBLEMS)
def test_other_tensors_are_refused_by_name(name):
  change, message = PROBLEMS[name]
  found = original(state())
  change(found)
  with pytest.raises(UserError, match=message):
    dinov2._checked(found, 'x')


def test_half_of_a_layer_of_attention_is_refused():
  found = dict(state())
  del found['encoder.layer.0.attention.attention.key.bias']
  with pytest.raises(UserError, match=r'x lacks blocks\.0\.attn\.qkv\.bias, so'):
    dinov2._checked(dinov2._original_names(found), 'x')


def test_files_that_are_none_are_refused(tmp_path):
  with pytest.raises(
    UserError, match=r'evaluation.dinov2=.*none\.pth: there is no such file; name dinov2_vitl14_pretrain'
  ):
    dinov2.read_weights(tmp_path / 'none.pth', dinov2.KEY)


def simple(params, images, size):
  """Instead of the network: the means of some pixels of each image."""
  del size
  return images[:, ::56, ::56].mean((1, 2)) + params['shift'][None]


@pytest.mark.parametrize('at_once', [1, 32])
def test_batches_and_images_of_many_sizes_have_the_same_features(monkeypatch, at_once):
  monkeypatch.setattr(dinov2, '_forward', simple)
  monkeypatch.setattr(dinov2, 'AT_ONCE', at_once)
  params = {'shift': np.arange(3, dtype=np.float32)}
  extractor = Dinov2Extractor(Weights(params, Size(3, at_once, 1), ''))
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (16, 9, 7, 3), np.uint8)
  expected = simple(params, dinov2.preprocess(images), None)
  found = sharding.to_host(extractor.of(sharding.spread(images)).features)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  batches = [given_images.Batch(np.arange(k, k + 4), images[k : k + 4]) for k in range(0, 16, 4)]
  given = list(extractor.of_given(batches, 8))
  assert [count for count, _ in given] == [8, 8]
  features = np.concatenate([np.asarray(x.features) for _, x in given])
  np.testing.assert_allclose(features, expected, atol=1e-5)
