"""Speed of single convolutions and their gradients: python benchmarks/convolutions.py

The shapes are those of 3x3 convolutions in the networks that `benchmarks/rival.py` compares as a whole. With PyTorch installed, its
convolutions run beside ours; the two alternate in turns, and the reported ratio is computed turn by turn.
"""

import argparse
import importlib.util
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import measuring

_COLUMNS = (
  *('batch', 'channels', 'what', 'GFLOP', 'ms ours (quartiles)', 'ms PyTorch (quartiles)'),
  'PyTorch / ours, turn by turn (quartiles)',
)
KINDS = ('forward', 'input gradient', 'kernel gradient')


class Shape(NamedTuple):
  """A 3x3 convolution of (batch, size, size, inputs) to (batch, size, size, outputs)."""

  batch: int
  size: int
  inputs: int
  outputs: int

  @property
  def flops(self) -> int:
    """Operations of the convolution, and of each gradient."""
    return 2 * 9 * self.batch * self.size**2 * self.inputs * self.outputs


SHAPES = {
  'digits': (Shape(64, 8, 32, 32), Shape(64, 8, 96, 32), Shape(64, 4, 64, 64)),
  'cifar10-small': (Shape(16, 32, 64, 64), Shape(16, 32, 128, 64)),
}
Call = tuple[
  Callable[[], Any], Callable[[], Any]
]  # starts the computation; waits for it and returns the result


def _arrays(shape: Shape) -> tuple[Any, Any, Any]:
  """Random images, kernel and gradient of the result: NHWC, HWIO, NHWC."""
  import numpy as np

  rng, size = np.random.default_rng(0), (shape.batch, shape.size, shape.size)
  shapes = ((*size, shape.inputs), (3, 3, shape.inputs, shape.outputs), (*size, shape.outputs))
  images, kernel, gradient = (rng.standard_normal(each, np.float32) for each in shapes)
  return images, kernel, gradient


def ours(shape: Shape, kind: str) -> Call:
  """The convolution or a gradient as the networks compile it."""
  import jax
  import jax.numpy as jnp

  from diffusion_distillation.system import compilation

  def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
      x, kernel, (1, 1), 'SAME', dimension_numbers=('NHWC', 'HWIO', 'NHWC')
    )

  def compute(x: jax.Array, kernel: jax.Array, gradient: jax.Array) -> jax.Array:
    if kind == 'forward':
      return convolve(x, kernel)
    if kind == 'input gradient':
      return jax.vjp(lambda x: convolve(x, kernel), x)[1](gradient)[0]
    return jax.vjp(lambda kernel: convolve(x, kernel), kernel)[1](gradient)[0]

  compiled = jax.jit(compute, compiler_options=compilation.options())
  given, made = [jnp.asarray(each) for each in _arrays(shape)], []

  def run() -> None:
    made[:] = [compiled(*given)]

  return run, lambda: made[0].block_until_ready()


def theirs(shape: Shape, kind: str) -> Call:
  """The same in PyTorch, with channels last."""
  import torch

  def channels_last(array: Any, order: tuple[int, ...]) -> Any:
    return torch.from_numpy(array).permute(order).contiguous(memory_format=torch.channels_last)

  images, kernel, gradient = _arrays(shape)
  x, dy = (channels_last(array, (0, 3, 1, 2)) for array in (images, gradient))
  w, made = channels_last(kernel, (3, 2, 0, 1)), []
  wanted = [kind == each for each in ('input gradient', 'kernel gradient')]
  back = torch.ops.aten.convolution_backward

  def run() -> None:
    if kind == 'forward':
      made[:] = [torch.nn.functional.conv2d(x, w, padding=1)]
    else:
      found = back(dy, x, w, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1, [*wanted, False])
      made[:] = [each for each in found if each is not None]

  def wait() -> Any:
    return made[0].permute((2, 3, 1, 0) if kind == 'kernel gradient' else (0, 2, 3, 1))

  return run, wait


def compare(shape: Shape, kind: str, turns: int, seconds: float) -> tuple[str, ...]:
  """Measures both sides, or ours alone; returns the cells of a row, in the order of _COLUMNS.

  Raises:
    AssertionError: the results differ by more than rounding.
  """
  import numpy as np

  sides = [ours(shape, kind)]
  if importlib.util.find_spec('torch'):
    sides.append(theirs(shape, kind))
  results = []
  for run, wait in sides:
    run()
    results.append(np.asarray(wait()))
  apart = np.abs(results[0] - results[-1]).max() / np.abs(results[0]).max()
  assert apart < 1e-5, f'the results of the {kind} differ by {apart:.1e}'
  found = [
    [measuring.spread(measuring.repeat(*side, seconds)).median for side in sides] for _ in range(turns)
  ]
  times = [measuring.spread(column).scaled(1e3) for column in zip(*found, strict=True)]
  ratio = measuring.spread([turn[-1] / turn[0] for turn in found])
  theirs_and_ratio = (f'{times[1]:.3g}', f'{ratio:.2f}') if len(sides) > 1 else ('', '')
  size = f'{shape.batch}x{shape.size}x{shape.size}'
  channels = f'{shape.inputs} to {shape.outputs}'
  return (size, channels, kind, f'{shape.flops / 1e9:.3g}', f'{times[0]:.3g}', *theirs_and_ratio)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  """Parses the flags."""
  parser = measuring.Parser(description=__doc__.splitlines()[0])
  networks = measuring.some_of('network', SHAPES)
  parser.add_argument('--network', type=networks, default=list(SHAPES), help=', '.join(SHAPES))
  parser.add_argument('--turns', type=measuring.at_least(1), default=7, help='number of turns per side')
  parser.add_argument('--seconds', type=measuring.duration, default=0.5, help='seconds per turn')
  return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
  """Parses the flags and prints the table."""
  args = parse(argv)
  if not importlib.util.find_spec('torch'):
    print('PyTorch is not installed: pip install torch', file=sys.stderr)
  measuring.table(*_COLUMNS)
  for network in args.network:
    for shape in SHAPES[network]:
      for kind in KINDS:
        measuring.row(*compare(shape, kind, args.turns, args.seconds))
  return 0


if __name__ == '__main__':
  sys.exit(main())
