"""The same images in every format that a dataset can have on disk, for benchmarks/input_pipeline.py."""

import io
import pathlib
import zipfile
from collections.abc import Iterator

import tensorflow_datasets as tfds
from PIL import Image

from diffusion_distillation import datasets
from diffusion_distillation.datasets import shapes

SIDE = 256  # size of the JPEG files, that of a downscaled photo


class Pictures(tfds.core.GeneratorBasedBuilder):
  """Synthetic shapes as a dataset of tensorflow-datasets, stored as JPEG."""

  VERSION = tfds.core.Version('1.0.0')
  name = 'pictures'
  count = 0

  def _info(self) -> tfds.core.DatasetInfo:
    features = {
      'image': tfds.features.Image(shape=(None, None, 3)),
      'label': tfds.features.ClassLabel(names=list(shapes.CLASSES)),
    }
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

  def _split_generators(self, dl_manager: object) -> dict[str, Iterator]:
    return {'train': self._generate_examples(0), 'test': self._generate_examples(64)}

  def _generate_examples(self, start: int) -> Iterator:
    for k, (data, label) in enumerate(encoded(start or self.count, SIDE, 'jpeg')):
      yield k, {'image': io.BytesIO(data), 'label': label}


def encoded(count: int, side: int, form: str) -> Iterator[tuple[bytes, int]]:
  """Returns the bytes of a file ('png' or 'jpeg') and its label."""
  for k in range(count):
    file = io.BytesIO()
    Image.fromarray(shapes.draw(shapes.parameters(k), side, 3)).save(file, form)
    yield file.getvalue(), k % len(shapes.CLASSES)


def write(root: pathlib.Path, count: int, image_size: int) -> dict[str, datasets.Settings]:
  """Writes `count` images below `root` in each format; returns the settings that open each, by caption."""
  photos, pngs, archive = root / 'photos', root / f'png{image_size}', root / f'png{image_size}.zip'
  for folder, side, form in ((photos, SIDE, 'jpeg'), (pngs, image_size, 'png')):
    if folder.exists():
      continue
    for k, (data, label) in enumerate(encoded(count, side, form)):
      path = folder / shapes.CLASSES[label] / f'{k:06d}.{form}'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(data)
  with zipfile.ZipFile(archive, 'w') as file:
    for path in sorted(pngs.rglob('*.png')):
      file.write(path, path.relative_to(pngs))
  Pictures.count = count
  Pictures(data_dir=root / 'tfds', file_format='array_record').download_and_prepare()

  def settings(name: str, path: pathlib.Path | str = '', prepared: str = '') -> datasets.Settings:
    return datasets.Settings(name, str(path), prepared, '', '', image_size, None, 'area')

  return {
    'synthetic shapes': settings('shapes'),
    f'folder of PNG, {image_size}x{image_size}': settings('folder', pngs),
    f'zip of PNG, {image_size}x{image_size}': settings('folder', archive),
    f'folder of JPEG, {SIDE}x{SIDE}': settings('folder', photos),
    f'tensorflow-datasets, JPEG {SIDE}x{SIDE}': settings('pictures', root / 'tfds'),
    'prepared copy of that dataset': settings(
      'pictures', root / 'tfds', str(root / f'copy{image_size}')
    ),
  }
