"""A small Stable Diffusion of diffusers, imported, exported and loaded in StableDiffusionPipeline: do both draw the same images?

  python -m benchmarks.stable_diffusion_round_trip --workdir=DIR

Needs diffusers, transformers and torch beside this package. diffusers makes a pipeline with random weights. It is imported and
exported as it is, and as what students of it are: a model in one step, and one in four steps with new noise between them. The
pipeline of each exported folder and this package draw the same prompts from the same noise, with guidance for the base; the
largest difference of the images, whose values lie in [0, 1], is printed for each.
"""

import argparse
import dataclasses
import pathlib
import sys

import diffusers
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from configs import stable_diffusion as config_file
from diffusion_distillation.diffusion import process, samplers, times
from diffusion_distillation.diffusion.guidance import make_guidance
from diffusion_distillation.evaluation import sampling
from diffusion_distillation.evaluation.loading import LoadedModel, load
from diffusion_distillation.interop import exporting, importing
from diffusion_distillation.stages import model
from diffusion_distillation.stages.model import StoredModel

TOLERANCE, STEPS, SCALE = 1e-4, 5, 7.5
PROMPTS = ('a red circle, large', 'blue')
TOKENIZER = pathlib.Path(__file__).parents[1] / 'tests' / 'parity_peers' / 'clip_tokenizer'
STUDENTS = {
  'one step': {'num_steps': 1, 'times': 'uniform'},
  'four steps': {'num_steps': 4, 'times': 'uniform', 'sampler': 'multistep_consistency'},
}


def make(folder: pathlib.Path) -> None:
  """Saves a pipeline with random weights."""
  torch.manual_seed(0)
  tokenizer = transformers.CLIPTokenizer(
    str(TOKENIZER / 'vocab.json'), str(TOKENIZER / 'merges.txt'), model_max_length=77
  )
  of_texts = transformers.CLIPTextConfig(
    vocab_size=len(tokenizer),
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    bos_token_id=tokenizer.bos_token_id,
    eos_token_id=tokenizer.eos_token_id,
    pad_token_id=tokenizer.pad_token_id,
  )
  unet = diffusers.UNet2DConditionModel(
    sample_size=8,
    block_out_channels=(32, 64),
    down_block_types=('CrossAttnDownBlock2D', 'DownBlock2D'),
    up_block_types=('UpBlock2D', 'CrossAttnUpBlock2D'),
    layers_per_block=1,
    attention_head_dim=4,
    cross_attention_dim=32,
    norm_num_groups=8,
  )
  vae = diffusers.AutoencoderKL(
    block_out_channels=(16, 32),
    down_block_types=('DownEncoderBlock2D',) * 2,
    up_block_types=('UpDecoderBlock2D',) * 2,
    latent_channels=4,
    norm_num_groups=8,
    sample_size=16,
  )
  scheduler = diffusers.PNDMScheduler(
    beta_start=0.00085,
    beta_end=0.012,
    beta_schedule='scaled_linear',
    skip_prk_steps=True,
    steps_offset=1,
  )
  text_encoder = transformers.CLIPTextModel(of_texts)
  parts = (vae, text_encoder, tokenizer, unet, scheduler)
  pipeline = diffusers.StableDiffusionPipeline(*parts, None, None, requires_safety_checker=False)
  pipeline.save_pretrained(folder, safe_serialization=True)


def theirs(
  folder: pathlib.Path, z: np.ndarray, noise: np.ndarray, steps: int, scale: float
) -> np.ndarray:
  """Images (n, H, W, C) in [0, 1] of the exported pipeline from latents z; `noise` (steps - 1, n, ...) is added between steps."""
  pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder)
  pipeline.set_progress_bar_config(disable=True)
  added = iter(_channels_first(noise))
  diffusers.schedulers.scheduling_lcm.randn_tensor = lambda *_, **__: next(added)
  found = pipeline(
    list(PROMPTS),
    num_inference_steps=steps,
    guidance_scale=scale,
    latents=_channels_first(z),
    output_type='np',
  )
  return np.asarray(found.images)


def _channels_first(x: np.ndarray) -> torch.Tensor:
  return torch.from_numpy(np.moveaxis(x, -1, -3).copy())


def ours(stored: StoredModel, z: np.ndarray, noise: np.ndarray, weight: float) -> np.ndarray:
  """The same images, drawn by this package."""
  assert stored.text is not None
  cond = {'text': stored.text.embed(PROMPTS)}
  if weight:
    cond['no_text'] = np.repeat(stored.text.embed(['']), len(PROMPTS), 0)
  grid = times.make_grid(stored.times, stored.num_steps, stored.schedule)
  if stored.sampler == 'multistep_consistency':
    x = jnp.asarray(z)
    for k, added in zip(range(len(grid) - 1, 0, -1), [*noise, None], strict=True):
      logsnr = jnp.broadcast_to(stored.schedule(jnp.asarray(grid[k - 1 : k + 1])), (len(z), 2))
      x = stored.denoise(stored.params, x, logsnr[:, 1], cond).x
      x = x if added is None else process.diffuse(x, jnp.asarray(added), logsnr[:, 0])
  else:
    drawer = LoadedModel(stored).drawer(samplers.DDIM(), False, len(z), make_guidance(weight))
    keys = sampling.noise(drawer, jnp.int32(0), jnp.arange(len(z)))[1]
    x = sampling.from_noise(drawer, stored.params, jnp.asarray(grid), jnp.asarray(z), keys, cond)
  vae = stored.space.vae  # type: ignore[union-attr]
  decoded = vae.apply({'params': stored.space.weights()}, vae.unscaled(x), method='decode')  # type: ignore[union-attr]
  return np.clip(np.asarray(decoded) / 2 + 0.5, 0.0, 1.0)


def main() -> None:
  """Prints a row for each model; the exit code is 1 unless all agree."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--workdir', type=pathlib.Path, required=True, help='a directory that does not exist'
  )
  root = parser.parse_args().workdir.absolute()
  root.mkdir(parents=True)
  make(root / 'pipeline')
  config = config_file.get_config()
  config.distill.start_steps = STEPS
  importing.from_stable_diffusion(config, config, root / 'pipeline', root / 'run')
  base = load(root / 'run' / 'base').stored
  for name, changes in STUDENTS.items():
    student = dataclasses.replace(base, provenance={'stage': name, 'parent': None}, **changes)
    model.write(root / 'run' / name / 'model', student)
  rng, worst, rows = (
    np.random.default_rng(0),
    0.0,
    ['| model | steps | guidance | difference |\n|---|---|---|---|'],
  )
  shape = (len(PROMPTS), *base.space.shape(base.image_shape))
  for name in ('base', *STUDENTS):
    stored = load(root / 'run' / name).stored
    print(exporting.export(root / 'run', name, root / name, 'diffusers'))
    z, noise = (rng.standard_normal(s, np.float32) for s in (shape, (stored.num_steps - 1, *shape)))
    scale = SCALE if name == 'base' else 0.0
    images = theirs(root / name, z, noise, stored.num_steps, scale)
    apart = float(np.abs(images - ours(stored, z, noise, max(0.0, scale - 1.0))).max())
    worst = max(worst, apart)
    rows.append(f'| {name} | {stored.num_steps} | {scale} | {apart:.1e} |')
  print('\n'.join(rows))
  sys.exit(worst > TOLERANCE)


if __name__ == '__main__':
  main()
