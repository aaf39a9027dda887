"""Finds the JSON files of diffusers, and checks the types of their values."""

import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from diffusion_distillation.errors import UserError
from diffusion_distillation.interop.brief import brief

_MOST = 100_000  # maximum of every integer


class Kind(NamedTuple):
  """A kind of value.

  Attributes:
    says: the kind in words, which follow 'must be'.
    holds: tells whether a value is of this kind.
  """

  says: str
  holds: Callable[[Any], bool]


def _is_int(value: Any, least: int = 0) -> bool:
  return isinstance(value, int) and not isinstance(value, bool) and least <= value <= _MOST


def _is_number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
  return lambda value: isinstance(value, list) and 1 <= len(value) <= 16 and all(map(holds, value))


INT = Kind('zero or a positive integer', _is_int)
COUNT = Kind('a positive integer', lambda value: _is_int(value, 1))
OPTIONAL = Kind('a positive integer or null', lambda value: value is None or _is_int(value, 1))
CLASSES = Kind('zero, a positive integer or null', lambda value: value is None or _is_int(value))
NUMBER = Kind('a number', _is_number)
POSITIVE = Kind('a positive number', lambda value: _is_number(value) and value > 0)
RATE = Kind('a number in [0, 1)', lambda value: _is_number(value) and 0 <= value < 1)
BOOL = Kind('true or false', lambda value: isinstance(value, bool))
WORD = Kind('a string', lambda value: isinstance(value, str))
COUNTS = Kind('a list of positive integers', _list_of(lambda value: _is_int(value, 1)))
BETAS = Kind(
  'null or a list of numbers between 0 and 1',
  lambda betas: (
    betas is None
    or (isinstance(betas, list) and bool(betas) and all(_is_number(b) and 0 < b < 1 for b in betas))
  ),
)
WORDS = Kind('a list of strings', _list_of(lambda value: isinstance(value, str)))

# Keys of a network's config.json that are also fields of `UNet2D`.
FIELDS = {
  'block_out_channels': COUNTS,
  'down_block_types': WORDS,
  'up_block_types': WORDS,
  'layers_per_block': COUNT,
  'attention_head_dim': OPTIONAL,
  'norm_num_groups': COUNT,
  'norm_eps': POSITIVE,
  'act_fn': WORD,
  'resnet_time_scale_shift': WORD,
  'downsample_padding': INT,
  'downsample_type': WORD,
  'upsample_type': WORD,
  'flip_sin_to_cos': BOOL,
  'freq_shift': NUMBER,
  'time_embedding_dim': OPTIONAL,
  'time_embedding_type': WORD,
  'num_train_timesteps': OPTIONAL,
  'mid_block_scale_factor': POSITIVE,
  'add_attention': BOOL,
  'attn_norm_num_groups': OPTIONAL,
  'center_input_sample': BOOL,
  'dropout': RATE,
}
NETWORK = FIELDS | {'in_channels': COUNT, 'out_channels': COUNT, 'num_class_embeds': CLASSES}
SCHEDULE = {
  '_class_name': WORD,
  'prediction_type': WORD,
  'beta_schedule': WORD,
  'beta_start': POSITIVE,
  'beta_end': POSITIVE,
  'trained_betas': BETAS,
  'num_train_timesteps': COUNT,
  'rescale_betas_zero_snr': BOOL,
  'steps_offset': INT,
  'clip_sample': BOOL,
}


def check(path: pathlib.Path, found: Mapping[str, Any], kinds: Mapping[str, Kind]) -> None:
  """Raises UserError, naming file and key, for the first value that is not of its kind."""
  for key, kind in kinds.items():
    if key in found and not kind.holds(found[key]):
      raise UserError(f'{path}: {key}={brief(found[key])} must be {kind.says}')


def read_json(path: pathlib.Path) -> dict[str, Any]:
  """Reads a JSON object; raises UserError if the file has none."""
  try:
    found = json.loads(path.read_text())
  except OSError as error:
    raise UserError(f'{path}: {error.strerror}; a folder that diffusers saved is expected') from error
  except (ValueError, RecursionError) as error:
    raise UserError(f'{path} is not JSON ({error})') from error
  if not isinstance(found, dict):
    raise UserError(f'{path} must hold a JSON object')
  return found


def find(folder: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
  """Returns the folder of the network and the file of the schedule, which need not exist.

  Raises:
    UserError: the folder is a pipeline without a `unet`, or with other parts than network and schedule, such as the
      autoencoder of a latent model.
  """
  if (folder / 'model_index.json').is_file():
    _check_pipeline(folder / 'model_index.json')
    return folder / 'unet', folder / 'scheduler' / 'scheduler_config.json'
  beside = folder.parent / 'model_index.json'
  if beside.is_file():
    _check_pipeline(beside)
    if not (folder / 'scheduler_config.json').is_file():
      return folder, folder.parent / 'scheduler' / 'scheduler_config.json'
  return folder, folder / 'scheduler_config.json'


def _check_pipeline(path: pathlib.Path) -> None:
  index = read_json(path)
  name = brief(index.get('_class_name'))
  parts = [  # a part is [library, class]; an absent one has nulls
    key
    for key, value in index.items()
    if not key.startswith('_') and isinstance(value, list) and any(value)
  ]
  if 'unet' not in parts:
    raise UserError(f'{path}: the pipeline {name} has no unet')
  others = [part for part in parts if part not in ('unet', 'scheduler')]
  if others:
    raise UserError(
      f'{path}: the pipeline {name} has a part {others[0][:80]!r}, which is not supported: only models of pixels, with unet '
      'and scheduler alone, are read by --source=diffusers; Stable Diffusion is read by --source=stable_diffusion'
    )
