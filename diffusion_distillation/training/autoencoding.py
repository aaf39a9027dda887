"""The training of an autoencoder for latent diffusion (Rombach et al. 2022, section 3.1 and appendix G): its config and its loss."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distillation.config import NOT_NEGATIVE, POSITIVE, key
from diffusion_distillation.networks.autoencoder_kl import AutoencoderKL, Gaussian
from diffusion_distillation.training.state import Params


@dataclasses.dataclass(frozen=True)
class AutoencoderSection:
  """The autoencoder of a model of texts that is trained in the run itself, before the base; imported models bring their own."""

  num_updates: int = key(
    0,
    'Number of updates; 0 for no autoencoder. It needs images with captions, `text_encoder.num_updates` and '
    '`model.space=latents`.',
    NOT_NEGATIVE,
  )
  batch_size: int = key(64, 'Number of images per update.', POSITIVE)
  learning_rate: float = key(
    1e-3,
    'Peak learning rate. It is reached after 50 updates, or after a quarter of all updates if that is fewer, and decays to 0 by a '
    'cosine.',
    POSITIVE,
  )
  kl_weight: float = key(
    1e-6,
    'Weight of the KL divergence of the latents from a standard normal distribution, beside the sum of the squared errors '
    'of the pixels.',
    NOT_NEGATIVE,
  )
  latent_channels: int = key(4, 'Channels of the latents.', POSITIVE)
  block_out_channels: tuple[int, ...] = key(
    (32, 64, 64),
    'Channels of each level, from the finest to the coarsest; every level after the first halves height and width.',
    POSITIVE,
  )
  layers_per_block: int = key(
    1, 'Residual blocks per level of the encoder; the decoder has one more.', POSITIVE
  )
  norm_num_groups: int = key(
    8, 'Groups of every GroupNorm; must divide the channels of every level.', POSITIVE
  )

  def network(self, channels: int) -> AutoencoderKL:
    """Returns the autoencoder of images with this number of channels; raises ValueError if the numbers do not fit."""
    levels = len(self.block_out_channels)
    found = AutoencoderKL(
      in_channels=channels,
      out_channels=channels,
      latent_channels=self.latent_channels,
      block_out_channels=self.block_out_channels,
      down_block_types=('DownEncoderBlock2D',) * levels,
      up_block_types=('UpDecoderBlock2D',) * levels,
      layers_per_block=self.layers_per_block,
      norm_num_groups=self.norm_num_groups,
      mid_block_add_attention=False,
      scaling_factor=1.0,  # until it is measured
    )
    found.check()
    return found


class Losses(NamedTuple):
  """The loss of a batch and its parts; scalars.

  Attributes:
    loss: error + kl_weight divergence, the divergence per pixel and channel like the error.
    error: mean squared error of an image's pixels, which are in [-1, 1].
    divergence: mean KL divergence of the latents of an image from a standard normal distribution, in nats.
  """

  loss: jax.Array
  error: jax.Array
  divergence: jax.Array


def losses(vae: AutoencoderKL, params: Params, x: jax.Array, rng: jax.Array, kl_weight: float) -> Losses:
  """Returns the loss of images x (B, H, W, C) in [-1, 1] (Kingma & Welling 2014, Eq. 7).

  It is that of latent diffusion (Rombach et al. 2022, appendix G) without its GAN and LPIPS.
  """
  latents: Gaussian = vae.apply({'params': params}, x, method='encode')  # type: ignore[assignment]
  decoded: Any = vae.apply({'params': params}, latents.sample(rng), method='decode')
  error = jnp.mean(jnp.square(decoded - x))
  divergence = jnp.mean(latents.divergence())
  return Losses(error + kl_weight * divergence * len(x) / x.size, error, divergence)


def scaling_factor(latents: np.ndarray) -> float:
  """Returns the factor that gives latents (N, h, w, C) of images unit variance (Rombach et al. 2022, appendix G)."""
  return float(1.0 / np.std(latents, dtype=np.float64))
