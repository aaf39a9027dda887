"""Networks, and what they work on: Flax modules by name, denoisers, conditioning and spaces."""

from typing import Any

from diffusion_distillation.networks.dhariwal_unet import DhariwalUNet
from diffusion_distillation.networks.song_unet import SongUNet
from diffusion_distillation.networks.unet import UNet

NETWORKS: dict[str, type[Any]] = {
  'unet': UNet,
  'song_unet': SongUNet,
  'dhariwal_unet': DhariwalUNet,
}
