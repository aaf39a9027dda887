"""Trains the networks beside the base before it, if the config asks for them: an autoencoder, then a text encoder.

The files are described in `stages/own_companions.py`. A network is written when it is finished; after an interruption, it is trained
again from its first update, with the same result. The networks are a function of the config and the images: each is trained on one
device, with batches and noise that are a function of (seed, update).
"""

import contextlib
import dataclasses
import functools
import pathlib
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from diffusion_distillation.config import Config
from diffusion_distillation.datasets import ImageSet
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.datasets.orders import Shuffled
from diffusion_distillation.errors import NumericalError, UserError
from diffusion_distillation.networks.classifier import Classifier
from diffusion_distillation.networks.spaces import Pixels
from diffusion_distillation.run.encoding import intact
from diffusion_distillation.stages import companions, own_companions
from diffusion_distillation.stages.parts import make_seed
from diffusion_distillation.stages.texts import TextEncoder
from diffusion_distillation.system import announcing, interrupts, sharding
from diffusion_distillation.system.checkpoints import digest
from diffusion_distillation.system.files import write_json
from diffusion_distillation.system.progress import Progress
from diffusion_distillation.training import autoencoding, contrastive
from diffusion_distillation.training.optimizers import DECAYS
from diffusion_distillation.training.state import Params

_MEASURED = 1024  # images from which the latents' scale is measured
_AT_ONCE = 64  # of which so many are encoded at a time
_WARMUP = 50  # updates
_CLIP_NORM = 1.0
_SHOWN = 10  # updates between two values of the loss in the progress line
_pixels = Pixels()

State = tuple[Params, optax.OptState]
Update = Callable[[State, jax.Array, Any], tuple[State, jax.Array]]


def table(config: Config, workdir: pathlib.Path) -> Iterator[str]:
  """Yields a line of the plan for each network, with its updates."""
  if not own_companions.are_wanted(config):
    return
  finished = {
    'autoencoder': own_companions.read_latents(workdir),
    'text_encoder': own_companions.read_text(workdir),
  }
  for name, found in finished.items():
    section, done = config[name], '' if found is None else '  finished'
    yield f'  {name:<18} {"":>11} {section.num_updates:>8,} updates of {section.batch_size} images{done}'


def check_processes(config: Config, workdir: pathlib.Path) -> None:
  """Raises UserError if several processes run, and a network is wanted and not finished."""
  if sharding.part()[1] == 1 or not own_companions.are_wanted(config):
    return
  if own_companions.read_latents(workdir) is None or own_companions.read_text(workdir) is None:
    raise UserError(
      f'{workdir}: autoencoder and text encoder are not trained yet; run --mode=prepare with the same config and --workdir in '
      'one process first'
    )


def ensure(config: Config, workdir: pathlib.Path, images: ImageSet) -> None:
  """Trains those networks that are not finished yet; does nothing if the config asks for none.

  Raises:
    UserError: see `check_processes`.
    NumericalError: a loss is not finite.
    Preempted: a signal was received; the same command continues.
  """
  if not own_companions.are_wanted(config):
    return
  latents, text = own_companions.read_latents(workdir), own_companions.read_text(workdir)
  if latents is not None and text is not None:
    return
  check_processes(config, workdir)
  (workdir / own_companions.FOLDER).mkdir(parents=True, exist_ok=True)
  with contextlib.closing(Loader(images, config.dataset.in_memory_gb, config.dataset.workers)) as loader:
    if latents is None:
      _make_autoencoder(config, workdir, loader)
    if text is None:
      _make_text_encoder(config, workdir, loader, images)


def _make_autoencoder(config: Config, workdir: pathlib.Path, loader: Loader) -> None:
  """Trains the autoencoder, measures the scale of its latents, and writes it."""
  began, section = time.monotonic(), own_companions.autoencoder(config)
  space = own_companions.new_latents(config, loader.images)
  seed, vae = make_seed(config, *b'autoencoder'), space.vae
  optimizer = _optimizer(section.learning_rate, section.num_updates)

  def loss(params: Params, rng: jax.Array, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    found = autoencoding.losses(vae, params, _pixels.encode(image), rng, section.kl_weight)
    return found.loss, found.error

  shape = (1, *loader.images.image_shape)
  params = jax.jit(vae.init)(jax.random.key(seed), jnp.zeros(shape))['params']
  with contextlib.closing(loader.shuffled(seed, section.batch_size, 0, section.num_updates)) as batches:
    inputs = (batch['image'] for batch in batches)
    params, error = _train(
      'autoencoder', _update(loss, optimizer), (params, optimizer.init(params)), inputs, section, seed
    )
  space = dataclasses.replace(space, weights=lambda: params)
  latents = np.concatenate([np.asarray(space.encode(jnp.asarray(image))) for image in _first(loader)])
  vae = dataclasses.replace(vae, scaling_factor=autoencoding.scaling_factor(latents))
  space = dataclasses.replace(space, vae=vae, digest=digest(params))
  folder = workdir / own_companions.FOLDER
  companions.write_latents(folder, space)
  made = {'error': error, 'updates': section.num_updates, 'seconds': time.monotonic() - began}
  write_json(folder / own_companions.VAE, companions.describe_space(space) | made)


def _first(loader: Loader) -> Iterator[np.ndarray]:
  """Yields the first training images in equal batches."""
  batches = loader.in_order(_AT_ONCE, range(min(len(loader), _MEASURED)))
  with contextlib.closing(batches):
    for batch in batches:
      interrupts.check()
      yield batch['image'][batch['mask']]


def _make_text_encoder(config: Config, workdir: pathlib.Path, loader: Loader, images: ImageSet) -> None:
  """Trains the text encoder together with an image encoder, which is not kept, and writes it with its tokenizer."""
  began, section = time.monotonic(), own_companions.text_encoder(config)
  text = own_companions.new_text(config, images)
  seed = make_seed(config, *b'text_encoder')
  optimizer = _optimizer(section.learning_rate, section.num_updates)
  see = Classifier(section.hidden_size)  # whose logits are the embedding of an image

  def loss(params: Params, rng: jax.Array, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    del rng
    seen, _ = see.apply({'params': params['image']}, _pixels.encode(batch['image']))
    read: Any = text.network.apply({'params': params['text']}, batch['tokens'])
    scaled = contrastive.logits(seen, read.pooled, params['log_scale'])
    return contrastive.loss(scaled, batch['tokens']), contrastive.accuracy(scaled, batch['tokens'])

  of_image, of_text = jax.random.split(jax.random.key(seed))
  params = {
    'image': jax.jit(see.init)(of_image, jnp.zeros((1, *images.image_shape)))['params'],
    'text': jax.jit(text.network.init)(of_text, jnp.zeros((1, section.length), jnp.int32))['params'],
    'log_scale': jnp.asarray(contrastive.FIRST_LOG_SCALE),
  }
  with contextlib.closing(_with_tokens(text, loader, images, section, seed)) as batches:
    params, accuracy = _train(
      'text_encoder', _update(loss, optimizer), (params, optimizer.init(params)), batches, section, seed
    )
  kept = params['text']
  text = dataclasses.replace(text, weights=lambda: kept, digest=digest(kept))
  folder = workdir / own_companions.FOLDER
  companions.write_text(folder, text)
  made = {'accuracy': accuracy, 'updates': section.num_updates, 'seconds': time.monotonic() - began}
  write_json(folder / own_companions.TEXT_ENCODER, companions.describe_text(text) | made)


def _with_tokens(
  text: TextEncoder,
  loader: Loader,
  images: ImageSet,
  section: contrastive.TextEncoderSection,
  seed: int,
) -> Generator[dict[str, np.ndarray]]:
  """Yields batches of images with the tokens of their captions."""
  tokenize, order = text.tokenize(), Shuffled(len(images), seed, section.batch_size)
  with contextlib.closing(loader.stream(order, range(section.num_updates))) as batches:
    for k, batch in enumerate(batches):
      captions = [images.caption(intact(int(i), loader)) or '' for i in order(k)[0]]
      yield {'image': batch['image'], 'tokens': tokenize(captions, warns=False)}


def _optimizer(learning_rate: float, num_updates: int) -> optax.GradientTransformation:
  """Returns Adam with clipped gradients, a short warm-up, and a cosine decay to 0."""

  def rate(step: jax.Array) -> jax.Array:
    warm = jnp.minimum(1.0, (step + 1) / _WARMUP)
    return learning_rate * warm * DECAYS['cosine'](step / num_updates)

  return optax.chain(optax.clip_by_global_norm(_CLIP_NORM), optax.adam(rate))


def _update(
  loss: Callable[[Params, jax.Array, Any], tuple[jax.Array, jax.Array]],
  optimizer: optax.GradientTransformation,
) -> Update:
  """Returns the compiled update for a loss that also returns the value to show."""

  @functools.partial(jax.jit, donate_argnums=0)
  def update(state: State, rng: jax.Array, batch: Any) -> tuple[State, jax.Array]:
    params, opt_state = state
    (_, shown), grads = jax.value_and_grad(loss, has_aux=True)(params, rng, batch)
    updates, opt_state = optimizer.update(grads, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state), shown

  return update


def _train(
  name: str,
  update: Update,
  state: State,
  batches: Iterator[Any],
  section: autoencoding.AutoencoderSection | contrastive.TextEncoderSection,
  seed: int,
) -> tuple[Params, float]:
  """Returns the parameters after all updates, on the host, and the mean of the last values that the loss shows."""
  rng, values = jax.random.key(seed), list[jax.Array]()
  with Progress(name, section.num_updates, images_per_step=section.batch_size) as progress:
    for k, batch in enumerate(batches):
      interrupts.check()
      first = announcing.compiling(name) if k == 0 else contextlib.nullcontext()
      with first:
        state, value = update(state, jax.random.fold_in(rng, k), batch)
      values = [*values[1 - _SHOWN :], value]
      if k % _SHOWN == _SHOWN - 1:
        progress.note(f'{_mean(name, values):.4f}')
      progress.advance()
  return jax.device_get(state[0]), _mean(name, values)


def _mean(name: str, values: Sequence[jax.Array]) -> float:
  """Returns the mean of the last values; raises NumericalError if it is not finite."""
  found = float(np.mean(jax.device_get(list(values))))
  if not np.isfinite(found):
    raise NumericalError(f'{name}: the loss is not finite; set {name}.learning_rate to a smaller value')
  return found
