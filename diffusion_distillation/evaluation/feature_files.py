"""Writes the Inception features of images to an .npz file, for `--mode=features`."""

import contextlib
import os
import pathlib
import tempfile
import zipfile

import numpy as np

from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import inception, pictures
from diffusion_distillation.evaluation.given_images import GivenImages, open_images
from diffusion_distillation.networks.inception import Outputs
from diffusion_distillation.system import announcing, interrupts, sharding
from diffusion_distillation.system.progress import Progress


def write(
  images: str | os.PathLike[str] | None,
  weights: str | os.PathLike[str] | None,
  out: str | os.PathLike[str] | None,
) -> str:
  """Writes `pool3` (N, 2048) and, if the weights have the last layer, `logits` (N, 1008), both float32.

  The rows are in the order of the images' names. Images of any size are resized to 299x299 by the network's own rule, without
  cropping. Memory does not grow with the number of images. An existing file is replaced when the new one is complete.

  Args:
    images: a folder, a .zip or an .npz of images; see `given_images.open_images`.
    weights: the weight file; see `inception.read_weights`.
    out: the .npz file to write.

  Returns:
    A line that says what was written.

  Raises:
    UserError: an argument is missing, `out` cannot be written, or an image cannot be read.
  """
  for flag, given in (('images', images), ('inception', weights)):
    if given is None:
      raise UserError(f'--mode=features needs --{flag}')
  assert images is not None and weights is not None
  target = pictures.check_out(out, 1)
  if target.kind != '.npz':
    raise UserError(f'--out={out}: features are written to one file; give it a name that ends in .npz')
  given_images = open_images(images)
  extractor = inception.load(weights, '--inception')
  with tempfile.TemporaryDirectory(prefix=f'.{target.path.name}.', dir=target.path.parent) as folder:
    names = _compute(given_images, extractor, pathlib.Path(folder))
    complete = pathlib.Path(folder) / 'features.npz'
    with zipfile.ZipFile(complete, 'w') as archive:
      for name in names:
        archive.write(pathlib.Path(folder) / f'{name}.npy', f'{name}.npy')
    os.replace(complete, target.path)
  return f'{target.path}: {" and ".join(names)} of {len(given_images)} images, weights {extractor.digest[:12]}'


def _compute(
  images: GivenImages, extractor: inception.InceptionExtractor, folder: pathlib.Path
) -> list[str]:
  """Writes NAME.npy for each kind of feature, and returns the names."""
  names, count = ['pool3', *(['logits'] if extractor.weights.num_logits else [])], len(images)
  files: dict[str, np.memmap] = {}
  size = sharding.round_up(min(inception.AT_ONCE * sharding.device_count(), count))
  waiting: tuple[np.ndarray, Outputs] | None = None

  def store(places: np.ndarray, found: Outputs) -> None:
    for name in names:
      rows = sharding.to_host(getattr(found, name))[: len(places)]
      if name not in files:
        shape = (count, rows.shape[1])
        files[name] = np.lib.format.open_memmap(folder / f'{name}.npy', 'w+', np.float32, shape)
      files[name][places] = rows

  with Progress('features', count) as progress:
    for places, inputs in inception.preprocessed(images.batches(size), size):
      interrupts.check()
      with contextlib.nullcontext() if waiting else announcing.compiling('the network'):
        found = extractor.of_preprocessed(inputs)
      sharding.wait_on_cpu(found)
      if waiting is not None:  # the devices are busy with the next batch
        store(*waiting)
      waiting = places, found
      progress.advance(len(places))
    if waiting is not None:
      store(*waiting)
  for file in files.values():
    file.flush()
  return names
