"""NCSN++ as diffusers saves it gives here what it gives there; recorded outputs are in tests/parity_peers/unet2d_ncsnpp."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import default
from diffusion_distillation.diffusion.schedules import Karras
from diffusion_distillation.interop import diffusers
from tests import peers
from tests.interop.google_test import refused

CASE = 'unet2d_ncsnpp'


@pytest.fixture(scope='module')
def pipeline(tmp_path_factory):
  return peers.write_pipeline(tmp_path_factory.mktemp('peer') / 'pipeline', peers.read(CASE)[0])


def test_the_noise_is_the_recorded_score_times_sigma(pipeline):
  """Its images lie in [0, 1]: x there is (x + 1) / 2 here, and so is noise of half the scale."""
  case, arrays = peers.read(CASE)
  found = diffusers.read(pipeline, 4)
  assert found.schedule == Karras(0.02, 100.0) and found.sampler == 'edm_heun' and not found.clip_x
  sigma = np.float64(arrays['in/timesteps'])[:, None, None, None]
  y, s = 2.0 * arrays['in/x_nhwc'] - 1.0, 2.0 * sigma
  z = jnp.asarray(y / np.sqrt(1.0 + s**2), jnp.float32)
  logsnr = jnp.asarray(-2.0 * np.log(s[:, 0, 0, 0]), jnp.float32)
  eps = jax.jit(lambda z: found.denoise(found.params, z, logsnr, None).eps)(z)
  peers.assert_close(case, 'net', eps, -arrays['out/net_nhwc'] * sigma)


REFUSED = {
  'centered': ('unet/config.json', {'center_input_sample': False}, 'center_input_sample=False'),
  'groups': ('unet/config.json', {'norm_num_groups': 32}, 'norm_num_groups=32'),
  'heads': ('unet/config.json', {'attention_head_dim': 8}, 'attention_head_dim=8'),
  'middle': ('unet/config.json', {'mid_block_scale_factor': 1}, 'mid_block_scale_factor=1'),
  'narrow': ('unet/config.json', {'block_out_channels': [64, 64, 64]}, '128 or more'),
  'widths': ('unet/config.json', {'block_out_channels': [64, 150, 128]}, 'multiples of the first'),
  'embedding': ('unet/config.json', {'time_embedding_dim': 100}, 'time_embedding_dim=100'),
  'blocks': (
    'unet/config.json',
    {'down_block_types': ['DownBlock2D'] * 3},
    'down_block_types=',
  ),
  'mirror': (
    'unet/config.json',
    {'up_block_types': ['SkipUpBlock2D'] * 3},
    'attention where down_block_types has it',
  ),
  'depth': ('unet/config.json', {'layers_per_block': 90_000}, 'layers_per_block=90000'),
  'missing': ('unet/config.json', {'layers_per_block': 2}, 'is missing'),
  'type': ('unet/config.json', {'layers_per_block': '1'}, "layers_per_block='1'"),
  'sides': ('unet/config.json', {'sample_size': [16, 32]}, 'sample_size=[16, 32]'),
  'size': ('unet/config.json', {'sample_size': 100_000}, 'sample_size=100000'),
  'scheduler': ('scheduler/scheduler_config.json', {'_class_name': 'DDPMScheduler'}, '_class_name='),
  'sigma': ('scheduler/scheduler_config.json', {'sigma_max': 'much'}, "sigma_max='much'"),
  'order': ('scheduler/scheduler_config.json', {'sigma_max': 0.001}, 'sigma_max=0.002'),
}


@pytest.mark.parametrize('what', REFUSED)
def test_what_is_not_supported_is_named_by_its_key(what, pipeline, tmp_path):
  name, values, words = REFUSED[what]
  folder = shutil.copytree(pipeline, tmp_path / 'pipeline')
  path = folder / name
  path.write_text(json.dumps(json.loads(path.read_text()) | values))
  message = refused(default.get_config(), folder, tmp_path / 'run', 'diffusers')
  assert words in message and 'config.json' in message
