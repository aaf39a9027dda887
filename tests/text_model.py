"""A model of latents and texts that compiles quickly: a U-Net of one level, beside a small autoencoder and text encoder."""

import functools

import array_record.python.array_record_data_source  # noqa: F401 (declares a flag, which must outlive `tiny.run_cli`)
import jax
import numpy as np

from diffusion_distillation.diffusion.discrete import Discrete
from diffusion_distillation.interop import importing
from diffusion_distillation.networks.autoencoder_kl import AutoencoderKL
from diffusion_distillation.networks.clip_text import CLIPText
from diffusion_distillation.networks.denoiser import Denoiser
from diffusion_distillation.networks.spaces import Latents
from diffusion_distillation.networks.unet2d_condition import UNet2DCondition
from diffusion_distillation.stages import model
from diffusion_distillation.stages.texts import TextEncoder
from diffusion_distillation.system.checkpoints import digest
from tests import peers

PROMPTS = ('a red circle', 'blue', 'a large green square', 'red on blue', 'circle')
SCHEDULE = Discrete('scaled_linear', 1000, 0.00085, 0.012, steps_offset=1)
NETWORK = UNet2DCondition(
  out_ch=2,
  block_out_channels=(8,),
  down_block_types=('CrossAttnDownBlock2D',),
  up_block_types=('UpBlock2D',),
  cross_attention_dim=8,
  mid_block_type=None,
  layers_per_block=1,
  attention_head_dim=1,
  text_length=6,
  norm_num_groups=4,
  schedule=SCHEDULE,
)
VAE = AutoencoderKL(
  latent_channels=2,
  block_out_channels=(4, 4),
  down_block_types=('DownEncoderBlock2D',) * 2,
  up_block_types=('UpDecoderBlock2D',) * 2,
  norm_num_groups=2,
  mid_block_add_attention=False,
)
IMAGE = (8, 8, 3)
LATENT = (4, 4, 2)


def random(init, *args):
  """Parameters of these shapes, which nothing is compiled for: kernels keep the size of what they are applied to."""
  shapes = jax.eval_shape(init, jax.random.key(0), *args)
  rng = np.random.default_rng(0)

  def draw(path, leaf):
    size = 0.1 if leaf.ndim < 2 else np.prod(leaf.shape[:-1]) ** -0.5
    found = size * rng.standard_normal(leaf.shape, np.float32)
    return 1.0 + found if 'scale' in jax.tree_util.keystr(path) else found

  return jax.tree_util.tree_map_with_path(draw, shapes)


@functools.cache
def stored():
  """The model, with random parameters."""
  denoise = Denoiser(NETWORK, 'eps')
  vae = random(VAE.init, np.zeros((1, *IMAGE), np.float32))['params']
  return model.StoredModel(
    denoise=denoise,
    params=random(lambda rng: denoise.init(rng, LATENT)),
    schedule=SCHEDULE,
    space=Latents(VAE, digest(vae), lambda: vae),
    image_shape=IMAGE,
    sampler='ddim',
    num_steps=4,
    clip_x=False,
    cond_dropout=0.1,
    text=text_encoder(),
  )


def text_encoder(seed=0):
  """A text encoder of one layer, with the peers' vocabulary; others have other parameters."""
  files = {
    name: (peers.ROOT / 'clip_tokenizer' / name).read_bytes() for name in ('vocab.json', 'merges.txt')
  }
  network = CLIPText(
    vocab_size=1000,
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    max_position_embeddings=6,
  )
  params = random(network.init, np.zeros((1, 6), np.int32))['params']
  params = jax.tree.map(lambda leaf: leaf * np.float32(1.0 + seed), params)
  return TextEncoder(network, digest(params), lambda: params, files)


def config(path, **changes):
  """The config of a run on the prompts in a file; dots in names are written as two underscores."""
  from configs import stable_diffusion  # not before conftest.py has set jax's flags

  c = stable_diffusion.get_config()
  small = {
    'dataset.name': 'prompts',
    'dataset.path': str(path),
    'distill.start_steps': 4,
    'log.measured_updates': 0,
    'log.every': 2,
    'log.health_every': 0,
    'log.seconds': 0.0,
    'checkpoint.every': 2,
    'pairs.num_pairs': 12,
    'pairs.batch_size': 8,
    'pairs.num_steps': 2,
    'pairs.sampler': 'ddim',
    'pairs.clip_x': False,
  }
  for name in ('knowledge', 'consistency', 'guided', 'distill', 'dmd', 'dmd2'):
    few = (4,) if name == 'distill' else 4
    small |= {f'{name}.batch_size': 8, f'{name}.num_updates': few, f'{name}.warmup': 0}
  small['dmd2.fake_updates'] = 2
  given = {name.replace('__', '.'): value for name, value in changes.items()}
  c.update_from_flattened_dict(small | given)
  return c


def write_prompts(path):
  path.write_text('\n'.join(PROMPTS) + '\n')
  return path


def begin(directory, **changes):
  """A workdir with the imported model, and the config of its run."""
  directory.mkdir(exist_ok=True)
  c = config(write_prompts(directory / 'prompts.txt'), **changes)
  importing.adopt_stored(c, directory / 'run', stored(), {'source': 'test', 'folder': 'nowhere'})
  return directory / 'run', c
