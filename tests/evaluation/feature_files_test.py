"""--mode=features: every image's row at its place, and one line for every mistake."""

import types

import numpy as np
import pytest

from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import feature_files, given_images, inception
from diffusion_distillation.networks.inception import Outputs, preprocess
from diffusion_distillation.system import sharding
from tests import tiny_pictures

SHAPES = [(8, 8, 3)] * 18 + [(9, 12, 3), (5, 400, 3), (8, 8, 3)]


class Extractor:
  """Instead of the network: some pixels of the preprocessed image."""

  digest = 'd' * 64

  def __init__(self, num_logits):
    self.weights = types.SimpleNamespace(num_logits=num_logits)
    self.batches = []

  def of_preprocessed(self, images):
    self.batches.append(len(images))
    host = sharding.to_host(images)
    pool3 = host[:, 100, 100:200].reshape(len(host), -1)
    return Outputs(pool3, pool3[:, :7] if self.weights.num_logits else None, None, None, None, None)


@pytest.fixture(params=[0, 7])
def extractor(request, monkeypatch):
  found = Extractor(request.param)
  monkeypatch.setattr(inception, 'load', lambda path, flag: found)
  monkeypatch.setattr(inception, 'AT_ONCE', 1)  # on each of 8 devices
  return found


def written(path):
  with np.load(path) as arrays:
    return dict(arrays)


def expected(images):
  return np.concatenate([preprocess(image[None]) for image in images])[:, 100, 100:200].reshape(
    len(images), -1
  )


def test_rows_are_in_order_of_name_whatever_the_sizes(tmp_path, extractor):
  folder = tmp_path / 'images'
  folder.mkdir()
  names = [f'{(8 * k) % len(SHAPES):02}.png' for k in range(len(SHAPES))]
  for k, name in enumerate(names):
    (folder / name).write_bytes(tiny_pictures.png(k, SHAPES[k]))
  out = tmp_path / 'features.npz'
  out.write_bytes(b'older')
  line = feature_files.write(folder, 'weights', out)
  found = written(out)
  in_order = [
    tiny_pictures.pixels(names.index(name), SHAPES[names.index(name)]) for name in sorted(names)
  ]
  np.testing.assert_allclose(found['pool3'], expected(in_order), atol=1e-6)
  assert found['pool3'].dtype == np.float32
  assert ('logits' in found) == bool(extractor.weights.num_logits)
  assert f'of {len(SHAPES)} images, weights dddddddddddd' in line and ('logits' in line) == (
    'logits' in found
  )
  assert (
    set(extractor.batches) == {8} and len(extractor.batches) == 3
  )  # two of 8x8 pixels, one of the rest
  assert sorted(path.name for path in tmp_path.iterdir()) == ['features.npz', 'images']


def test_an_array_of_grey_images(tmp_path, extractor):
  images = tiny_pictures.pixels(0, (11, 6, 5, 1))
  np.savez(tmp_path / 'x.npz', images=images)
  feature_files.write(tmp_path / 'x.npz', 'weights', tmp_path / 'y.npz')
  np.testing.assert_allclose(
    written(tmp_path / 'y.npz')['pool3'], expected(images.repeat(3, -1)), atol=1e-6
  )


def test_a_broken_image_leaves_the_older_file_and_nothing_else(tmp_path, extractor):
  folder = tmp_path / 'images'
  folder.mkdir()
  for k in range(12):
    (folder / f'{k:02}.png').write_bytes(tiny_pictures.png(k)[: -30 if k == 10 else None])
  (tmp_path / 'y.npz').write_bytes(b'older')
  with pytest.raises(UserError, match=r'10\.png'):
    feature_files.write(folder, 'weights', tmp_path / 'y.npz')
  assert (tmp_path / 'y.npz').read_bytes() == b'older'
  assert sorted(path.name for path in tmp_path.iterdir()) == ['images', 'y.npz']


@pytest.mark.parametrize(
  ('given', 'message'),
  [
    ({'images': None}, '--mode=features needs --images'),
    ({'weights': None}, '--mode=features needs --inception'),
    ({'out': 'x.png'}, r'--out=x\.png: features are written to one file; .* ends in \.npz'),
    ({'out': 'nowhere/x.npz'}, 'there is no directory'),
    ({'out': None}, '--out='),
  ],
)
def test_flags_are_checked_before_anything_is_read(given, message, monkeypatch):
  monkeypatch.setattr(given_images, '_open_array', None)
  with pytest.raises(UserError, match=message):
    feature_files.write(**{'images': 'x.npz', 'weights': 'w.pth', 'out': 'y.npz'} | given)


def test_missing_files_are_named(tmp_path):
  with pytest.raises(UserError, match=r'--images=.*/x\.npz: there is no such file'):
    feature_files.write(tmp_path / 'x.npz', tmp_path / 'w.pth', tmp_path / 'y.npz')
  np.savez(tmp_path / 'x.npz', images=np.zeros((2, 4, 4, 3), np.uint8))
  with pytest.raises(UserError, match=r'--inception=.*/w\.pth: there is no such file'):
    feature_files.write(tmp_path / 'x.npz', tmp_path / 'w.pth', tmp_path / 'y.npz')
