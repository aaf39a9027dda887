"""The training of a text encoder together with an image encoder (CLIP, Radford et al. 2021): its config and its loss."""

import dataclasses
import math

import jax
import jax.numpy as jnp

from diffusion_distillation.config import AT_LEAST_THREE, AT_LEAST_TWO, NOT_NEGATIVE, POSITIVE, key
from diffusion_distillation.networks.clip_text import CLIPText
from diffusion_distillation.training.state import Params

FIRST_LOG_SCALE = math.log(1.0 / 0.07)  # of the cosines; learned from there on
_MAX_LOG_SCALE = math.log(100.0)


@dataclasses.dataclass(frozen=True)
class TextEncoderSection:
  """The text encoder, in CLIP's form, that is trained in the run itself, before the base; imported models bring their own."""

  num_updates: int = key(
    0, 'Number of updates; 0 for no text encoder. It is trained with `autoencoder`.', NOT_NEGATIVE
  )
  batch_size: int = key(128, 'Number of images with captions per update.', AT_LEAST_TWO)
  learning_rate: float = key(
    1e-3,
    'Peak learning rate. It is reached after 50 updates, or after a quarter of all updates if that is fewer, and decays to 0 by a '
    'cosine.',
    POSITIVE,
  )
  merges: int = key(
    1000,
    'Largest number of merges in the vocabulary, the byte-pair encoding of the captions; it is smaller if every word of them '
    'is one token before.',
    NOT_NEGATIVE,
  )
  length: int = key(
    77,
    'Number of tokens to which texts are padded or cut, with a begin and an end token.',
    AT_LEAST_THREE,
  )
  hidden_size: int = key(64, 'Width of the embedding of a token.', POSITIVE)
  num_layers: int = key(2, 'Number of transformer layers.', POSITIVE)
  num_heads: int = key(
    4, 'Attention heads of each layer; must divide `text_encoder.hidden_size`.', POSITIVE
  )

  def network(self, vocab_size: int) -> CLIPText:
    """Returns the text encoder for a vocabulary whose last token is the end token; raises ValueError if the numbers do not fit."""
    found = CLIPText(
      vocab_size=vocab_size,
      hidden_size=self.hidden_size,
      intermediate_size=4 * self.hidden_size,
      num_hidden_layers=self.num_layers,
      num_attention_heads=self.num_heads,
      max_position_embeddings=self.length,
      eos_token_id=vocab_size - 1,
    )
    found.check()
    return found


def logits(image: jax.Array, text: jax.Array, log_scale: jax.Array) -> jax.Array:
  """Returns the scaled cosines between each image and each text, (B, B), of embeddings (B, D)."""
  image, text = (v / jnp.linalg.norm(v, axis=-1, keepdims=True) for v in (image, text))
  return jnp.exp(log_scale) * image @ text.T


def bound(params: Params) -> Params:
  """Returns the parameters with a scale of at most 100 (section 2.5); applied after each update, so that the scale can fall again."""
  return {**params, 'log_scale': jnp.minimum(params['log_scale'], _MAX_LOG_SCALE)}


def loss(scaled: jax.Array, tokens: jax.Array) -> jax.Array:
  """Returns the symmetric cross-entropy between images and texts (Radford et al. 2021, figure 3), a scalar.

  Images with the same text in a batch all belong to all copies of it, in equal shares (UniCL, Yang et al. 2022); without such
  copies this is CLIP's loss.

  Args:
    scaled: (B, B), see `logits`.
    tokens: (B, T), the texts.
  """
  same = jnp.all(tokens[:, None, :] == tokens[None, :, :], axis=-1).astype(scaled.dtype)
  share = same / jnp.sum(same, axis=1, keepdims=True)
  of_images = -jnp.mean(jnp.sum(share * jax.nn.log_softmax(scaled, axis=1), axis=1))
  of_texts = -jnp.mean(jnp.sum(share * jax.nn.log_softmax(scaled.T, axis=1), axis=1))
  return 0.5 * (of_images + of_texts)


def accuracy(scaled: jax.Array, tokens: jax.Array) -> jax.Array:
  """Returns the share of images whose nearest text in the batch is their own, or a copy of it; a scalar."""
  nearest = jnp.argmax(scaled, axis=1)
  return jnp.mean(jnp.all(tokens[nearest] == tokens, axis=-1))
