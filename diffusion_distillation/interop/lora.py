"""Reads low-rank adapters (LoRA) of Stable Diffusion's U-Net from safetensors files, to be merged into its weights.

Three namings of the factors of a module are known, such as `down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`:

    unet.MODULE.lora_A.weight, unet.MODULE.lora_B.weight             diffusers and peft
    unet.MODULE.lora.down.weight, unet.MODULE.lora.up.weight         older diffusers
    lora_unet_MODULE.lora_down.weight, .lora_up.weight, .alpha       kohya, with _ for each dot; LCM-LoRA, for example

Each module's change is multiplied by alpha / rank, where alpha is the rank if the file has none.
"""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import safetensors
from flax import traverse_util

from diffusion_distillation.errors import UserError
from diffusion_distillation.interop import diffusers
from diffusion_distillation.networks import lora
from diffusion_distillation.stages.adapters import METADATA
from diffusion_distillation.training.state import Params

_DOTTED, _KOHYA = 'unet.', 'lora_unet_'
_DOWN = ('.lora_A.weight', '.lora.down.weight', '.lora_down.weight')
_UP = ('.lora_B.weight', '.lora.up.weight', '.lora_up.weight')
_ALPHA = '.alpha'
_TEXT = ('text_encoder.', 'lora_te_')


def read(path: pathlib.Path, params: Params) -> lora.Factors:
  """Reads the factors in a file, scaled by alpha / rank.

  Args:
    path: the file.
    params: the parameters of the U-Net that it adapts.

  Raises:
    UserError: the file does not exist or is damaged, adapts the text encoder, or does not fit the network.
  """
  if not path.is_file():
    raise UserError(f'--lora={path}: there is no such file')
  if path.suffix.lower() != '.safetensors':
    raise UserError(
      f'--lora={path}: only .safetensors files are read; others are pickles, which could run any code'
    )
  state = diffusers.load_state(path)
  modules = _modules(params)
  found: dict[str, dict[str, np.ndarray]] = {}
  for name, value in state.items():
    if name.startswith(_TEXT):
      raise UserError(f'--lora={path} adapts the text encoder ({name[:80]}), which is not supported')
    theirs, kind = _parted(name)
    if kind is None or theirs not in modules:
      raise UserError(f'--lora={path}: {name[:120]} is not a factor of a module of this U-Net')
    found.setdefault(modules[theirs], {})[kind] = value
  alpha = _alpha(path)
  return {module: _factors(path, module, of, alpha) for module, of in found.items()}


def _modules(params: Params) -> dict[str, str]:
  """Returns our path of each module with a kernel, by its names in files."""
  found: dict[str, str] = {}
  for path in traverse_util.flatten_dict(params, sep='/'):
    if path.endswith('/kernel'):
      module = path.removesuffix('/kernel')
      theirs = module.replace('/', '.')
      found |= {_DOTTED + theirs: module, _KOHYA + theirs.replace('.', '_'): module}
  return found


def _parted(name: str) -> tuple[str, str | None]:
  """Returns the module of a weight and which of its factors it is; None for neither."""
  for kind, suffixes in (('down', _DOWN), ('up', _UP), ('alpha', (_ALPHA,))):
    for suffix in suffixes:
      if name.endswith(suffix):
        return name.removesuffix(suffix), kind
  return name, None


def _alpha(path: pathlib.Path) -> float | None:
  """Returns the alpha of all modules in the metadata of a file; None if there is none."""
  with safetensors.safe_open(path, 'numpy') as file:
    text = (file.metadata() or {}).get(METADATA)
  if text is None:
    return None
  try:
    settings: Mapping[str, Any] = json.loads(text)
    own = {
      key.removeprefix(_DOTTED): value for key, value in settings.items() if key.startswith(_DOTTED)
    }
  except (ValueError, AttributeError) as error:
    raise UserError(f'--lora={path}: its {METADATA} is damaged ({error})') from error
  for key in ('alpha_pattern', 'rank_pattern', 'use_dora', 'use_rslora', 'lora_bias'):
    if own.get(key):
      raise UserError(f'--lora={path}: {key}={str(own[key])[:80]} is not supported')
  alpha = own.get('lora_alpha')
  if alpha is not None and (isinstance(alpha, bool) or not isinstance(alpha, int | float)):
    raise UserError(f'--lora={path}: lora_alpha={str(alpha)[:80]} is not a number')
  return alpha


def _factors(
  path: pathlib.Path, module: str, of: Mapping[str, np.ndarray], alpha: float | None
) -> dict[str, np.ndarray]:
  """Returns the factors of a module in our order of axes, with the scale in `up`."""
  if not {'down', 'up'} <= of.keys():
    raise UserError(f'--lora={path}: {module} has only one of its two factors')
  down, up = of['down'], of['up']
  if down.ndim not in (2, 4) or up.ndim != down.ndim or up.shape[2:] != (1,) * (up.ndim - 2):
    raise UserError(f'--lora={path}: the factors of {module} have shapes {down.shape} and {up.shape}')
  if 'alpha' in of:
    alpha = float(of['alpha'].reshape(-1)[0])
  scale = 1.0 if alpha is None else alpha / down.shape[0]
  turned = down.T if down.ndim == 2 else down.transpose(2, 3, 1, 0)
  return {'down': turned, 'up': np.float32(scale) * up.reshape(up.shape[:2]).T}


def merged(path: pathlib.Path, params: Params, scale: float) -> Params:
  """Returns the parameters, on the host, with the adapters in a file; raises UserError as `read` does.

  Args:
    path: the file.
    params: the parameters of the U-Net.
    scale: multiplies all changes.
  """
  try:
    found = lora.merged(params, read(path, params), scale)
  except ValueError as error:
    raise UserError(f'--lora={path}: {error}') from error
  flat = traverse_util.flatten_dict(found, sep='/')
  return traverse_util.unflatten_dict({name: np.asarray(value) for name, value in flat.items()}, sep='/')
