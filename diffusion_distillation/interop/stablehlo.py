"""The format `jax`: a whole sampler as one serialized program, which JAX runs without this package."""

import importlib.util
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import safetensors.numpy
from flax import traverse_util

from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import sampling
from diffusion_distillation.evaluation.sampling import Drawer
from diffusion_distillation.networks import conditioning
from diffusion_distillation.stages.model import WEIGHTS
from diffusion_distillation.system import announcing
from diffusion_distillation.training.state import Params

PROGRAM, SCRIPT = 'sampler.stablehlo', 'run.py'
PLATFORMS = ('cpu', 'cuda', 'tpu')

# Noise (b, ...) float32, the keys of the steps (b, 2) uint32, labels (b,) int32 or None; returns (b, H, W, C) uint8.
Draw = Callable[[np.ndarray, np.ndarray, np.ndarray | None], np.ndarray]

FILES = {
  PROGRAM: 'the whole sampler, from noise to images, serialized by `jax.export` for CPU, CUDA and TPU, for any batch size',
  WEIGHTS: 'its weights, float32',
  SCRIPT: 'a short example, which imports only JAX and NumPy',
}
USAGE = """```sh
pip install jax numpy flatbuffers  # JAX reads serialized programs with flatbuffers
python run.py --num=16 --seed=0 --out=images.npz
```

`jax.export.deserialize(...).call(weights, z, ...)` takes the weights, a dict of arrays by name; standard normal noise `z`
(b, H, W, C), float32; then, for a class-conditional model, the labels (b,), int32; then, for a model that takes it, the weight of
guidance of each image (b,), float32 (`run.py --guidance=1.5`); then, for a sampler that adds noise, one key per image (b, 2), uint32.
It returns images (b, H, W, C), uint8. `run.py` shows all of it.
"""


def usage(description: Mapping[str, Any]) -> str:
  """Returns instructions for running the files, in Markdown; the same for every model."""
  del description
  return USAGE


def write(drawer: Drawer, params: Params, grid: np.ndarray, folder: pathlib.Path) -> Draw:
  """Writes the program, its weights and the script that runs it; see `exporting.Format.write`.

  Raises:
    UserError: the package that JAX needs to serialize programs is missing.
  """
  if importlib.util.find_spec('flatbuffers') is None:
    raise UserError('--format=jax needs the package flatbuffers; run `pip install flatbuffers`')
  flat: dict[str, Any] = dict(sorted(traverse_util.flatten_dict(params, sep='/').items()))
  arrays = {name: np.asarray(value) for name, value in flat.items()}
  (folder / WEIGHTS).write_bytes(safetensors.numpy.save(arrays))
  with announcing.compiling('the exported program'):
    (folder / PROGRAM).write_bytes(lower(drawer, flat, grid).serialize())
  taken = drawer.denoise.conditioning
  classes, weights = conditioning.classes(taken), conditioning.weights(taken)
  constants = {
    'SHAPE': drawer.space.shape(drawer.image_shape),
    'CLASSES': classes.count if classes else 0,
    'GUIDANCE': (weights.low, weights.high) if weights else None,
    'ADDS_NOISE': drawer.sampler.draws_noise,
  }
  lines = ''.join(f'{name} = {value}\n' for name, value in constants.items())
  (folder / SCRIPT).write_text(_SCRIPT.replace('CONSTANTS\n', lines))
  return _reader(drawer, folder)


def lower(drawer: Drawer, flat: dict[str, Any], grid: np.ndarray) -> jax.export.Exported:
  """Exports the program for all platforms and any batch size; its first argument is the weights by name."""
  taken = drawer.denoise.conditioning
  names = tuple(taken)

  def sampler(weights: dict[str, jax.Array], z: jax.Array, *rest: jax.Array) -> jax.Array:
    keys = rest[-1] if drawer.sampler.draws_noise else jnp.zeros((z.shape[0], 2), jnp.uint32)
    params = traverse_util.unflatten_dict(weights, sep='/')
    cond = dict(zip(names, rest[: len(names)], strict=True)) or None
    typed = jax.random.wrap_key_data(keys, impl='threefry2x32')
    times = jnp.asarray(grid, jnp.float32)
    return drawer.space.decode(sampling.from_noise(drawer, params, times, z, typed, cond))

  (b,) = jax.export.symbolic_shape('b')
  weights = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in flat.items()}
  z = jax.ShapeDtypeStruct((b, *drawer.space.shape(drawer.image_shape)), jnp.float32)
  rest = [jax.ShapeDtypeStruct((b,), condition.zeros(1).dtype) for condition in taken.values()]
  rest += [jax.ShapeDtypeStruct((b, 2), jnp.uint32)] if drawer.sampler.draws_noise else []
  return jax.export.export(jax.jit(sampler), platforms=PLATFORMS)(weights, z, *rest)


def _reader(drawer: Drawer, folder: pathlib.Path) -> Draw:
  program = jax.export.deserialize(bytearray((folder / PROGRAM).read_bytes()))
  weights = safetensors.numpy.load_file(folder / WEIGHTS)
  call, known = jax.jit(program.call), conditioning.weights(drawer.denoise.conditioning)

  def draw(z: np.ndarray, keys: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    rest = [] if labels is None else [labels]
    rest += [known.in_turn(np.arange(len(z)))] if known else []  # the default weight
    rest += [keys] if drawer.sampler.draws_noise else []
    return np.asarray(call(weights, z, *rest))

  return draw


_SCRIPT = '''"""Draws images with the exported sampler. Needs JAX, NumPy, and flatbuffers, with which JAX reads it."""

import argparse
import json
import pathlib

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

CONSTANTS
parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument('--num', type=int, default=16, help='number of images')
parser.add_argument('--seed', type=int, default=0, help='seed of the noise')
parser.add_argument('--classes', type=int, nargs='*', help='labels to draw in turn; by default all')
parser.add_argument('--guidance', type=float, help='weight of guidance, for samplers that take it')
parser.add_argument('--out', default='images.npz')
args = parser.parse_args()
if args.guidance is not None and GUIDANCE is None:
  parser.error('this sampler does not take a weight of guidance')

folder = pathlib.Path(__file__).parent
data = (folder / 'weights.safetensors').read_bytes()
start = 8 + int.from_bytes(data[:8], 'little')
entries = json.loads(data[8:start])
entries.pop('__metadata__', None)
weights = {}
for name, entry in entries.items():
  begin, end = entry['data_offsets']
  dtype = {'F32': np.float32, 'F16': np.float16, 'I32': np.int32}[entry['dtype']]
  weights[name] = np.frombuffer(data[start + begin : start + end], dtype).reshape(entry['shape'])

# Image k depends on the seed and on k alone.
keys = jax.vmap(lambda k: jax.random.split(jax.random.fold_in(jax.random.key(args.seed), k)))(jnp.arange(args.num))
inputs = [jax.vmap(lambda key: jax.random.normal(key, SHAPE))(keys[:, 0])]
if CLASSES:
  inputs.append(np.resize(np.array(args.classes or range(CLASSES), np.int32), args.num))
if GUIDANCE:  # the smallest and the largest weight that the model was trained with
  weight = GUIDANCE[0] if args.guidance is None else args.guidance
  inputs.append(np.full(args.num, weight, np.float32))
if ADDS_NOISE:
  inputs.append(jax.random.key_data(keys[:, 1]))
program = jax.export.deserialize(bytearray((folder / 'sampler.stablehlo').read_bytes()))
images = np.asarray(program.call(weights, *inputs))
np.savez(args.out, images=images, **({'labels': inputs[1]} if CLASSES else {}))
print(f'{args.out}: {len(images)} images')
'''
