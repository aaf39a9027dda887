"""UNet2DModel's forward pass in closed form; recorded outputs of diffusers are in tests/interop/diffusers_test.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.diffusion.discrete import Discrete
from diffusion_distillation.errors import UserError
from diffusion_distillation.networks.dhariwal_unet import DhariwalUNet
from diffusion_distillation.networks.song_unet import SongUNet
from diffusion_distillation.networks.unet2d import UNet2D
from tests import tiny


def network(**changes):
  given = {
    'out_ch': 1,
    'block_out_channels': (4,),
    'down_block_types': ('DownBlock2D',),
    'up_block_types': ('UpBlock2D',),
    'layers_per_block': 1,
    'norm_num_groups': 1,
    'add_attention': False,
    'schedule': Discrete(),
  }
  return UNet2D(**given | changes)


def test_the_output_has_silu_whatever_the_activation_is():
  """With all weights zero but the last norm's shift b, the output is the sum of silu(b) over channels."""
  net = network(act_fn='gelu')
  z, logsnr = jnp.ones((1, 4, 4, 1)), jnp.zeros(1)
  params = jax.tree.map(
    lambda leaf: np.zeros(leaf.shape, np.float32),
    jax.eval_shape(lambda rng: net.init(rng, z, logsnr)['params'], jax.random.key(0)),
  )
  shift = np.array([-1.0, 0.5, 1.0, 2.0], np.float32)
  params['conv_norm_out']['bias'] = shift
  params['conv_out']['kernel'][1, 1] = 1.0
  expected = (shift / (1.0 + np.exp(-shift))).sum()
  np.testing.assert_allclose(net.apply({'params': params}, z, logsnr), expected, rtol=1e-5)


def test_heads_divide_the_widths_where_there_is_attention_and_no_others():
  levels = {
    'block_out_channels': (4, 8),
    'down_block_types': ('DownBlock2D', 'AttnDownBlock2D'),
    'up_block_types': ('AttnUpBlock2D', 'UpBlock2D'),
    'attention_head_dim': 8,
  }
  network(**levels, add_attention=True).check((8, 8, 1))
  network(attention_head_dim=3).check((8, 8, 1))
  for wrong in (
    {'add_attention': True, 'attention_head_dim': 3},
    levels | {'down_block_types': ('AttnDownBlock2D', 'DownBlock2D')},
    levels | {'up_block_types': ('UpBlock2D', 'AttnUpBlock2D')},
  ):
    with pytest.raises(ValueError, match=r'attention_head_dim=. does not divide'):
      network(**wrong).check((8, 8, 1))


def test_heads_of_adm_divide_the_widths_where_there_is_attention_and_no_others():
  given = {'out_ch': 1, 'ch': 112, 'emb_ch': 8, 'num_res_blocks': 1, 'ch_mult': (2, 4)}
  DhariwalUNet(**given, attn_resolutions=(4,)).check((8, 8, 1))  # 448 channels, 7 heads
  with pytest.raises(ValueError, match='attention heads do not divide a width of 224'):
    DhariwalUNet(**given, attn_resolutions=(8,)).check((8, 8, 1))


def test_groups_of_the_middle_norm_divide_its_channels():
  network(add_attention=True, attention_head_dim=None, attn_norm_num_groups=2).check((8, 8, 1))
  with pytest.raises(ValueError, match='attn_norm_num_groups=3 does not divide 4'):
    network(add_attention=True, attention_head_dim=None, attn_norm_num_groups=3).check((8, 8, 1))


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({'noise_mult': 10**9}, 'noise_mult=1000000000'),
    ({'emb_ch': 10**9}, 'emb_ch=1000000000'),
    ({'resample_filter': (1,) * 100}, '100 taps'),
    ({'num_res_blocks': 10**9}, 'num_res_blocks=1000000000'),
    ({'ch_mult': ()}, 'ch_mult'),
  ],
)
def test_a_song_unet_that_no_memory_holds_is_refused_by_its_key(changes, named):
  given = {'out_ch': 1, 'ch': 4, 'emb_ch': 4, 'ch_mult': (1,), 'num_res_blocks': 1}
  SongUNet(**given).check((8, 8, 1))
  with pytest.raises(ValueError, match=named):
    SongUNet(**given | changes).check((8, 8, 1))


def test_a_config_cannot_ask_for_a_network_that_only_files_describe():
  with pytest.raises(UserError, match=r'model.name=unet2d is only for imported models'):
    tiny.plan(model__name='unet2d')
