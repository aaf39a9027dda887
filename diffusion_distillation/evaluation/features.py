"""Features that images are compared by: those of a small classifier trained on the data set itself.

Public Inception weights say little about 8x8 digits, so a distance on these features is reported as
"FD-<data set>", never as FID. The classifier is trained once a workdir and stored with its digest.
"""

import dataclasses
import functools
import pathlib
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.numpy
from flax import traverse_util

from diffusion_distillation import interrupts
from diffusion_distillation.checkpoints import digest
from diffusion_distillation.datasets import ImageSet, batch_indices, to_x
from diffusion_distillation.errors import DamagedError
from diffusion_distillation.evaluation.frechet import Moments, RunningMoments
from diffusion_distillation.progress import Progress
from diffusion_distillation.train_state import Params

_UPDATES, _BATCH, _LEARNING_RATE, _SHOWN = 600, 128, 2e-3, 500


class Classifier(nn.Module):
  """Two convolutions and two dense layers; the features are the 64 inputs of the last one."""

  num_classes: int

  @nn.compact
  def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x: (B, H, W, C) in [-1, 1]. Returns logits (B, num_classes) and features (B, 64)."""
    h = nn.relu(nn.Conv(32, (3, 3), name='conv0')(x))
    h = nn.relu(nn.Conv(64, (3, 3), strides=2, name='conv1')(h))
    features = nn.relu(nn.Dense(64, name='features')(h.reshape(len(h), -1)))
    return nn.Dense(self.num_classes, name='logits')(features), features


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureExtractor:
  """A named, fixed map from images to features.

  Attributes:
    name: of the metric's second half, "FD-<name>".
    digest: sha256 of its parameters.
    accuracy: on the held-out split, in [0, 1].
    params: of its Classifier.
  """

  name: str
  digest: str
  accuracy: float
  params: Params

  def __call__(self, images: np.ndarray) -> np.ndarray:
    """(n, H, W, C) uint8 to (n, 64) float32, in batches of one shape."""
    parts = []
    for start in range(0, len(images), _SHOWN):
      part = images[start : start + _SHOWN]
      padded = np.pad(part, [(0, _SHOWN - len(part)), (0, 0), (0, 0), (0, 0)])
      parts.append(np.asarray(_apply(self.params, padded)[1])[: len(part)])
    return np.concatenate(parts)

  def moments(self, images: np.ndarray) -> Moments:
    """Moments of the features of `images`."""
    running = RunningMoments()
    running.add(self(images))
    return running.result()


@jax.jit
def _apply(params: Params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
  num_classes = params['logits']['bias'].shape[0]
  outputs: Any = Classifier(num_classes).apply({'params': params}, to_x(images))
  return outputs


def _train(train: ImageSet) -> Params:
  """The classifier's parameters, a function of the training split alone."""
  model = Classifier(train.num_classes)
  optimizer = optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, _UPDATES))

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(
    params: Params, opt_state: optax.OptState, image: jax.Array, label: jax.Array
  ) -> tuple[Params, optax.OptState]:
    def loss_fn(params: Params) -> jax.Array:
      logits, _ = model.apply({'params': params}, to_x(image))
      return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    updates, opt_state = optimizer.update(jax.grad(loss_fn)(params), opt_state)
    return optax.apply_updates(params, updates), opt_state

  params = model.init(jax.random.key(0), jnp.zeros((1, *train.images.shape[1:])))['params']
  opt_state = optimizer.init(params)
  with Progress('extractor', _UPDATES, images_per_step=_BATCH) as progress:
    for step in range(_UPDATES):
      interrupts.check()
      batch = train.batch(batch_indices(len(train), 0, step, _BATCH))
      params, opt_state = update(params, opt_state, batch['image'], batch['label'])
      progress.advance()
  return params


def _accuracy(params: Params, held_out: ImageSet) -> float:
  logits, _ = _apply(params, held_out.images)
  return float(np.mean(np.argmax(np.asarray(logits), axis=1) == held_out.labels))


def load_or_train(path: pathlib.Path, train: ImageSet, held_out: ImageSet) -> FeatureExtractor:
  """The extractor stored at `path`, or a new one, stored there.

  Raises:
    DamagedError: what is stored is not what was written.
  """
  if not path.exists():
    params = jax.tree.map(np.asarray, _train(train))
    meta = {'digest': digest(params), 'accuracy': str(_accuracy(params, held_out)), 'name': train.name}
    temporary = path.with_suffix('.tmp')
    safetensors.numpy.save_file(traverse_util.flatten_dict(params, sep='/'), temporary, meta)
    temporary.replace(path)
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      flat = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
      meta = file.metadata()
    params = traverse_util.unflatten_dict(flat, sep='/')
    extractor = FeatureExtractor(meta['name'], meta['digest'], float(meta['accuracy']), params)
  except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
    raise DamagedError(f'{path} is damaged ({error}); remove it to have it made again') from error
  if digest(params) != extractor.digest:
    raise DamagedError(f'{path} is damaged (its digest differs); remove it to have it made again')
  return extractor
