"""Communication and memory of the compiled training step on several devices: python benchmarks/scaling.py

This checks the program, not its speed: each layout (data x fsdp) is compiled for virtual CPU devices and never run. It
prints tables for base training and for a round of progressive distillation, with a fixed batch (strong scaling) and
with a fixed number of images per device (weak scaling):

  collectives  bytes per update and device, compared with theory: gradients are reduced once, and sharded parameters
               are gathered once per forward and backward pass
  FLOPs        of all devices together, relative to those of one device
  memory       the estimate of `preflight`, compared with what the compiler allocates

--options prints the memory of one layout with each option that saves memory, of programs that are scheduled for it. --project prints the memory of the paper's
ImageNet 64x64 network, and the time that its training would take on accelerators according to vendors' specifications;
see projection.py.
"""

import argparse
import concurrent.futures
import dataclasses
import multiprocessing
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import ml_collections

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import collectives, projection
from benchmarks.measuring import row, table
from configs import cifar10, digits
from diffusion_distillation.run import inputs, preflight
from diffusion_distillation.stages import plan
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system import sharding
from diffusion_distillation.training.step import train_steps

STAGES = {'base': 0, 'round': 1}
LAYOUTS = '1x1,2x1,4x1,8x1,4x2,2x4,1x8'
# The code never runs, so it need not be fast; everything that is counted is decided before LLVM.
_FLAGS = '--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true'
# As for accelerators: ordered for memory, with each gradient reduced by itself and sliced at once, before the optimizer's update.
_FOR_MEMORY = f'{_FLAGS} --xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED --xla_disable_hlo_passes=cpu-all-reduce-combiner,fusion'
_SLACK = 1.05  # ratio of measured to theory above which operations are listed
OPTIONS: dict[str, dict[str, Any]] = {
  'default': {},
  'mesh.fsdp=8': {'fsdp': 8},
  'mesh.fsdp=8, compute.dtype=bfloat16': {'fsdp': 8, 'compute.dtype': 'bfloat16'},
  'compute.dtype=bfloat16': {'compute.dtype': 'bfloat16'},
  'compute.teacher_dtype=bfloat16': {'compute.teacher_dtype': 'bfloat16'},
  'compute.remat=True': {'compute.remat': True},
  'micro_batches=4': {'train.micro_batches': 4, 'distill.micro_batches': 4},
  'all of them': {
    'fsdp': 8,
    'compute.dtype': 'bfloat16',
    'compute.teacher_dtype': 'bfloat16',
    'compute.remat': True,
    'train.micro_batches': 4,
    'distill.micro_batches': 4,
  },
}


def _tiny() -> ml_collections.ConfigDict:
  config = digits.get_config()
  config.model.ch, config.model.emb_ch, config.model.num_groups = 8, 16, 4
  config.model.ch_mult, config.model.attn_resolutions = (1,), ()
  config.train.batch_size = config.distill.batch_size = 16
  return config


def _wide() -> ml_collections.ConfigDict:
  """A network whose parameters take more memory than its activations."""
  config = digits.get_config()
  config.model.ch, config.model.emb_ch, config.model.num_groups = 32, 64, 8
  config.model.attn_resolutions = (4,)
  config.train.batch_size = config.distill.batch_size = 8
  return config


def _cifar10() -> ml_collections.ConfigDict:
  config = cifar10.get_config()
  config.train.batch_size = config.distill.batch_size = 8
  return config


NETWORKS = {  # configs, with the shape of their images and the number of their classes
  'tiny': (_tiny, (8, 8, 1), 10),
  'wide': (_wide, (8, 8, 1), 10),
  'digits': (digits.get_config, (8, 8, 1), 10),
  'cifar10': (_cifar10, (32, 32, 3), 10),
}


@dataclasses.dataclass(frozen=True)
class Case:
  """A training step to be compiled.

  Attributes:
    network: a name in NETWORKS.
    stage: a name in STAGES.
    data, fsdp: the mesh.
    times: factor on the config's batch size.
    changes: config keys and their values.
  """

  network: str
  stage: str
  data: int
  fsdp: int
  times: int = 1
  changes: tuple[tuple[str, Any], ...] = ()

  @property
  def devices(self) -> int:
    """The number of devices of the layout."""
    return self.data * self.fsdp

  @property
  def layout(self) -> str:
    """The layout as it is shown in the tables."""
    return f'{self.data} x {self.fsdp}'

  def plan(self) -> Stage:
    """The stage, with the batch size of this case."""
    get_config, shape, classes = NETWORKS[self.network]
    config = get_config()
    config.update_from_flattened_dict(dict(self.changes))
    stage = plan.plan(config, shape, classes)[STAGES[self.stage]]
    shape = (stage.batch_size * self.times, *stage.recipe.shape[1:])
    return dataclasses.replace(stage, recipe=stage.recipe.replace(shape=shape))


@dataclasses.dataclass(frozen=True)
class Found:
  """Properties of a compiled step; bytes and FLOPs are per device.

  Attributes:
    images: images per batch, over all devices.
    moved: bytes moved by collectives, by kind.
    expected: the same, in theory.
    most: the operations that move most.
    flops: FLOPs of an update.
    batch: bytes of the batch.
    arguments: bytes of the step's arguments, including the batch.
    temporary: bytes of temporary arrays.
    memory: the estimate of `preflight`.
  """

  images: int
  moved: dict[str, int]
  expected: dict[str, int]
  most: list[str]
  flops: float
  batch: int
  arguments: int
  temporary: int
  memory: preflight.Memory


def arguments_of(stage: Stage) -> tuple[Any, ...]:
  """Shapes of the step's arguments, each with its sharding."""
  frozen = jax.eval_shape(lambda teacher: stage.frozen(teacher, None), stage.abstract_teacher)
  batch = inputs.shapes(stage, stage.batch_size)
  batch = jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding.split()), batch
  )
  state = sharding.abstract(stage.abstract_state)
  return stage.recipe, state, sharding.abstract(frozen), batch


def theory(stage: Stage, data: int, fsdp: int) -> dict[str, int]:
  """Bytes of the results of an update's collectives on each device, in theory.

  Gradients are summed over all devices, once per micro-batch: those of replicated parameters by one all-reduce; those
  of sharded parameters by a reduce-scatter along fsdp, which XLA's CPU backend expresses as an all-reduce and a slice,
  and an all-reduce of the shards along data. Sharded parameters are gathered for each call of the teacher, and for the
  student's forward and backward pass (whose first layer does not need them).
  """
  params = stage.abstract_params
  leaves = jax.tree.leaves(params)
  split = sum(
    _bytes(leaf)
    for leaf, layout in zip(leaves, jax.tree.leaves(sharding.of(params)), strict=True)
    if not layout.is_fully_replicated
  )
  whole = sum(map(_bytes, leaves)) - split
  parts = split // fsdp * (data > 1)
  reduced = stage.recipe.micro_batches * ((whole + split + parts) if data * fsdp > 1 else 0)
  gathered = 2 * split
  if stage.parent:
    teacher = jax.eval_shape(lambda params: stage.frozen(params, None), params)['teacher']
    calls = round(stage.recipe.method.calls) - 1
    gathered += calls * split * jax.tree.leaves(teacher)[0].dtype.itemsize // 4
  return {'all-reduce': reduced, 'all-gather': gathered}


def _bytes(leaf: Any) -> int:
  return leaf.size * leaf.dtype.itemsize


def measure(case: Case) -> Found:
  """Compiles a case for the devices there are, which must be those of its layout."""
  with sharding.laid_out(case.data, case.fsdp):
    return _measure(case)


def _measure(case: Case) -> Found:
  stage = case.plan()
  given = arguments_of(stage)
  step: Any = sharding.compile_step(train_steps)
  compiled = step.lower(*given).compile()
  found = collectives.read(compiled.as_text())
  found.sort(key=lambda one: -one.bytes * one.calls)
  memory = compiled.memory_analysis()
  batch = sum(map(_bytes, jax.tree.leaves(given[3]))) // case.devices
  return Found(
    images=stage.batch_size,
    moved=collectives.by_kind(found),
    expected=theory(stage, case.data, case.fsdp),
    most=[f'{one.kind} of {one.bytes:,} bytes x {one.calls}: {one.name[-100:]}' for one in found[:4]],
    flops=float(compiled.cost_analysis()['flops']),
    batch=batch,
    arguments=memory.argument_size_in_bytes,
    temporary=memory.temp_size_in_bytes,
    memory=preflight.memory(stage),
  )


def _begin(devices: int) -> None:
  """Compiles cases; runs in a new process, before jax has initialized its devices."""
  jax.config.update('jax_platforms', 'cpu')
  jax.config.update('jax_enable_compilation_cache', False)  # a cached program does not report its memory
  jax.config.update('jax_num_cpu_devices', devices)


def measure_all(cases: Iterable[Case], flags: str = _FLAGS) -> Iterator[tuple[Case, Found]]:
  """Compiles the cases for each number of devices in a process of its own, one after the other."""
  cases = list(cases)
  os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} {flags}'
  context = multiprocessing.get_context('spawn')
  for devices in dict.fromkeys(case.devices for case in cases):
    with concurrent.futures.ProcessPoolExecutor(
      1, context, initializer=_begin, initargs=(devices,)
    ) as pool:
      for case in cases:
        if case.devices == devices:
          yield case, pool.submit(measure, case).result()


def _over(measured: float, expected: float) -> str:
  return f'{measured / expected:.4f}' if expected else f'{measured:.0f} / 0' if measured else '-'


def scaling(network: str, names: list[str], layouts: list[tuple[int, int]], weak: bool) -> None:
  """Prints the tables of collectives and FLOPs, and of memory."""
  cases = [
    Case(network, name, data, fsdp, data * fsdp if weak else 1)
    for name in names
    for data, fsdp in layouts
  ]
  print(f'\n{"Weak" if weak else "Strong"} scaling of {network}; collectives in bytes per device\n')
  table(
    *('update', 'data x fsdp', 'images', 'all-reduce', '/ theory', 'all-gather', '/ theory', 'others'),
    *('MFLOP per device', 'x devices / one'),
  )
  one: dict[str, float] = {}
  memory, odd = [], []
  for case, found in measure_all(cases):
    one.setdefault(case.stage, found.flops * (1 if weak else case.devices))
    whole = found.flops / one[case.stage] * (1 if weak else case.devices)
    ratios = [_over(found.moved.get(kind, 0), found.expected[kind]) for kind in found.expected]
    moved = [f'{found.moved.get(kind, 0):,}' for kind in found.expected]
    others = sum(found.moved.values()) - sum(found.moved.get(kind, 0) for kind in found.expected)
    row(
      *(case.stage, case.layout, found.images, moved[0], ratios[0], moved[1], ratios[1], others),
      *(f'{found.flops / 1e6:.1f}', f'{whole:.3f}'),
    )
    above = sum(found.moved.values()) > _SLACK * sum(found.expected.values())
    odd += [f'{case.stage} {case.layout}: {text}' for text in found.most if above]
    memory.append((case, found))
  print('\n'.join(odd))
  if not weak:
    print('\nMemory per device, bytes\n')
    table('update', 'data x fsdp', *MEMORY)
    for case, found in memory:
      row(case.stage, case.layout, *of_memory(found))


MEMORY = (
  'arguments: estimate',
  'compiler',
  'ratio',
  'peak: estimate',
  'compiler',
  'ratio',
)


def of_memory(found: Found) -> tuple[str, ...]:
  """The cells of the memory table; arguments exclude the batch."""
  arguments = found.memory.arguments
  temporary = found.memory.total - arguments - found.memory.snapshot  # which is no part of an update
  given = found.arguments - found.batch
  return (
    *(f'{arguments:,}', f'{given:,}', f'{arguments / given:.4f}'),
    *(f'{temporary:,}', f'{found.temporary:,}', f'{temporary / found.temporary:.2f}'),
  )


def options(network: str, names: list[str]) -> None:
  """Prints what each option saves, on 8 devices."""
  cases = {}
  for name in names:
    for caption, changes in OPTIONS.items():
      fsdp = changes.get('fsdp', 1)
      rest = tuple((key, value) for key, value in changes.items() if key != 'fsdp')
      cases[Case(network, name, 8 // fsdp, fsdp, changes=rest)] = caption
  print(f'\n{network} on 8 devices, bytes per device\n')
  table('update', 'option', *MEMORY)
  for case, found in measure_all(cases, _FOR_MEMORY):
    row(case.stage, cases[case], *of_memory(found))


def main() -> None:
  """Parses flags and prints the tables."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--network', choices=list(NETWORKS), default='tiny')
  parser.add_argument('--updates', default='base,round', help='base, round, or both')
  parser.add_argument('--layouts', default=LAYOUTS, help='data x fsdp')
  parser.add_argument('--scaling', default='strong,weak', help='strong, weak, or both')
  parser.add_argument('--options', action='store_true', help='print the memory that each option saves')
  projection.add_flags(parser)
  args = parser.parse_args()
  names = args.updates.split(',')
  if args.project:
    projection.show(args)
  elif args.options:
    options(args.network, names)
  else:
    layouts = [tuple(map(int, layout.split('x'))) for layout in args.layouts.split(',')]
    for kind in args.scaling.split(','):
      scaling(args.network, names, layouts, kind == 'weak')  # type: ignore[arg-type]


if __name__ == '__main__':
  main()
