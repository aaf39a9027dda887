"""DhariwalUNet against the outputs of the released network, and the members that every network has."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import traverse_util

from diffusion_distillation.networks.denoiser import ENCODED, INNERMOST, Denoiser
from diffusion_distillation.networks.dhariwal_unet import DhariwalUNet
from tests import edm_cases

NETWORK = DhariwalUNet(
  out_ch=1, ch=32, emb_ch=16, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8, 4), num_classes=3
)
SHAPE = (8, 8, 1)


@pytest.mark.parametrize('name', ['edm_adm_cond', 'vp_adm'])
def test_recorded_outputs(name, tmp_path):
  edm_cases.check(edm_cases.Case(name), tmp_path)


def shapes(network):
  found = jax.eval_shape(lambda rng: Denoiser(network, 'edm').init(rng, SHAPE), jax.random.key(0))
  return found


def test_there_is_attention_where_a_head_of_64_channels_fits():
  with_attention = {name for name, module in shapes(NETWORK).items() if 'qkv' in module}
  assert with_attention == {'enc.4x4_block0', 'dec.4x4_in0', 'dec.4x4_block0', 'dec.4x4_block1'}
  wide = shapes(dataclasses.replace(NETWORK, ch=64))['dec.4x4_in0']['qkv']['kernel']
  assert wide.shape == (128, 3, 2, 64)


def test_a_new_one_begins_with_its_last_convolutions_at_zero():
  denoise = Denoiser(dataclasses.replace(NETWORK, ch_mult=(2,), num_classes=0), 'v')
  params = denoise.init(jax.random.key(0), SHAPE)
  flat = traverse_util.flatten_dict(params, sep='/')
  zeros = {name for name, leaf in flat.items() if name.endswith('kernel') and not np.any(leaf)}
  assert zeros == {
    name for name in flat if name.endswith(('conv1/kernel', 'proj/kernel', 'out_conv/kernel'))
  }
  assert [denoise.bottleneck_shape(SHAPE, at)[-1] for at in (ENCODED, INNERMOST)] == [64, 64]


def test_what_does_not_fit_is_named():
  NETWORK.check(SHAPE)
  with pytest.raises(ValueError, match='attention heads do not divide a width of 224'):
    dataclasses.replace(NETWORK, ch=224, ch_mult=(1,)).check(SHAPE)
  with pytest.raises(ValueError, match='sides are divisible by 2'):
    NETWORK.check((7, 8, 1))
