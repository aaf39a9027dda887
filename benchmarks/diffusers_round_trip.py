"""A pipeline that diffusers makes, imported, distilled and exported, and loaded there again: do both draw the same images?

  python -m benchmarks.diffusers_round_trip --workdir=DIR

Needs diffusers and torch beside this package. The pipeline has a small UNet2DModel with random weights for the digits. It is
imported, distilled by two rounds and by DMD for a few updates, and each student is exported as a pipeline. From the same
noise, DDIMScheduler steps through the loaded pipeline, and this package through its own model; the largest difference of x,
whose values lie in [-1, 1], is printed for each.
"""

import argparse
import pathlib
import subprocess
import sys

import diffusers
import jax.numpy as jnp
import numpy as np
import torch

import diffusion_distillation
from diffusion_distillation.diffusion import samplers, times
from diffusion_distillation.evaluation import sampling

NUM_IMAGES, SEED = 16, 0
TOLERANCE = 1e-4
STAGES = ('base', 'progressive_0002', 'progressive_0001', 'dmd')
SETTINGS = {
  'methods': "('progressive','dmd')",
  'model.output': 'v',
  'distill.start_steps': 4,
  'distill.num_updates': '(4,)',
  'distill.batch_size': 16,
  'dmd.num_updates': 4,
  'dmd.batch_size': 16,
  'dmd.warmup': 0,
  'pairs.num_pairs': 32,
  'pairs.num_steps': 4,
  'pairs.sampler': 'ddim',
  'evaluation.num_samples': 64,
  'evaluation.samplers': "('ddim',)",
  'evaluation.grid': 'uniform',
  'log.health_every': 0,
}


def make(folder: pathlib.Path) -> None:
  """Saves a pipeline with random weights."""
  torch.manual_seed(0)
  network = diffusers.UNet2DModel(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(32, 64),
    layers_per_block=1,
    down_block_types=('DownBlock2D', 'AttnDownBlock2D'),
    up_block_types=('AttnUpBlock2D', 'UpBlock2D'),
    norm_num_groups=8,
  )
  scheduler = diffusers.DDPMScheduler(prediction_type='v_prediction')
  diffusers.DDPMPipeline(network, scheduler).save_pretrained(folder, safe_serialization=True)


def run(workdir: pathlib.Path, *arguments: str) -> None:
  """One call of the program; ends with its exit code unless that is 0."""
  command = [sys.executable, 'main.py', f'--workdir={workdir}', *arguments]
  code = subprocess.run(command, check=False).returncode
  if code:
    sys.exit(code)


def ours(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray, int]:
  """Noise and x, (n, H, W, C), of a stage's model, and its number of steps."""
  model = diffusion_distillation.load(folder)
  stored = model.stored
  drawer = model.drawer(samplers.SAMPLERS[stored.sampler](), stored.clip_x, NUM_IMAGES)
  grid = times.make_grid(stored.times, stored.num_steps, stored.schedule)
  index = np.arange(NUM_IMAGES, dtype=np.int32)
  z, keys = sampling.noise(drawer, jnp.int32(SEED), jnp.asarray(index))
  x = sampling.from_noise(drawer, stored.params, jnp.asarray(grid), z, keys, None)
  return np.asarray(z), np.asarray(x), stored.num_steps


def theirs(folder: pathlib.Path, z: np.ndarray, num_steps: int) -> np.ndarray:
  """x (n, H, W, C) as DDIMScheduler and the loaded network draw it from noise `z`."""
  pipeline = diffusers.DDIMPipeline.from_pretrained(folder)
  pipeline.scheduler.set_timesteps(num_steps)
  x = torch.from_numpy(np.array(z.transpose(0, 3, 1, 2)))
  clips = pipeline.scheduler.config.clip_sample
  with torch.no_grad():
    for timestep in pipeline.scheduler.timesteps:
      output = pipeline.unet(x, timestep).sample
      x = pipeline.scheduler.step(output, timestep, x, use_clipped_model_output=clips).prev_sample
  return x.numpy().transpose(0, 2, 3, 1)


def main() -> None:
  """Prints a row for each stage; the exit code is 1 unless all agree."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument(
    '--workdir', type=pathlib.Path, required=True, help='a directory that is not there yet'
  )
  root = parser.parse_args().workdir.absolute()
  root.mkdir(parents=True)
  make(root / 'pipeline')
  flags = ['--config=configs/digits_methods.py', *(f'--config.{k}={v}' for k, v in SETTINGS.items())]
  run(root / 'run', *flags, '--mode=import', '--source=diffusers', f'--checkpoint={root / "pipeline"}')
  run(root / 'run', *flags)
  print('| stage | steps | largest difference of x |\n|---|---|---|')
  worst = 0.0
  for stage in STAGES:
    out = root / 'exported' / stage
    run(root / 'run', '--mode=export', f'--stage={stage}', f'--out={out}', '--format=diffusers')
    z, x, num_steps = ours(root / 'run' / stage)
    apart = float(np.abs(theirs(out, z, num_steps) - x).max())
    worst = max(worst, apart)
    print(f'| {stage} | {num_steps} | {apart:.1e} |', flush=True)
  sys.exit(worst > TOLERANCE)


if __name__ == '__main__':
  main()
