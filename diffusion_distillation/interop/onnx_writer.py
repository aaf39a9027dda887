"""The format `onnx`: a whole sampler as one graph with its weights, converted by jax2onnx."""

import importlib.util
import itertools
import logging
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from diffusion_distillation.diffusion import samplers
from diffusion_distillation.diffusion.process import Prediction
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation.sampling import Drawer
from diffusion_distillation.interop.stablehlo import Draw
from diffusion_distillation.networks import conditioning
from diffusion_distillation.system import interrupts
from diffusion_distillation.training.state import Params

GRAPH = 'sampler.onnx'
FILES = {GRAPH: 'the whole sampler, from noise to images, with its weights, for any batch size'}
USAGE = """```python
import numpy as np
import onnxruntime

session = onnxruntime.InferenceSession('sampler.onnx')
noise = np.random.default_rng(0).standard_normal((16, SHAPE), np.float32)
(x,) = session.run(None, {'z': noiseLABELS})
images = np.uint8(np.clip(np.round(127.5 * (x + 1.0)), 0, 255))  # (16, H, W, C)
```

`z` is standard normal noise (b, H, W, C), float32, and x lies in [-1, 1].
"""
# The runtime's arctan and exp are exact to one unit in the last place of float32, and the sinusoids of time multiply this
# error by 1000. Measured: 0.2 to 0.3 % of the values are rounded to a neighbouring level.
TOLERANCE = 1e-2
_NEEDED = ('jax2onnx', 'onnxruntime')


def usage(description: Mapping[str, Any]) -> str:
  """Returns instructions for running the graph, in Markdown; `description` is the contents of model.json."""
  labels = ''
  if label := description['conditioning'].get('label'):
    labels = f", 'label': np.arange(16, dtype=np.int32) % {label['count']}"
  shape = ', '.join(map(str, description['image_shape']))
  return USAGE.replace('SHAPE', shape).replace('LABELS', labels)


def write(drawer: Drawer, params: Params, grid: np.ndarray, folder: pathlib.Path) -> Draw:
  """Writes the graph, with the sampler's steps unrolled and the weights as constants; see `exporting.Format.write`.

  Raises:
    UserError: a package is missing, the sampler adds noise, or jax2onnx cannot convert the sampler.
  """
  if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
    raise UserError(f'--format=onnx needs {missing[0]}; run `pip install {" ".join(_NEEDED)}`')
  if drawer.sampler.draws_noise:
    raise UserError(
      f'--format=onnx: the sampler {type(drawer.sampler).__name__} adds noise, which ONNX has no generator for; '
      '--format=jax exports every model'
    )
  import jax2onnx

  logging.getLogger('onnx_ir').setLevel(logging.ERROR)  # it warns about each constant

  (b,) = jax.export.symbolic_shape('b')
  given = [jax.ShapeDtypeStruct((b, *drawer.space.shape(drawer.image_shape)), jnp.float32)]
  names = ['z']
  if conditioning.classes(drawer.denoise.conditioning):
    given, names = [*given, jax.ShapeDtypeStruct((b,), jnp.int32)], [*names, 'label']
  # Traced here, because jax2onnx replaces functions of jax.numpy and Flax by ones that support fewer arguments.
  closed = jax.make_jaxpr(_sampler(drawer, params, grid))(*given)

  def graph(*inputs: jax.Array) -> jax.Array:
    (x,) = jax.core.eval_jaxpr(closed.jaxpr, closed.consts, *inputs)
    return x

  print('converting the sampler to ONNX, which takes seconds to minutes', file=sys.stderr, flush=True)
  with interrupts.at_once('converting to ONNX'):
    try:
      jax2onnx.to_onnx(
        graph,
        given,
        input_names=names,
        output_names=['x'],
        return_mode='file',
        output_path=str(folder / GRAPH),
      )
    except (OSError, MemoryError):
      raise
    except Exception as error:  # it raises its own and others' errors, of any type
      raise UserError(
        f'--format=onnx: jax2onnx cannot convert this network ({_one_line(error)})'
      ) from error
  return _reader(drawer, folder)


def _one_line(error: Exception) -> str:
  text = ' '.join(str(error).split())[:300]
  return text if isinstance(error, NotImplementedError) and text else f'{type(error).__name__}: {text}'


def _sampler(drawer: Drawer, params: Params, grid: np.ndarray) -> Any:
  """Returns a function from noise z (b, ...) and labels (b,) to x: `samplers.sample` with its loop unrolled."""
  logsnr = np.asarray(drawer.schedule(jnp.asarray(grid, jnp.float32)))[::-1]
  clip, step = drawer.space.clip if drawer.clip_x else None, drawer.sampler

  def sampler(z: jax.Array, label: jax.Array | None = None) -> jax.Array:
    cond = None if label is None else {'label': label}

    def denoise(z: jax.Array, logsnr: jax.Array) -> Prediction:
      return drawer.denoise(params, z, logsnr, cond)

    clipped, state = samplers.clipped(denoise, clip, step.keeps_eps), step.begin(z)
    for levels in itertools.pairwise(logsnr):
      at, to = (jnp.broadcast_to(jnp.float32(level), z.shape[:1]) for level in levels)
      state = step(None, clipped, state, at, to)
    return step.end(state)

  return sampler


def _reader(drawer: Drawer, folder: pathlib.Path) -> Draw:
  import onnxruntime

  try:
    session = onnxruntime.InferenceSession(folder / GRAPH)
  except Exception as error:  # it raises errors of its own, which have no common class
    raise UserError(
      f'--format=onnx: onnxruntime does not load the graph ({_one_line(error)})'
    ) from error

  def draw(z: np.ndarray, keys: np.ndarray, labels: np.ndarray | None) -> np.ndarray:
    del keys
    given = {'z': z} | ({} if labels is None else {'label': labels})
    (x,) = session.run(None, given)
    return np.asarray(drawer.space.decode(jnp.asarray(x)))

  return draw
