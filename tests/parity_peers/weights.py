"""Weights by name: every parameter of a parity case is a function of its name and shape alone.

    tensor('model.map_layer0.weight', (128, 32), kind_of('model.map_layer0.weight', 2))

The numbers are standard normals (float64, C order) of numpy's Generator(Philox(key=crc32(name))), scaled by
kind, then rounded to float32. `case.json` lists, for each parameter, name, shape, kind and the crc32 of its bytes.
"""

import zlib

import numpy as np


def kind_of(name, ndim):
  """The kind of a parameter, from its name (the peer's own) and its number of axes."""
  parts = name.split('.')
  if parts[-1] in ('running_mean', 'running_var', 'freqs'):
    return parts[-1]
  if parts[-1] == 'bias':
    return 'bias'
  if ndim == 1:
    return 'norm'  # the scale of GroupNorm, LayerNorm, BatchNorm
  if len(parts) > 1 and parts[-2] in ('token_embedding', 'position_embedding', 'class_embedding'):
    return 'embedding'  # a table: one row an index
  return 'matrix'  # linear (out, in) or conv (out, in, height, width)


def tensor(name, shape, kind, gain=1.0):
  """float32 array; `gain` (1 unless case.json says otherwise) multiplies matrices only."""
  n = np.random.Generator(np.random.Philox(key=zlib.crc32(name.encode()))).standard_normal(tuple(shape))
  if kind == 'matrix':
    n = n * (gain / np.sqrt(np.prod(shape[1:])))
  else:
    n = {
      'bias': lambda: 0.1 * n,
      'norm': lambda: 1 + 0.1 * n,
      'embedding': lambda: 0.5 * n,
      'running_mean': lambda: 0.1 * n,
      'running_var': lambda: np.exp(0.1 * n),
      'freqs': lambda: 4 * n,  # the frequencies of a random Fourier embedding
      'positive': lambda: np.abs(n) / np.sqrt(np.prod(shape[1:])),  # LPIPS's linear layers
    }[kind]()
  return n.astype(np.float32)
