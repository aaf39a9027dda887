"""Models of diffusers and of this package, distilled and exported, and loaded in diffusers: do both draw the same images?

  python -m benchmarks.diffusers_round_trip --workdir=DIR

Needs diffusers and torch beside this package. There are three runs on the digits, each of a base with two rounds and DMD for a
few updates: of a pipeline that diffusers makes, with random weights; of the U-Net of the papers; and of the same U-Net with
classes. Each stage is exported as a pipeline. From the same noise, DDIMScheduler steps through the loaded pipeline, and this
package through its own model; the largest difference of x, whose values lie in [-1, 1], is printed for each.
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


# Large enough steps for a few updates to leave no parameter zero, as the last layers are at first.
UNET = {
  'model.ch': 32,
  'model.emb_ch': 64,
  'model.num_groups': 8,
  'train.num_updates': 50,
  'train.batch_size': 32,
  'train.warmup': 0,
  'train.ema_decay': '(0.5,)',
}
RUNS = {
  'from diffusers': {},
  'unet': UNET,
  'unet, classes': UNET | {'model.conditional': True},
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


def ours(folder: pathlib.Path) -> tuple[np.ndarray, np.ndarray | None, np.ndarray, int]:
  """Noise (n, H, W, C), labels (n,), x (n, H, W, C) of a stage's model, and its number of steps."""
  model = diffusion_distillation.load(folder)
  stored = model.stored
  drawer = model.drawer(samplers.SAMPLERS[stored.sampler](), stored.clip_x, NUM_IMAGES)
  grid = times.make_grid(stored.times, stored.num_steps, stored.schedule)
  index = np.arange(NUM_IMAGES, dtype=np.int32)
  z, keys = sampling.noise(drawer, jnp.int32(SEED), jnp.asarray(index))
  cond = drawer.cond(index, SEED)
  x = sampling.from_noise(drawer, stored.params, jnp.asarray(grid), z, keys, cond)
  labels = None if cond is None else np.array(cond['label'])
  return np.asarray(z), labels, np.asarray(x), stored.num_steps


def theirs(folder: pathlib.Path, z: np.ndarray, labels: np.ndarray | None, num_steps: int) -> np.ndarray:
  """x (n, H, W, C) as DDIMScheduler and the loaded network draw it from noise `z`, with these labels."""
  pipeline = diffusers.DDIMPipeline.from_pretrained(folder)
  pipeline.scheduler.set_timesteps(num_steps)
  x = torch.from_numpy(np.array(z.transpose(0, 3, 1, 2)))
  classes = None if labels is None else torch.from_numpy(labels).long()
  clips = pipeline.scheduler.config.clip_sample
  with torch.no_grad():
    for timestep in pipeline.scheduler.timesteps:
      output = pipeline.unet(x, timestep, classes).sample
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
  worst, rows = 0.0, ['| model | stage | steps | largest difference of x |\n|---|---|---|---|']
  for name, settings in RUNS.items():
    workdir = root / name.replace(', ', '_').replace(' ', '_')
    values = SETTINGS | settings
    flags = ['--config=configs/digits_methods.py', *(f'--config.{k}={v}' for k, v in values.items())]
    if not settings:
      run(workdir, *flags, '--mode=import', '--source=diffusers', f'--checkpoint={root / "pipeline"}')
    run(workdir, *flags)
    for stage in STAGES:
      out = root / 'exported' / workdir.name / stage
      run(workdir, '--mode=export', f'--stage={stage}', f'--out={out}', '--format=diffusers')
      z, labels, x, num_steps = ours(workdir / stage)
      apart = float(np.abs(theirs(out, z, labels, num_steps) - x).max())
      worst = max(worst, apart)
      rows.append(f'| {name} | {stage} | {num_steps} | {apart:.1e} |')
  print('\n'.join(rows))
  sys.exit(worst > TOLERANCE)


if __name__ == '__main__':
  main()
