"""Networks as Flax modules by name, denoisers, conditioning, and the spaces that networks work on."""

from typing import Any

from diffusion_distillation.networks.dhariwal_unet import DhariwalUNet
from diffusion_distillation.networks.song_unet import SongUNet
from diffusion_distillation.networks.unet import UNet
from diffusion_distillation.networks.unet2d import UNet2D
from diffusion_distillation.networks.unet2d_condition import UNet2DCondition

NETWORKS: dict[str, type[Any]] = {
  'unet': UNet,
  'unet2d': UNet2D,
  'unet2d_condition': UNet2DCondition,
  'song_unet': SongUNet,
  'dhariwal_unet': DhariwalUNet,
}
