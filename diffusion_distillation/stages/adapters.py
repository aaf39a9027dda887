"""The low-rank adapters of a student that was trained with LoRA, beside its weights.

FOLDER/adapters.safetensors  the factors of each module, named as peft and diffusers name them:

    unet.MODULE.lora_A.weight   `down`: (rank, inputs), of a convolution (rank, inputs, height, width)
    unet.MODULE.lora_B.weight   `up`: (outputs, rank), of a convolution (outputs, rank, 1, 1)

Several axes of inputs or outputs, such as heads and their channels, are joined. The metadata have the rank and alpha = scale * rank where
diffusers has them, and beside these a digest of the factors and that of the weights that they adapt. They are one entry, because
safetensors writes several in any order.
"""

import json
import pathlib

import numpy as np
import safetensors
import safetensors.numpy

from diffusion_distillation.errors import DamagedError
from diffusion_distillation.networks import lora
from diffusion_distillation.networks.lora import Adapters
from diffusion_distillation.system.checkpoints import digest
from diffusion_distillation.training.state import Params

FILE = 'adapters.safetensors'
METADATA = 'lora_adapter_metadata'  # the key of peft's config in files of diffusers
PREFIX, DOWN, UP = 'unet.', '.lora_A.weight', '.lora_B.weight'
_DIGEST, _BASE = 'digest', 'base_digest'


def write(folder: pathlib.Path, adapters: Adapters, params: Params, base: str) -> None:
  """Writes the file of adapters.

  Args:
    folder: the folder of the model.
    adapters: the adapters, on the host.
    params: the parameters of the network, for the shapes of its kernels.
    base: digest of the weights that are adapted.
  """
  kernels, state, rank = lora.adapted(params, '.*'), {}, 0
  for module, of in adapters.factors.items():
    inputs, outputs = kernels[module]
    rank, name = of['up'].shape[0], PREFIX + module.replace('/', '.')
    size = _size(inputs, outputs)
    down = np.moveaxis(of['down'].reshape(*size, -1, rank), (-1, -2), (0, 1))
    up = of['up'].reshape(rank, -1).T
    state[name + DOWN] = np.ascontiguousarray(down)
    state[name + UP] = np.ascontiguousarray(up.reshape(*up.shape, *(1 for _ in size)))
  modules = sorted(module.replace('/', '.') for module in adapters.factors)
  settings = {'r': rank, 'lora_alpha': adapters.scale * rank, 'target_modules': modules}
  described = {PREFIX + key: value for key, value in settings.items()}
  described |= {_DIGEST: digest(adapters.factors), _BASE: base}
  safetensors.numpy.save_file(state, folder / FILE, {METADATA: json.dumps(described)})


def _size(inputs: tuple[int, ...], outputs: tuple[int, ...]) -> tuple[int, ...]:
  """Returns the height and width of a convolution's kernel; () for other modules."""
  return inputs[:2] if len(inputs) == 3 and len(outputs) == 1 else ()


def read(folder: pathlib.Path, params: Params) -> Adapters:
  """Reads what `write` wrote.

  Args:
    folder: the folder of the model.
    params: the parameters of the network, or their shapes.

  Raises:
    DamagedError: the file is missing, or was changed.
  """
  path, factors = folder / FILE, {}
  try:
    with safetensors.safe_open(path, 'numpy') as file:
      described = json.loads(file.metadata()[METADATA])
      state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    for module, (inputs, outputs) in lora.adapted(params, '.*').items():
      name = PREFIX + module.replace('/', '.')
      if name + DOWN not in state:
        continue
      down, up = state[name + DOWN], state[name + UP]
      down = np.moveaxis(down, (0, 1), (-1, -2)).reshape(*inputs, -1)
      factors[module] = {'down': down, 'up': up.reshape(len(up), -1).T.reshape(-1, *outputs)}
    found = Adapters(factors, float(described[f'{PREFIX}lora_alpha']) / int(described[f'{PREFIX}r']))
    if digest(factors) != described[_DIGEST]:
      raise ValueError('its digest differs')
  except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError) as error:
    raise DamagedError(f'{path} is missing or damaged ({error}); restore it from a copy') from error
  return found
