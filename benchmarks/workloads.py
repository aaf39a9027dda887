"""The work of a case, ready to be timed, and its measurements."""

import dataclasses
import os
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from clu import parameter_overview

from benchmarks import measuring, projection
from benchmarks.cases import Case
from diffusion_distillation.diffusion import times
from diffusion_distillation.evaluation import measure as evaluation
from diffusion_distillation.networks import conditioning
from diffusion_distillation.run.inputs import stand_in
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system import sharding
from diffusion_distillation.training.step import train_steps

# Sizes of square matrices: large ones are slow on a CPU, and small ones do not saturate an accelerator.
_WIDTHS = {'cpu': (512, 1024, 2048), 'other': (4096, 8192, 16384)}


@dataclasses.dataclass(frozen=True)
class Prepared:
  """Work that has been compiled and has run once.

  Attributes:
    run: makes one update or draws one batch; it may return before the device is done.
    wait: returns when the device is done.
    compile_seconds: time for tracing, lowering and compiling.
    planned: bytes of arguments and temporary arrays per device according to the compiler; None where that is not
      available.
  """

  run: Callable[[], None]
  wait: Callable[[], None]
  compile_seconds: float
  planned: int | None


def prepare(case: Case) -> Prepared:
  """Compiles the work of a case for all devices and runs it once."""
  stage = case.stage()
  return _prepare_sampling(case, stage) if case.work == 'sampling' else _prepare_updates(stage)


def _prepare_updates(stage: Stage) -> Prepared:
  """Each call of `run` makes one update, or one of each kind if the method has several."""
  params, teacher = random_params(stage.abstract_params), None
  if stage.teacher is not None:
    teacher = random_params(stage.abstract_teacher)
  state = sharding.create(stage.recipe.create_state, params, teacher)
  frozen = sharding.place(stage.frozen(teacher, None))
  batch = sharding.spread(stand_in(stage))
  recipes = [stage.recipe.at(k) for k in range(stage.recipe.method.period)]
  step: Any = sharding.compile_step(train_steps)
  began = time.perf_counter()
  programs = [step.lower(recipe, state, frozen, batch).compile() for recipe in recipes]
  compile_seconds = time.perf_counter() - began
  plans = [program.memory_analysis() for program in programs]
  planned = max(one.argument_size_in_bytes + one.temp_size_in_bytes for one in plans)

  def run() -> None:
    nonlocal state
    for recipe, program in zip(recipes, programs, strict=True):
      state, _ = program(recipe, state, frozen, batch)
      sharding.wait_on_cpu(state)

  def wait() -> None:
    jax.block_until_ready(state)

  run()
  wait()
  return Prepared(run, wait, compile_seconds, planned)


def _prepare_sampling(case: Case, stage: Stage) -> Prepared:
  """Each call of `run` draws a batch and copies it to the host."""
  drawer = evaluation.drawer(case.config(), stage, 'ddim')
  params = sharding.replicate(random_params(stage.abstract_params))
  grid = times.uniform(case.calls)

  def run() -> None:
    drawer.draw(params, grid, case.batch_size, 0)

  def seconds() -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began

  first = seconds()
  return Prepared(run, lambda: None, max(0.0, first - seconds()), None)


def random_params(shapes: Any) -> Any:
  """Parameters with these shapes, on the host, all nonzero: zeros may take less energy or time."""
  rng = np.random.default_rng(0)

  def draw(leaf: Any) -> np.ndarray:
    noise = rng.standard_normal(leaf.shape, np.float32)
    if len(leaf.shape) == 1:
      return 0.1 * noise + 1.0
    return noise / np.float32(np.sqrt(np.prod(leaf.shape[:-1])))

  return jax.tree.map(draw, shapes)


def num_parameters(stage: Stage) -> int:
  """Number of parameters of the stage's network."""
  return int(parameter_overview.count_parameters(stage.abstract_params))


def begin_counting_flops(case: Case) -> Callable[[], float]:
  """Starts counting the FLOPs of an update or of drawing a batch, in the lowered program, before compiler optimizations.

  jax only counts them on a CPU. If this process has other devices, a separate process does it, and the returned function
  waits for that.
  """
  if jax.default_backend() == 'cpu':
    flops = _lowered_flops(case)
    return lambda: flops
  script = str(pathlib.Path(__file__).with_name('step.py'))
  environment = os.environ | {'JAX_PLATFORMS': 'cpu'}
  command = [sys.executable, script, f'--flops={case.to_json()}']
  process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
  return lambda: float(process.communicate()[0])


def count_flops(case: Case) -> float:
  """The result of `begin_counting_flops`."""
  return begin_counting_flops(case)()


def describe(case: Case) -> dict[str, Any]:
  """The work of a case ('base', 'round' or 'sampling') as the fields of `rival_torch_work.Spec`.

  Raises:
    ValueError: PyTorch's side does not implement the network.
  """
  stage = case.stage()
  recipe, network, method = stage.recipe, stage.recipe.student.network, stage.recipe.method
  if network.time_input != 'inv_cos' or not network.resblock_resample:
    raise ValueError(
      f"{case.network}: PyTorch's side only has time_input=inv_cos, resblock_resample=True"
    )
  names = ('out_ch', 'ch', 'emb_ch', 'ch_mult', 'num_res_blocks', 'attn_resolutions', 'num_heads')
  names += ('head_dim', 'num_groups', 'dropout', 'num_classes')
  optimizer = ('b1', 'b2', 'eps', 'weight_decay', 'clip_norm')
  side, _, channels = recipe.shape[1:]
  return {
    'work': case.work,
    'dtype': case.dtype,
    'batch': case.batch_size,
    'image_shape': stage.image_shape,
    'output': recipe.student.output,
    'network': {name: getattr(network, name) for name in names} | {'side': side, 'in_ch': channels},
    'num_parameters': num_parameters(stage),
    'logsnr_min': stage.schedule.logsnr_min,
    'logsnr_max': stage.schedule.logsnr_max,
    'num_steps': method.num_steps if case.work == 'round' else case.calls,
    'learning_rate': recipe.learning_rate['student'].peak,
    **{name: getattr(recipe.optimizer, name) for name in optimizer},
    'ema_decay': recipe.ema_decay,
    'random_flip': recipe.random_flip,
  }


def _lowered_flops(case: Case) -> float:
  stage = case.stage()
  if case.work != 'sampling':
    return projection.lowered_flops(stage, case.batch_size)
  size = case.batch_size
  z = jax.ShapeDtypeStruct((size, *stage.recipe.shape[1:]), np.float32)
  logsnr = jax.ShapeDtypeStruct((size,), np.float32)
  cond = conditioning.zeros(stage.denoise.conditioning, size)
  call = jax.jit(lambda *args: stage.denoise(*args).x)
  cost: Any = call.lower(stage.abstract_params, z, logsnr, cond).cost_analysis()
  return case.calls * float(cost['flops'])


def peak_flops(dtype: str, seconds: float = 2.0) -> float:
  """FLOP/s of the fastest matrix product among several sizes, over all devices.

  Args:
    dtype: type of the matrices and of the product.
    seconds: approximate time per size; sizes that would take longer are left out.
  """
  count, best = jax.device_count(), 0.0
  backend = jax.default_backend()
  product = jax.jit(lambda a, b: a @ b)
  for width in _WIDTHS['cpu' if backend == 'cpu' else 'other']:
    flops = 2.0 * count * width**3
    if best and flops / best > seconds:
      break
    rng = np.random.default_rng(0)
    a = sharding.spread(rng.standard_normal((count * width, width), np.float32).astype(jnp.dtype(dtype)))
    b = sharding.replicate(rng.standard_normal((width, width), np.float32).astype(jnp.dtype(dtype)))
    last = [product(a, b)]

    def run(a: jax.Array = a, b: jax.Array = b, last: list[jax.Array] = last) -> None:
      last[0] = product(a, b)
      sharding.wait_on_cpu(last[0])

    def wait(last: list[jax.Array] = last) -> None:
      jax.block_until_ready(last[0])

    wait()
    best = max(best, flops / min(measuring.repeat(run, wait, seconds)))
  return best


def peak_memory() -> int:
  """Peak memory in bytes: of this process on a CPU, otherwise the largest of any device."""
  stats = [device.memory_stats() or {} for device in jax.local_devices()]
  on_devices = [one['peak_bytes_in_use'] for one in stats if 'peak_bytes_in_use' in one]
  return max(on_devices) if on_devices else measuring.peak_memory()


@dataclasses.dataclass(frozen=True)
class Row:
  """The measurements of a case.

  Attributes:
    case: the case.
    backend, devices: jax's backend, and the number of devices.
    parameters: number of parameters of the network.
    batch: examples per update, or images per batch.
    seconds: seconds per update, or per batch that is drawn.
    repeats: number of measurements.
    flops: FLOPs of an update or of a batch; see `count_flops`.
    peak: measured FLOP/s of matrix products; see `peak_flops`.
    memory: bytes; see `peak_memory`.
    planned: bytes; see `Prepared`.
    compile_seconds: see `Prepared`.
  """

  case: Case
  backend: str
  devices: int
  parameters: int
  batch: int
  seconds: measuring.Spread
  repeats: int
  flops: float
  peak: float
  memory: int
  planned: int | None
  compile_seconds: float

  @property
  def share(self) -> float:
    """Fraction of the measured peak FLOP/s."""
    return self.flops / self.seconds.median / self.peak

  def to_dict(self) -> dict[str, Any]:
    """The row as a dict for JSON."""
    return dataclasses.asdict(self) | {'seconds': self.seconds._asdict(), 'share': self.share}

  @classmethod
  def from_dict(cls, found: dict[str, Any]) -> 'Row':
    """The inverse of `to_dict`."""
    rest = {key: value for key, value in found.items() if key != 'share'}
    rest |= {'case': Case(**rest['case']), 'seconds': measuring.Spread(**rest['seconds'])}
    return cls(**rest)


def measure(case: Case, seconds: float) -> Row:
  """Measures a case in this process.

  Args:
    case: the case.
    seconds: approximate time of the measurement, in addition to compilation and the measurement of the peak.
  """
  flops = begin_counting_flops(case)
  prepared = prepare(case)
  measuring.forget_peak_memory()
  found = measuring.repeat(prepared.run, prepared.wait, seconds)
  memory = peak_memory()
  return Row(
    case=case,
    backend=jax.default_backend(),
    devices=jax.device_count(),
    parameters=num_parameters(case.stage()),
    batch=case.batch_size,
    seconds=measuring.spread(found),
    repeats=len(found),
    flops=flops(),
    peak=peak_flops(case.dtype, min(2.0, seconds)),
    memory=memory,
    planned=prepared.planned,
    compile_seconds=prepared.compile_seconds,
  )
