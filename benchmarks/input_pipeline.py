"""Throughput of every kind of image source, compared with what training consumes: python benchmarks/input_pipeline.py

First table: images per second in batches of 128, with threads, with worker processes, and from memory; each also
relative to the consumption of one GPU that sustains --tflops on a training step of the paper's network for that size
(from the FLOPs of the lowered step, with batch size and dropout as in configs/). Second table: training the digits
network at 32x32 on this machine; the fraction of a step's time that disappears if every step uses the same batch. Third
table: a folder of --files PNG files (links to a few thousand); the time until its first batch, and the memory of this
process after increasing numbers of batches.
"""

import argparse
import contextlib
import itertools
import math
import os
import pathlib
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import jax
import psutil

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import image_files
from configs import cifar10, digits, imagenet64
from diffusion_distillation import datasets
from diffusion_distillation.config import Config
from diffusion_distillation.datasets import loading, preparing
from diffusion_distillation.networks import conditioning
from diffusion_distillation.run import inputs
from diffusion_distillation.stages import plan
from diffusion_distillation.system import sharding
from diffusion_distillation.training import step as update

BATCH = 128
PAPER = {32: ('cifar10', cifar10.get_config), 64: ('imagenet64', imagenet64.get_config)}


def flops_per_image(config: Config) -> float:
  """FLOPs per image of an update of base training, counted in the lowered step; nothing is compiled."""
  described = datasets.describe(datasets.Settings.of(config.dataset))
  base = plan.plan(config, *described)[0]
  recipe = base.recipe.replace(shape=(8, *base.recipe.shape[1:]))
  batch = inputs.shapes(base, 8)
  lowered = jax.jit(update.train_step).lower(recipe, base.abstract_state, {}, batch)
  cost = lowered.cost_analysis()
  return float(cost['flops']) / 8


def images_per_second(loader: loading.Loader, seconds: float) -> float:
  """Images per second in shuffled batches, after the first few."""
  with contextlib.closing(loader.shuffled(0, BATCH, 0, sys.maxsize)) as batches:
    for _ in range(4):
      next(batches)
    began = time.perf_counter()
    for count in itertools.count(1):
      next(batches)
      took = time.perf_counter() - began
      if took > seconds:
        return count * BATCH / took
  raise AssertionError


def rates(root: pathlib.Path, image_size: int, args: argparse.Namespace) -> None:
  """Prints the first table for one image size."""
  name, get_config = PAPER[image_size]
  flops = flops_per_image(get_config())
  consumed = args.tflops * 1e12 / flops
  print(
    f'\n{image_size}x{image_size}: an update of configs/{name}.py takes {flops / 1e9:.0f} GFLOP per image; '
    f'{args.tflops} TFLOP/s consume {consumed:.0f} images per second'
  )
  ways = [('threads', 0, 0.0), (f'{args.workers} workers', args.workers, 0.0), ('memory', 0, 1e3)]
  print(f'{"source":<36}' + ''.join(f'{way:>12}{"ratio":>8}' for way, _, _ in ways))
  for caption, settings in image_files.write(root, args.images, image_size).items():
    if settings.prepared:
      preparing.prepare(settings, args.workers)
    images, line = datasets.open_split(settings, 'train'), f'{caption:<36}'
    for _, workers, in_memory_gb in ways:
      with contextlib.closing(loading.Loader(images, in_memory_gb, workers)) as loader:
        rate = images_per_second(loader, args.seconds)
      line += f'{rate:12.0f}{rate / consumed:8.1f}'
    print(line, flush=True)


def waits(root: pathlib.Path, args: argparse.Namespace) -> None:
  """Prints the second table."""
  config = digits.get_config()
  config.model.attn_resolutions = ()
  settings = image_files.write(root, args.images, 32)
  base = plan.plan(config, (32, 32, 3), 6)[0]
  step = sharding.compile_step(update.train_steps)
  params = base.init_params(jax.random.key(0))
  count = math.ceil(args.seconds * 2)

  def given(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a loader's batch that the step receives."""
    return {
      'image': batch['image'],
      'cond': conditioning.select(base.recipe.conditioning, batch['cond']),
    }

  def seconds(batches: object) -> float:
    """Seconds per update."""
    state = sharding.replicate(base.recipe.create_state(params))
    taken = sharding.ahead(map(given, batches))  # type: ignore[call-overload]
    for _ in range(2):
      state, _ = step(base.recipe, state, {}, next(taken))
    jax.block_until_ready(state)
    began = time.perf_counter()
    for batch in itertools.islice(taken, count):
      state, _ = step(base.recipe, state, {}, batch)
    jax.block_until_ready(state)
    return (time.perf_counter() - began) / count

  print(
    f'\nTraining the digits network at 32x32 on {os.cpu_count()} cores, batches of {base.batch_size}:'
  )
  print(f'{"source":<44}{"ms per step":>12}{"same batch":>12}{"waiting":>18}')
  ways = [('memory', 0, 1e3), ('threads', 0, 0.0), (f'{args.workers} workers', args.workers, 0.0)]
  for caption, (way, workers, in_memory_gb) in itertools.product(settings, ways):
    if not caption.startswith(('folder of JPEG', 'prepared')):
      continue
    images = datasets.open_split(settings[caption], 'train')
    loader = loading.Loader(images, in_memory_gb, workers)
    batches = loader.shuffled(0, base.batch_size, 0, sys.maxsize)
    with contextlib.closing(loader), contextlib.closing(batches):
      first = next(batches)
      took = seconds(batches)
    alone = seconds(itertools.repeat(first))
    share = max(0.0, 1.0 - alone / took)
    print(f'{f"{caption}, {way}":<44}{1000 * took:12.0f}{1000 * alone:12.0f}{share:18.0%}', flush=True)


def large_folder(root: pathlib.Path, args: argparse.Namespace) -> None:
  """Prints the third table."""
  few = sorted((root / 'png32').rglob('*.png'))
  for k in range(args.files):
    path = root / 'large' / few[k % len(few)].parent.name / f'{k:07d}.png'
    path.parent.mkdir(parents=True, exist_ok=True)
    os.link(few[k % len(few)], path)
  settings = datasets.Settings('folder', str(root / 'large'), '', '', '', 32, None, 'area')
  process = psutil.Process()
  began = time.perf_counter()
  images = datasets.open_split(settings, 'train')
  opened = time.perf_counter() - began
  loader = loading.Loader(images, 0.0, args.workers)
  with (
    contextlib.closing(loader),
    contextlib.closing(loader.shuffled(0, BATCH, 0, sys.maxsize)) as batches,
  ):
    next(batches)
    first = time.perf_counter() - began
    print(f'\n{args.files} files: listed in {opened:.1f} s, first batch after {first:.1f} s')
    for done in range(1, 4001):
      next(batches)
      if done in (100, 1000, 2000, 4000):
        mine, *others = (p.memory_info().rss / 2**20 for p in (process, *process.children()))
        print(
          f'after {done} batches: {mine:.0f} MiB, its workers {max(others):.0f} MiB each at most',
          flush=True,
        )


def main() -> None:
  """Parses flags and prints the tables."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--images', type=int, default=4096, help='number of images in each source')
  parser.add_argument('--files', type=int, default=100_000, help='number of files in the large folder')
  parser.add_argument('--workers', type=int, default=2, help='number of worker processes')
  parser.add_argument(
    '--seconds', type=float, default=4.0, help='approximate duration of each measurement'
  )
  parser.add_argument('--tflops', type=float, default=200.0, help='sustained TFLOP/s of the GPU')
  args = parser.parse_args()
  print(f'{os.cpu_count()} cores, {args.images} images, batches of {BATCH}')
  with tempfile.TemporaryDirectory() as directory:
    for image_size in PAPER:
      rates(pathlib.Path(directory), image_size, args)
    waits(pathlib.Path(directory), args)
    large_folder(pathlib.Path(directory), args)


if __name__ == '__main__':
  main()
