"""Training the paper's ImageNet 64x64 network on accelerators: python benchmarks/scaling.py --project

This is arithmetic, not a measurement. FLOPs of an update are counted in the lowered step, bytes come from shapes, and
the speed of a chip is its vendor's specification times an assumed utilization (--mfu).
"""

import argparse
import dataclasses
import math
from typing import Any

import jax

from configs import imagenet64
from diffusion_distillation.run import inputs, preflight
from diffusion_distillation.stages import plan as stages
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.training.step import train_step

SHAPE, CLASSES = (64, 64, 3), 1000
COUNTS = (8, 32, 64, 256)
_DAY = 86_400.0
# Number of times that the optimizer reads or writes an array of the parameters' size: parameters, gradient, both moments
# and the average are read; all except the gradient are written.
_PASSES = 9


@dataclasses.dataclass(frozen=True)
class Chip:
  """A vendor's specification of one chip.

  Attributes:
    flops: FLOP/s, bfloat16, dense.
    memory: bytes.
    bandwidth: memory bandwidth in bytes per second.
    ring: bytes per second that a chip sends in a ring of at most `few` chips.
    few: largest number of chips for `ring`.
    far: bytes per second that a chip sends in a larger ring.
  """

  flops: float
  memory: float
  bandwidth: float
  ring: float
  few: float = math.inf
  far: float = 0.0


# TPU: cloud.google.com/tpu/docs/v4, v5e, v5p, v6e. A bidirectional ring uses two of a chip's links (v5e: 4 links with a
# total of 400 GB/s, v5p: 6 with 1200, v6e: 4 with 800, counting both directions). The page of v4 does not give this: 6
# links of 50 GB/s per direction, from Table 4 of Jouppi et al. 2023, arXiv:2304.01433.
# GPU: NVIDIA's data sheets of the A100 (SXM, 80 GB) and the H100 (SXM), halved where they assume sparsity; NVLink's 600
# and 900 GB/s count both directions. Beyond the 8 GPUs of a node, one network port per GPU as in the DGX systems: 200 and
# 400 Gbit/s.
CHIPS = {
  'TPU v4': Chip(275e12, 32 * 2**30, 1200e9, 2 * 50e9),
  'TPU v5e': Chip(197e12, 16e9, 819e9, 2 * 50e9),
  'TPU v5p': Chip(459e12, 95e9, 2765e9, 2 * 100e9),
  'TPU v6e': Chip(918e12, 32e9, 1638e9, 2 * 100e9),
  'A100': Chip(312e12, 80e9, 2039e9, 300e9, 8, 25e9),
  'H100': Chip(989e12, 80e9, 3350e9, 450e9, 8, 50e9),
}


@dataclasses.dataclass(frozen=True)
class Update:
  """One update of a stage, from shapes.

  Attributes:
    images: images per batch, over all chips.
    flops: FLOPs per image.
    gradients: bytes that are all-reduced.
    kept: bytes per chip that do not depend on the batch: parameters, moments, teacher, gradients.
    activations: bytes per image.
  """

  images: int
  flops: float
  gradients: float
  kept: float
  activations: float


def ring_seconds(size: float, chips: int, bandwidth: float) -> float:
  """Seconds of an all-reduce of `size` bytes, of which each chip sends 2 (n - 1) / n."""
  return 2 * (chips - 1) / chips * size / bandwidth


def micro_batches(update: Update, chip: Chip, chips: int, share: float = 0.9) -> int:
  """The smallest power of two with which an update fits into the usable memory of a chip; 0 if there is none."""
  images = update.images // chips
  count = 1
  while update.kept + math.ceil(images / count) * update.activations > share * chip.memory:
    count *= 2
    if count > images:
      return 0
  return count


def seconds(update: Update, chip: Chip, chips: int, mfu: float) -> tuple[float, float]:
  """Seconds of an update: for computing, and for all-reducing the gradients once per micro-batch.

  The optimizer takes the same time on every chip, because it is limited by memory bandwidth.
  """
  computing = update.images * update.flops / (chips * chip.flops * mfu)
  computing += _PASSES * update.gradients / chip.bandwidth
  bandwidth = chip.ring if chips <= chip.few else chip.far
  count = micro_batches(update, chip, chips)
  return computing, count * ring_seconds(update.gradients, chips, bandwidth)


def add_flags(parser: argparse.ArgumentParser) -> None:
  """Adds the flags of the projection."""
  parser.add_argument('--project', action='store_true', help='print memory and time on accelerators')
  parser.add_argument('--mfu', type=float, default=0.4, help='assumed fraction of peak FLOP/s')


def lowered_flops(stage: Stage, images: int) -> float:
  """FLOPs of an update with this number of images, counted in the lowered step; nothing is compiled."""
  frozen = jax.eval_shape(lambda teacher: stage.frozen(teacher, None), stage.abstract_teacher)
  recipe = stage.recipe.replace(shape=(images, *stage.recipe.shape[1:]))
  batch = inputs.shapes(stage, images)
  lowered = jax.jit(train_step).lower(recipe, stage.abstract_state, frozen, batch)
  cost: Any = lowered.cost_analysis()
  return float(cost['flops'])


def count_flops(stage: Stage) -> float:
  """FLOPs per image, without those that do not depend on the batch."""
  few, more = 2, 4
  return (lowered_flops(stage, more) - lowered_flops(stage, few)) / (more - few)


def of_stage(stage: Stage, flops: float) -> Update:
  """The requirements of an update, with all parameters on every chip."""
  needs = preflight.memory(stage)
  params = sum(leaf.size for leaf in jax.tree.leaves(stage.abstract_params))
  return Update(
    images=stage.batch_size,
    flops=flops,
    gradients=4.0 * params,
    kept=needs.arguments + needs.gradients,
    activations=needs.activations / stage.batch_size,
  )


def plan(**changes: Any) -> list[Stage]:
  """The stages of the paper's config, with changes to its section `compute`."""
  config = imagenet64.get_config()
  config.compute.update(changes)
  return stages.plan(config, SHAPE, CLASSES)


def show_memory() -> None:
  """Prints the memory of the network on a device that holds all parameters."""
  print('\nMemory of configs/imagenet64.py per device, with all parameters on every device, GB\n')
  print(
    '| update | option | parameters, averages, moments, teacher | gradients | activations per image |'
  )
  print('| --- | --- | --- | --- | --- |')
  choices: list[dict[str, Any]] = [
    {},
    {'remat': True},
    {'dtype': 'bfloat16', 'teacher_dtype': 'bfloat16'},
    {'dtype': 'bfloat16', 'teacher_dtype': 'bfloat16', 'remat': True},
  ]
  for changes in choices:
    told = ', '.join(f'{key}={value}' for key, value in changes.items()) or 'default'
    for name, stage in zip(('base', 'round'), plan(**changes), strict=False):
      needs = preflight.memory(stage)
      image = needs.activations / stage.batch_size
      cells = (needs.arguments / 1e9, needs.gradients / 1e9, image / 1e9)
      print(f'| {name} | {told} | ' + ' | '.join(f'{cell:.3f}' for cell in cells) + ' |', flush=True)


def show(args: argparse.Namespace) -> None:
  """Prints the tables and their assumptions."""
  jax.config.update('jax_platforms', 'cpu')
  show_memory()
  planned = plan(dtype='bfloat16', teacher_dtype='bfloat16')
  base, first = planned[0], planned[1]
  updates = {stage.name: of_stage(stage, count_flops(stage)) for stage in (base, first)}
  counts = (base.num_updates, sum(stage.num_updates for stage in planned[1:]))
  of_base, of_round = updates[base.name], updates[first.name]
  print(
    f'\nconfigs/imagenet64.py: {of_base.gradients / 4e6:.0f} million parameters; base training '
    f'{counts[0]:,} updates of {of_base.images} images, {of_base.flops / 1e9:.0f} GFLOP each; '
    f'{len(planned) - 1} rounds {counts[1]:,} updates, {of_round.flops / 1e9:.0f} GFLOP per image'
  )
  print(
    f'Assumptions: {args.mfu:.0%} of the peak; compute.dtype and compute.teacher_dtype=bfloat16, no remat; '
    'the fewest\nmicro-batches that fit into 90 % of the memory; float32 gradients, one ring '
    'all-reduce per micro-batch; the optimizer\nruns at full memory bandwidth; data and evaluation cost '
    'nothing. Ranges: computation and all-reduce\noverlap fully, or not at all.\n'
  )
  of = 'micro-batches | ms: computation + all-reduce | images/s | days'
  print(f'| chip | chips | base: {of} | rounds: {of} |')
  print('| ' + ' | '.join(['---'] * 10) + ' |')
  for name, chip in CHIPS.items():
    for chips in COUNTS:
      cells = []
      for update, count in zip((of_base, of_round), counts, strict=True):
        cells += _cells(update, chip, chips, args.mfu, count)
      print(f'| {name} | {chips} | ' + ' | '.join(cells) + ' |', flush=True)


def _cells(update: Update, chip: Chip, chips: int, mfu: float, count: int) -> list[str]:
  """The cells of a stage with `count` updates."""
  parts = micro_batches(update, chip, chips)
  if not parts:
    return ['does not fit', *['-'] * 3]
  computing, adding = seconds(update, chip, chips, mfu)
  least, most = max(computing, adding), computing + adding
  return [
    str(parts),
    f'{1e3 * computing:.0f} + {1e3 * adding:.0f}',
    f'{update.images / most:,.0f} - {update.images / least:,.0f}',
    f'{least * count / _DAY:.1f} - {most * count / _DAY:.1f}',
  ]
