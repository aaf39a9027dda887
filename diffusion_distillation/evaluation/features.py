"""The features in which images are compared, from a small classifier that is trained on the dataset itself.

Public Inception weights are of little use for 8x8 digits, so distances are measured in the features of this classifier and
reported as "FD-<dataset>", never as FID. The classifier is trained once per workdir and stored with its digest. It predicts
the class of an image or, for a dataset without labels, by how many quarter turns it was rotated (Gidaris et al. 2018).
"""

import contextlib
import dataclasses
import functools
import pathlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import safetensors
import safetensors.numpy
from flax import traverse_util

from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.errors import DamagedError
from diffusion_distillation.evaluation.extracted import Extracted, Extractor
from diffusion_distillation.networks import classifier
from diffusion_distillation.networks.spaces import Pixels
from diffusion_distillation.system import cluster, files, interrupts, sharding
from diffusion_distillation.system.checkpoints import digest
from diffusion_distillation.system.progress import Progress
from diffusion_distillation.training.state import Params

DIMENSION = 64  # number of features of the classifier
_PIXELS = Pixels()  # the classifier's input, for models in any space
_UPDATES, _BATCH, _LEARNING_RATE, _SHOWN = 600, 128, 2e-3, 500


@dataclasses.dataclass(frozen=True, eq=False)
class FeatureExtractor:
  """A named, fixed map from images to features.

  Attributes:
    name: name of the dataset, for the name of the metric, "FD-<name>".
    digest: sha256 of the parameters.
    task: what the classifier was trained to predict: 'classes' or 'quarter turns'.
    accuracy: accuracy of the classifier on the held-out split, in [0, 1].
    params: parameters of the Classifier.
  """

  name: str
  digest: str
  task: str
  accuracy: float
  params: Params

  @property
  def metric(self) -> str:
    """Name of the Frechet distance in these features."""
    return f'FD-{self.name}'

  def __call__(self, images: np.ndarray) -> np.ndarray:
    """Maps (n, H, W, C) uint8 images, the same in every process, to (n, 64) float32 features, in batches of one shape."""
    return features_of(self, images)

  def of(self, images: jax.Array) -> Extracted:
    """Maps (n, H, W, C) uint8 images on the devices to (n, 64) float32 features, without waiting for the result.

    The logits are those of the dataset's classes; a classifier of quarter turns has none, since these are not classes.
    """
    logits, features = _apply(self.params, images)
    return Extracted(features, logits if self.task == 'classes' else None)


def features_of(extractor: Extractor, images: np.ndarray) -> np.ndarray:
  """Maps (n, H, W, C) uint8 images, the same in every process, to (n, D) float32 features, in batches of one shape."""
  parts, size = [], batch_size(extractor, len(images))
  for start in range(0, len(images), size):
    part = images[start : start + size]
    padded = np.pad(part, [(0, size - len(part)), (0, 0), (0, 0), (0, 0)])
    parts.append(sharding.to_host(extractor.of(sharding.spread(padded)).features)[: len(part)])
  return np.concatenate(parts)


def batch_size(extractor: Extractor | None = None, number: int = 0) -> int:
  """Returns the batch size for `number` images, a multiple of the number of devices.

  A large network, which says how many images it computes `at_once`, has smaller batches for fewer images, so that little is
  computed for padding; a small one has a single program.
  """
  at_once = getattr(extractor, 'at_once', None)
  return sharding.round_up(_SHOWN if at_once is None else min(at_once, number))


@jax.jit
def _apply(params: Params, images: jax.Array) -> tuple[jax.Array, jax.Array]:
  return classifier.apply(params, _PIXELS.encode(images))


def _task(batch: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray]:
  """Returns images and targets: their classes or, without labels, the number of quarter turns by which they are rotated."""
  if batch['cond'] is not None:
    return batch['image'], batch['cond']['label']
  image, turns = batch['image'].copy(), np.arange(len(batch['image']), dtype=np.int32) % 4
  for k in range(1, 4):
    image[k::4] = np.rot90(image[k::4], k, axes=(1, 2))
  return image, turns


def _train(train: Loader) -> Params:
  """Trains the classifier, as a function of the training split alone; every process trains it, on one device."""
  model = classifier.Classifier(len(train.images.classes) or 4)
  optimizer = optax.adam(optax.cosine_decay_schedule(_LEARNING_RATE, _UPDATES))

  # Compiled without `compilation.options`, which depend on the number of devices; the classifier must not.
  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def update(
    params: Params, opt_state: optax.OptState, image: jax.Array, label: jax.Array
  ) -> tuple[Params, optax.OptState]:
    def loss_fn(params: Params) -> jax.Array:
      logits, _ = model.apply({'params': params}, _PIXELS.encode(image))
      return optax.softmax_cross_entropy_with_integer_labels(logits, label).mean()

    updates, opt_state = optimizer.update(jax.grad(loss_fn)(params), opt_state)
    return optax.apply_updates(params, updates), opt_state

  params = model.init(jax.random.key(0), jnp.zeros((1, *train.images.image_shape)))['params']
  opt_state = optimizer.init(params)
  images = train.unparted()
  batches = images.shuffled(0, _BATCH, 0, _UPDATES)
  with contextlib.closing(batches), Progress('extractor', _UPDATES, images_per_step=_BATCH) as progress:
    for batch in batches:
      interrupts.check()
      params, opt_state = update(params, opt_state, *_task(batch))
      progress.advance()
  images.close()
  return params


def _accuracy(params: Params, held_out: Loader) -> float:
  right = count = 0
  with contextlib.closing(held_out.in_order(batch_size())) as batches:
    for batch in batches:
      interrupts.check()
      image, label = sharding.put(_task(batch))
      logits, label, mask = sharding.to_host(
        (_apply(params, image)[0], label, sharding.put(batch['mask']))
      )
      hit = np.argmax(logits, axis=1) == label
      right, count = right + int(hit[mask].sum()), count + int(mask.sum())
  return right / max(count, 1)


def load_or_train(path: pathlib.Path, train: Loader, held_out: Loader) -> FeatureExtractor:
  """Loads the extractor at `path`, or trains one and stores it there.

  Raises:
    DamagedError: the file was changed after it was written.
  """
  if not cluster.from_first(path.exists()):
    params = sharding.to_host(_train(train))
    meta = {
      'name': train.images.name,
      'digest': digest(params),
      'task': 'classes' if train.images.classes else 'quarter turns',
      'accuracy': str(_accuracy(params, held_out)),
    }
    if files.writes():
      temporary = path.with_suffix('.tmp')
      safetensors.numpy.save_file(traverse_util.flatten_dict(params, sep='/'), temporary, meta)
      temporary.replace(path)
    cluster.barrier()
  try:
    with safetensors.safe_open(path, framework='numpy') as file:
      flat = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
      meta = file.metadata()
    params = traverse_util.unflatten_dict(flat, sep='/')
    extractor = FeatureExtractor(**meta | {'accuracy': float(meta['accuracy'])}, params=params)
  except (safetensors.SafetensorError, KeyError, ValueError, TypeError) as error:
    raise DamagedError(f'{path} is damaged ({error}); remove it to train the extractor again') from error
  if digest(params) != extractor.digest:
    raise DamagedError(f'{path} is damaged (its digest differs); remove it to train the extractor again')
  return extractor
