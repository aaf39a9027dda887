"""Networks, and what they work on: Flax modules by name, denoisers, conditioning and spaces."""

from typing import Any

from diffusion_distillation.networks.unet import UNet

NETWORKS: dict[str, type[Any]] = {'unet': UNet}
