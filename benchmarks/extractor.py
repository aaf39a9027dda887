"""Images per second of the FID's Inception: python benchmarks/extractor.py

With PyTorch, torchvision and pytorch-fid installed, pytorch-fid's network runs beside ours, with the same random weights, in a
process of its own. The two alternate in turns, so that a machine that slows down affects both; the reported ratio is computed turn
by turn. pytorch-fid runs with one thread where that is faster than with all. Processor time is that of all threads; it depends
less on other load than the elapsed time does.
"""

import argparse
import importlib.util
import pathlib
import sys
import time
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from benchmarks import measuring, rival  # without jax and torch, which the processes import

_READY = 600.0  # seconds that a side may take to start and compile
_COLUMNS = (
  *(
    'images',
    'images/s ours (quartiles)',
    'pytorch-fid',
    'ours / pytorch-fid, turn by turn (quartiles)',
  ),
  *('processor ms per image: ours', 'pytorch-fid', 'peak memory, GB: ours', 'pytorch-fid'),
)


def _state() -> dict[str, Any]:
  """Random weights under the peer's names, the same in both processes."""
  import numpy as np

  from diffusion_distillation.evaluation import inception

  rng, state = np.random.default_rng(0), {}
  for name, shape in inception._shapes().items():
    if name.endswith('conv.weight'):
      state[name] = (rng.standard_normal(shape, np.float32) * (2.0 / np.prod(shape[1:])) ** 0.5).astype(
        np.float32
      )
    else:
      value = 1.0 if name.endswith(('bn.weight', 'running_var')) else 0.0
      state[name] = np.full(shape, value, np.float32)
  return state


def _images(batch: int, size: int) -> Any:
  import numpy as np

  return np.random.default_rng(1).integers(0, 256, (batch, size, size, 3), np.uint8)


class _Work:
  """Computes the features of one batch at each call of `run`."""

  def __init__(self, function: Any) -> None:
    self._function, self._made = function, None

  def run(self) -> None:
    """Starts the computation."""
    self._made = self._function()

  def wait(self) -> Any:
    """Returns the features (n, 2048) when they are there."""
    import numpy as np

    return np.asarray(self._made)

  def processor_seconds(self) -> float:
    """Processor time of a call, of all threads."""
    began = time.process_time()
    self.run()
    self.wait()
    return time.process_time() - began

  def answers(self) -> dict[str, Any]:
    """The functions that `rival.serve` calls."""
    return {
      **{'processor': self.processor_seconds, 'features': self.wait},
      'memory': measuring.peak_memory,
    }


def ours(connection: Any, batch: int, size: int) -> None:
  """The process of our side."""

  def prepare() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    from diffusion_distillation.evaluation import inception
    from diffusion_distillation.system import compilation, platforms, sharding

    compilation.use('none')
    platforms.start()
    state = inception._checked(_state(), 'random weights')
    extractor = inception.InceptionExtractor(
      inception.Weights(inception._to_params(state), inception.NUM_LOGITS, '')
    )
    images = _images(batch, size)
    work = _Work(lambda: extractor.of(sharding.spread(images)).features)
    work.processor_seconds()
    measuring.forget_peak_memory()
    return work, work.answers(), {}

  rival.serve(connection, prepare)


def theirs(connection: Any, batch: int, size: int) -> None:
  """The process of pytorch-fid's network."""

  def prepare() -> tuple[Any, dict[str, Any], dict[str, Any]]:
    import torch
    from pytorch_fid import inception

    state = {name: torch.from_numpy(value) for name, value in _state().items()}
    counters = {name for name in state if name.endswith('bn.weight')}
    state |= {name.replace('weight', 'num_batches_tracked'): torch.tensor(0) for name in counters}
    inception.load_state_dict_from_url = lambda *args, **kwargs: state  # which nobody needs to download
    network = inception.InceptionV3([3]).eval()
    images = torch.from_numpy(_images(batch, size))

    def features() -> Any:
      with torch.inference_mode():
        return network(images.permute(0, 3, 1, 2).float() / 255.0)[0].flatten(1)

    work, seconds = _Work(features), {}
    for threads in {1, torch.get_num_threads()}:  # other load makes several threads wait for each other
      torch.set_num_threads(threads)
      seconds[threads] = min(measuring.repeat(work.run, work.wait, 0.0))
    torch.set_num_threads(min(seconds, key=seconds.__getitem__))
    measuring.forget_peak_memory()
    return work, work.answers(), {}

  rival.serve(connection, prepare)


def compare(args: argparse.Namespace) -> tuple[str, ...]:
  """Measures both sides, or ours alone; returns the cells of a row, in the order of _COLUMNS."""
  import numpy as np

  beside = all(map(importlib.util.find_spec, ('torch', 'torchvision', 'pytorch_fid')))
  targets = {'ours': ours} | ({'pytorch-fid': theirs} if beside else {})
  if not beside:
    print('pytorch-fid is not installed: pip install torch torchvision pytorch-fid', file=sys.stderr)
  sides = [rival.Side(name, target, args.batch, args.size) for name, target in targets.items()]
  try:
    for side in sides:
      side.answer(time.monotonic() + _READY)
    features = [side.ask('features', time.monotonic() + _READY) for side in sides]
    turns = []
    for _ in range(args.turns):
      asked = [side.ask(args.seconds, time.monotonic() + _READY) for side in sides]
      turns.append([args.batch / measuring.spread(seconds).median for seconds in asked])
    processor = [1e3 * side.ask('processor', time.monotonic() + _READY) / args.batch for side in sides]
    memory = [side.ask('memory', time.monotonic() + _READY) / 1e9 for side in sides]
  finally:
    for side in sides:
      side.end()
  if beside:
    apart = np.abs(features[0] - features[1]).max() / np.abs(features[1]).max()
    print(f'largest difference of the features: {apart:.1e} of the largest feature', file=sys.stderr)
  rates = [measuring.spread(column) for column in zip(*turns, strict=True)]
  ratio = measuring.spread([turn[0] / turn[-1] for turn in turns])
  cells = [f'{args.batch} of {args.size}x{args.size}', f'{rates[0]:.1f}']
  cells += [f'{rates[1]:.1f}', f'{ratio:.2f}'] if beside else ['', '']
  for values, form in ((processor, '.0f'), (memory, '.2f')):
    cells += [format(value, form) for value in values] + ([] if beside else [''])
  return tuple(cells)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
  """Parses the flags."""
  parser = measuring.Parser(description=__doc__.splitlines()[0])
  positive = measuring.at_least(1)
  parser.add_argument('--size', type=positive, default=32, help='height and width of the images')
  parser.add_argument('--batch', type=positive, default=32, help='images per batch')
  parser.add_argument('--turns', type=positive, default=8, help='number of turns per side')
  parser.add_argument('--seconds', type=measuring.duration, default=5.0, help='seconds per turn')
  return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
  """Parses the flags and prints the table."""
  args = parse(argv)
  try:
    cells = compare(args)
  except rival.Failed as error:
    print(f'error: {error}', file=sys.stderr)
    return 1
  measuring.table(*_COLUMNS)
  measuring.row(*cells)
  return 0


if __name__ == '__main__':
  sys.exit(main())
