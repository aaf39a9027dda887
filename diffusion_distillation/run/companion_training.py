"""Trains the networks beside the base before it, if the config asks for them: an autoencoder, then a text encoder.

The files of finished networks are described in `stages/own_companions.py`. While a network is trained, its state is saved like a
stage's, and an interrupted training continues with the same result. The networks are a function of the config and the images: each
is trained on one device, with batches and noise that are a function of (seed, update).

WORKDIR/companions/NAME/checkpoints/     the state, until the network is finished
WORKDIR/companions/NAME/metrics.jsonl    its loss, and its error or accuracy
"""

import contextlib
import dataclasses
import functools
import logging
import pathlib
import shutil
import time
from collections.abc import Callable, Generator, Iterator
from typing import Any, NamedTuple

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
from diffusion_distillation.system.checkpoints import Checkpoints, digest
from diffusion_distillation.system.files import write_json
from diffusion_distillation.system.logs import MetricsWriter
from diffusion_distillation.system.progress import Progress
from diffusion_distillation.training import autoencoding, contrastive
from diffusion_distillation.training.optimizers import LearningRate
from diffusion_distillation.training.state import Params

_log = logging.getLogger(__name__)

_MEASURED = 1024  # images from which the latents' scale is measured
_AT_ONCE = 64  # of which so many are encoded at a time
_WARMUP = 50  # updates, or a quarter of all if that is fewer
_CLIP_NORM = 1.0
_SHOWN = 10  # updates between two values in the progress line, each their mean
_pixels = Pixels()

Loss = Callable[[Params, jax.Array, Any], tuple[jax.Array, jax.Array]]


class State(NamedTuple):
  """The state of a training.

  Attributes:
    params: the parameters.
    opt_state: the optimizer's state.
    step: number of updates so far, () int32.
    shown: the last values beside the loss, the newest last, (_SHOWN,) float32; 0 before the first.
  """

  params: Params
  opt_state: optax.OptState
  step: jax.Array
  shown: jax.Array


class Trained(NamedTuple):
  """A finished training.

  Attributes:
    params: the parameters, on the host.
    shown: the mean of the last values beside the loss.
    seconds: the time that it took, interruptions left out.
  """

  params: Params
  shown: float
  seconds: float


def table(config: Config, workdir: pathlib.Path) -> Iterator[str]:
  """Yields a line of the plan for each network, with its updates, and what the plan leaves out of them."""
  if not own_companions.are_wanted(config):
    return
  finished = {
    'autoencoder': own_companions.read_latents(workdir),
    'text_encoder': own_companions.read_text(workdir),
  }
  for name, found in finished.items():
    section, done = config[name], '' if found is None else '  finished'
    yield f'  {name:<18} {"":>11} {section.num_updates:>8,} updates of {section.batch_size} images{done}'
  if not all(finished.values()):
    yield '  the network calls and times below leave out the training of these networks'


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
    NumericalError: a training diverged.
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
    _remove_checkpoints(workdir, 'autoencoder')
    if text is None:
      _make_text_encoder(config, workdir, loader, images)
    _remove_checkpoints(workdir, 'text_encoder')


def _remove_checkpoints(workdir: pathlib.Path, name: str) -> None:
  """Removes the state of a network that is finished."""
  shutil.rmtree(workdir / own_companions.FOLDER / name / 'checkpoints', ignore_errors=True)


def _make_autoencoder(config: Config, workdir: pathlib.Path, loader: Loader) -> None:
  """Trains the autoencoder, measures the scale of its latents, and writes it."""
  section = own_companions.autoencoder(config)
  space = own_companions.new_latents(config, loader.images)
  seed, vae = make_seed(config, *b'autoencoder'), space.vae

  def loss(params: Params, rng: jax.Array, image: jax.Array) -> tuple[jax.Array, jax.Array]:
    found = autoencoding.losses(vae, params, _pixels.encode(image), rng, section.kl_weight)
    return found.loss, found.error

  def batches(start: int) -> Generator[np.ndarray]:
    found = loader.shuffled(seed, section.batch_size, start, section.num_updates)
    with contextlib.closing(found):
      yield from (batch['image'] for batch in found)

  shape = (1, *loader.images.image_shape)
  params = jax.jit(vae.init)(jax.random.key(seed), jnp.zeros(shape))['params']
  params, error, seconds = _train('autoencoder', config, workdir, loss, params, batches, seed, 'error')
  space = dataclasses.replace(space, weights=lambda: params)
  latents = np.concatenate([np.asarray(space.encode(jnp.asarray(image))) for image in _first(loader)])
  vae = dataclasses.replace(vae, scaling_factor=autoencoding.scaling_factor(latents))
  space = dataclasses.replace(space, vae=vae, digest=digest(params))
  folder = workdir / own_companions.FOLDER
  companions.write_latents(folder, space)
  made = {'error': error, 'updates': section.num_updates, 'seconds': seconds}
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
  section = own_companions.text_encoder(config)
  text = own_companions.new_text(config, images)
  _warn_of_cut(text, images)
  seed = make_seed(config, *b'text_encoder')
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
  batches = functools.partial(_with_tokens, text, loader, images, section, seed)
  params, accuracy, seconds = _train(
    'text_encoder', config, workdir, loss, params, batches, seed, 'accuracy', contrastive.bound
  )
  kept = params['text']
  text = dataclasses.replace(text, weights=lambda: kept, digest=digest(kept))
  folder = workdir / own_companions.FOLDER
  companions.write_text(folder, text)
  made = {'accuracy': accuracy, 'updates': section.num_updates, 'seconds': seconds}
  write_json(folder / own_companions.TEXT_ENCODER, companions.describe_text(text) | made)


def _warn_of_cut(text: TextEncoder, images: ImageSet) -> None:
  """Warns of captions that are longer than the text encoder reads."""
  tokenize, captions = text.tokenize(), set(images.all_captions() or [])
  for caption in captions:
    tokenize([caption], warns=False)
  if tokenize.cut:
    _log.warning(
      '%s: of %d different captions, %d are longer than text_encoder.length=%d with a begin and an end token, and are cut',
      *(images.name, len(captions), tokenize.cut, text.network.max_position_embeddings),
    )


def _with_tokens(
  text: TextEncoder,
  loader: Loader,
  images: ImageSet,
  section: contrastive.TextEncoderSection,
  seed: int,
  start: int,
) -> Generator[dict[str, np.ndarray]]:
  """Yields the batches from `start` on: images with the tokens of their captions."""
  tokenize, order = text.tokenize(), Shuffled(len(images), seed, section.batch_size)
  with contextlib.closing(loader.stream(order, range(start, section.num_updates))) as batches:
    for k, batch in enumerate(batches, start):
      captions = [images.caption(intact(int(i), loader)) or '' for i in order(k)[0]]
      yield {'image': batch['image'], 'tokens': tokenize(captions, warns=False)}


def _update(
  loss: Loss, optimizer: optax.GradientTransformation, bound: Callable[[Params], Params]
) -> Callable[[State, jax.Array, Any], tuple[State, jax.Array]]:
  """Returns the compiled update for a loss that also returns the value to show; it returns the loss, too. See `_train`."""

  @functools.partial(jax.jit, donate_argnums=0)
  def update(state: State, rng: jax.Array, batch: Any) -> tuple[State, jax.Array]:
    rng = jax.random.fold_in(rng, state.step)
    (value, shown), grads = jax.value_and_grad(loss, has_aux=True)(state.params, rng, batch)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = bound(optax.apply_updates(state.params, updates))
    return State(params, opt_state, state.step + 1, jnp.append(state.shown[1:], shown)), value

  return update


def _train(
  name: str,
  config: Config,
  workdir: pathlib.Path,
  loss: Loss,
  params: Params,
  batches: Callable[[int], Generator[Any]],
  seed: int,
  shown: str,
  bound: Callable[[Params], Params] = lambda params: params,
) -> Trained:
  """Trains a network to its end, from the newest checkpoint if there is one.

  Args:
    name: the name of the network, and of its section.
    config: the config of the run.
    workdir: the directory of the run.
    loss: the loss of (params, rng, batch), which also returns the value to show.
    params: the first parameters.
    batches: the batches from an update on, by its number.
    seed: the seed of the noise.
    shown: the name of the value to show.
    bound: returns parameters within their bounds; applied after each update.

  Raises:
    NumericalError: the loss or the state is not finite.
    Preempted: a signal was received; the state is saved.
    StorageError: the state cannot be saved.
  """
  section, directory = config[name], workdir / own_companions.FOLDER / name
  directory.mkdir(exist_ok=True)
  rate = _learning_rate(section.learning_rate, section.num_updates)
  optimizer = optax.chain(optax.clip_by_global_norm(_CLIP_NORM), optax.adam(rate))
  state = State(params, optimizer.init(params), jnp.zeros((), jnp.int32), jnp.zeros(_SHOWN))
  with contextlib.closing(Checkpoints(directory)) as checkpoints:
    restored = checkpoints.restore(jax.eval_shape(lambda: state), set_aside=True)
    before = 0.0
    if restored is not None:
      state, before = jax.tree.map(jnp.array, jax.device_get(restored[0])), restored[1]
    began, rng = time.monotonic() - before, jax.random.key(seed)
    first = done = int(state.step)
    update, pending = _update(loss, optimizer, bound), list[jax.Array]()
    with (
      Progress(name, section.num_updates, done, section.batch_size, config.log.seconds) as progress,
      contextlib.closing(MetricsWriter(directory, done)) as writer,
      contextlib.closing(batches(done)) as found,
    ):
      for batch in found:
        with announcing.compiling(name) if done == first else contextlib.nullcontext():
          state, value = update(state, rng, batch)
        done += 1
        pending.append(value)
        last, stop = done == section.num_updates, interrupts.pending()
        saves = last or stop or done % config.checkpoint.every == 0
        if saves or done % _SHOWN == 0:
          _check_finite(name, value, state)
          progress.note(f'{_mean(state):.4f}')
        if last or done % config.log.every == 0:
          values = {'loss': float(np.mean(jax.device_get(pending))), shown: _mean(state)}
          writer.write(done, values)
          pending = []
        if saves:
          checkpoints.save(done, state, time.monotonic() - began)
        progress.advance()
        if stop:
          break
    checkpoints.wait()
    interrupts.check()
  return Trained(jax.device_get(state.params), _mean(state), time.monotonic() - began)


def _learning_rate(peak: float, num_updates: int) -> LearningRate:
  return LearningRate(peak, num_updates, min(_WARMUP, num_updates // 4), 'cosine')


def _mean(state: State) -> float:
  """Returns the mean of the last values beside the loss."""
  return float(np.mean(jax.device_get(state.shown)[-max(1, int(state.step)) :]))


@jax.jit
def _is_finite(tree: Any) -> jax.Array:
  return jnp.all(jnp.stack([jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(tree)]))


def _check_finite(name: str, loss: jax.Array, state: State) -> None:
  """Raises NumericalError if the last loss or a number of the state is not finite; a share of right answers always is."""
  if not _is_finite((loss, state)):
    raise NumericalError(
      f'{name}: the loss is not finite; begin another workdir with a smaller {name}.learning_rate'
    )
