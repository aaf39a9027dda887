"""The keys of Stable Diffusion's config files: kinds of their values, and values that are not supported."""

import pathlib
from collections.abc import Mapping
from typing import Any

from diffusion_distillation.errors import UserError
from diffusion_distillation.interop import diffusers_config as kinds
from diffusion_distillation.interop.brief import brief
from diffusion_distillation.interop.diffusers_config import Kind

_BOOLS = Kind(
  'true, false or a list of these',
  lambda value: (
    kinds.BOOL.holds(value) or (isinstance(value, list) and all(map(kinds.BOOL.holds, value)))
  ),
)
_COUNT_OR_COUNTS = Kind(
  'a positive integer or a list of them',
  lambda value: kinds.COUNT.holds(value) or kinds.COUNTS.holds(value),
)
_WORD_OR_NONE = Kind('a string or null', lambda value: value is None or kinds.WORD.holds(value))
_NUMBER_OR_NONE = Kind('a number or null', lambda value: value is None or kinds.NUMBER.holds(value))

# Keys of unet/config.json that are also fields of `UNet2DCondition`.
UNET_FIELDS = {
  'block_out_channels': kinds.COUNTS,
  'down_block_types': kinds.WORDS,
  'mid_block_type': _WORD_OR_NONE,
  'up_block_types': kinds.WORDS,
  'cross_attention_dim': kinds.COUNT,
  'layers_per_block': _COUNT_OR_COUNTS,
  'transformer_layers_per_block': _COUNT_OR_COUNTS,
  'attention_head_dim': _COUNT_OR_COUNTS,
  'only_cross_attention': _BOOLS,
  'use_linear_projection': kinds.BOOL,
  'upcast_attention': kinds.BOOL,
  'norm_num_groups': kinds.COUNT,
  'norm_eps': kinds.POSITIVE,
  'act_fn': kinds.WORD,
  'resnet_time_scale_shift': kinds.WORD,
  'downsample_padding': kinds.INT,
  'flip_sin_to_cos': kinds.BOOL,
  'freq_shift': kinds.NUMBER,
  'time_embedding_dim': kinds.OPTIONAL,
  'mid_block_scale_factor': kinds.POSITIVE,
  'center_input_sample': kinds.BOOL,
  'dropout': kinds.RATE,
}
UNET = UNET_FIELDS | {
  'in_channels': kinds.COUNT,
  'out_channels': kinds.COUNT,
  'num_class_embeds': kinds.CLASSES,
}
# diffusers' defaults for keys that a file lacks, where `UNet2DCondition` has none.
UNET_DEFAULTS = {
  'block_out_channels': (320, 640, 1280, 1280),
  'down_block_types': (*('CrossAttnDownBlock2D',) * 3, 'DownBlock2D'),
  'up_block_types': ('UpBlock2D', *('CrossAttnUpBlock2D',) * 3),
  'cross_attention_dim': 1280,
}
# The supported values of all other keys, diffusers' default first.
UNET_ONLY: dict[str, tuple[Any, ...]] = {
  '_class_name': ('UNet2DConditionModel',),
  'num_attention_heads': (None,),
  'time_embedding_type': ('positional',),
  'time_embedding_act_fn': (None,),
  'timestep_post_act': (None,),
  'time_cond_proj_dim': (None,),
  'class_embed_type': (None,),
  'class_embeddings_concat': (False,),
  'addition_embed_type': (None,),
  'encoder_hid_dim': (None,),
  'encoder_hid_dim_type': (None,),
  'dual_cross_attention': (False,),
  'cross_attention_norm': (None,),
  'attention_type': ('default',),
  'reverse_transformer_layers_per_block': (None,),
  'resnet_skip_time_act': (False,),
  'resnet_out_scale_factor': (1.0,),
  'conv_in_kernel': (3,),
  'conv_out_kernel': (3,),
}
# Keys without effect, given those that UNET_ONLY allows.
UNET_IGNORED = (
  *('sample_size', 'mid_block_only_cross_attention', 'projection_class_embeddings_input_dim'),
  *('addition_time_embed_dim', 'addition_embed_type_num_heads'),
)

# Keys of vae/config.json that are also fields of `AutoencoderKL`.
VAE = {
  'in_channels': kinds.COUNT,
  'out_channels': kinds.COUNT,
  'latent_channels': kinds.COUNT,
  'block_out_channels': kinds.COUNTS,
  'down_block_types': kinds.WORDS,
  'up_block_types': kinds.WORDS,
  'layers_per_block': kinds.COUNT,
  'act_fn': kinds.WORD,
  'norm_num_groups': kinds.COUNT,
  'mid_block_add_attention': kinds.BOOL,
  'use_quant_conv': kinds.BOOL,
  'use_post_quant_conv': kinds.BOOL,
  'scaling_factor': kinds.POSITIVE,
  'shift_factor': _NUMBER_OR_NONE,
}
VAE_ONLY: dict[str, tuple[Any, ...]] = {
  '_class_name': ('AutoencoderKL',),
  'latents_mean': (None,),
  'latents_std': (None,),
}
VAE_IGNORED = ('sample_size', 'force_upcast')

# Keys of text_encoder/config.json that are also fields of `CLIPText`.
TEXT = {
  'vocab_size': kinds.COUNT,
  'hidden_size': kinds.COUNT,
  'intermediate_size': kinds.COUNT,
  'num_hidden_layers': kinds.COUNT,
  'num_attention_heads': kinds.COUNT,
  'max_position_embeddings': kinds.COUNT,
  'hidden_act': kinds.WORD,
  'layer_norm_eps': kinds.POSITIVE,
  'eos_token_id': kinds.INT,
}
TEXT_ONLY: dict[str, tuple[Any, ...]] = {
  'model_type': ('clip_text_model',),
  'architectures': (['CLIPTextModel'], None),
  'use_attention_mask': (False, None),
}


def check(
  path: pathlib.Path,
  found: Mapping[str, Any],
  fields: Mapping[str, Kind],
  only: Mapping[str, tuple[Any, ...]],
  ignored: tuple[str, ...] | None = None,
) -> None:
  """Checks a config file.

  Args:
    path: path of the file, for messages.
    found: its content.
    fields: keys with any value of a kind.
    only: keys with one of some values.
    ignored: keys without effect; None if all keys that are in neither table are ignored.

  Raises:
    UserError: a value is of another kind or not supported, or there is an unknown key, whose value is neither null nor
      false; the message names file and key.
  """
  for key, known in only.items():
    if key in found and not any(
      type(found[key]) is type(value) and found[key] == value for value in known
    ):
      if (
        isinstance(found[key], int | float) and not isinstance(found[key], bool) and found[key] in known
      ):
        continue  # 1 for 1.0
      names = ', '.join(map(str, known))
      raise UserError(f'{path}: {key}={brief(found[key])} is not supported; supported: {names}')
  kinds.check(path, found, fields)
  if ignored is None:
    return
  for key, value in found.items():
    known_key = key in fields or key in only or key in ignored or key.startswith('_')
    if not known_key and value is not None and value is not False:
      raise UserError(f'{path}: the key {key[:80]!r} ({brief(value)}) is not supported by this version')
