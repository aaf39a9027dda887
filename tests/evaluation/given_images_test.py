"""Images made elsewhere: all of them once, in order of name, in their own sizes, and without surprises."""

import re
import tracemalloc
import zipfile

import numpy as np
import pytest

from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import given_images
from tests import tiny_pictures

SHAPES = [(8, 8, 3), (12, 9, 3), (8, 8, 3), (8, 8, 1), (12, 9, 3), (8, 8, 3), (5, 7, 3)]


@pytest.fixture
def files(tmp_path):
  """A folder of pictures of several sizes, one below another, whose order by name is not that of their numbers."""
  (tmp_path / 'images' / 'more').mkdir(parents=True)
  names = [f'{k}.png' if k % 2 else f'more/{k}.png' for k in range(len(SHAPES))]
  for k, name in enumerate(names):
    (tmp_path / 'images' / name).write_bytes(tiny_pictures.png(k, SHAPES[k]))
  return tmp_path / 'images', [names.index(name) for name in sorted(names)]


def in_order(images, size):
  """Every image at its place."""
  found = [None] * len(images)
  for places, batch in images.batches(size):
    assert len(places) == len(batch) <= size and batch.dtype == np.uint8
    for place, image in zip(places, batch, strict=True):
      assert found[place] is None
      found[place] = image
  return found


@pytest.mark.parametrize('size', [1, 2, 100])
def test_a_folder_of_several_sizes_in_order_of_name(files, size, tmp_path):
  folder, order = files
  archive = tiny_pictures.write_zip(tmp_path / 'images.zip', folder)
  for path in (folder, archive):
    found = in_order(given_images.open_images(path), size)
    for k, image in zip(order, found, strict=True):
      expected = np.broadcast_to(tiny_pictures.pixels(k, SHAPES[k]), (*SHAPES[k][:2], 3))
      np.testing.assert_array_equal(image, expected)


def test_images_that_wait_for_others_of_their_size_are_bounded(files, monkeypatch):
  monkeypatch.setattr(given_images, '_WAITING', 8 * 8 * 3 + 1)
  folder, order = files
  batches = list(given_images.open_images(folder).batches(100))
  assert len(batches) > 4  # one for each size if nothing bounded them: three
  assert sorted(np.concatenate([batch.places for batch in batches])) == list(range(len(order)))


@pytest.mark.parametrize('name', ['arr_0', 'images'])
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('save', [np.savez, np.savez_compressed])
def test_an_array(tmp_path, name, channels, save):
  images = tiny_pictures.pixels(0, (7, 6, 5, channels))
  save(tmp_path / 'x.npz', labels=np.arange(7), **{name: images})
  given = given_images.open_images(tmp_path / 'x.npz')
  assert len(given) == 7 and given.source == f'--images={tmp_path}/x.npz'
  for size in (3, 7, 50):
    np.testing.assert_array_equal(np.stack(in_order(given, size)), images)


def test_an_array_whose_name_others_write_is_taken_first(tmp_path):
  images = tiny_pictures.pixels(0, (2, 4, 4, 3))
  np.savez(tmp_path / 'x.npz', images=images[:1], arr_0=images)
  assert len(given_images.open_images(tmp_path / 'x.npz')) == 2


@pytest.mark.parametrize(
  ('arrays', 'message'),
  [
    ({'arr_0': np.zeros((2, 4, 4, 3))}, r'arr_0 is float64 \(2, 4, 4, 3\); images must be uint8'),
    ({'arr_0': np.zeros((2, 3, 4, 4), np.uint8)}, r'arr_0 is uint8 \(2, 3, 4, 4\); .* 1 or 3 channels'),
    ({'arr_0': np.zeros((4, 4, 3), np.uint8)}, r'uint8 \(4, 4, 3\)'),
    ({'arr_0': np.zeros((0, 4, 4, 3), np.uint8)}, r'uint8 \(0, 4, 4, 3\)'),
    ({'arr_0': np.array([{}], object)}, r'arr_0 is object'),
    ({'mu': np.zeros(3), 'sigma': np.zeros((3, 3))}, 'no array arr_0 or images; its arrays: mu, sigma'),
    ({'arr_0': np.asfortranarray(np.zeros((2, 4, 4, 3), np.uint8))}, 'Fortran order'),
  ],
)
def test_arrays_that_are_no_images_are_refused(tmp_path, arrays, message):
  np.savez(tmp_path / 'x.npz', **arrays)
  with pytest.raises(UserError, match=message):
    given_images.open_images(tmp_path / 'x.npz')


def test_damaged_arrays_are_refused(tmp_path):
  path = tmp_path / 'x.npz'
  np.savez(path, arr_0=np.zeros((50, 32, 32, 3), np.uint8))
  whole = path.read_bytes()
  path.write_bytes(whole[:500])
  with pytest.raises(UserError, match=r'not a readable \.npz'):
    given_images.open_images(path)
  with zipfile.ZipFile(path, 'w') as archive:  # a header that promises more than there is
    header = np.lib.format.magic(1, 0) + b'\x76\x00'
    text = "{'descr': '|u1', 'fortran_order': False, 'shape': (1000000000, 64, 64, 3)}".ljust(117) + '\n'
    archive.writestr('arr_0.npy', header + text.encode())
  with pytest.raises(UserError, match='the size of arr_0 is not that of its shape'):
    given_images.open_images(path)
  damaged = bytearray(whole)
  damaged[100_000] ^= 1
  path.write_bytes(damaged)
  with pytest.raises(UserError, match=r'is damaged \(Bad CRC-32'):
    list(given_images.open_images(path).batches(100))


def test_an_encrypted_array_and_a_url_of_one_are_refused(tmp_path):
  path = tmp_path / 'x.npz'
  np.savez(path, arr_0=np.zeros((2, 4, 4, 3), np.uint8))
  content = bytearray(path.read_bytes())
  content[6] |= 1  # the flag of encryption, in the member's header and in the directory
  content[content.index(b'PK\x01\x02') + 8] |= 1
  path.write_bytes(content)
  with pytest.raises(UserError, match=r'not a readable .*encrypted'):
    given_images.open_images(path)
  with pytest.raises(
    UserError, match=r'gs://bucket/x\.npz is a URL, but must be a path: .*copy it to a disk'
  ):
    given_images.open_images('gs://bucket/x.npz')


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
  np.savez(tmp_path / 'x.npz', arr_0=np.zeros((20_000, 16, 16, 3), np.uint8))
  given = given_images.open_images(tmp_path / 'x.npz')
  tracemalloc.start()
  try:
    assert sum(len(batch.places) for batch in given.batches(64)) == 20_000
    assert tracemalloc.get_traced_memory()[1] < 2**20  # of 15 MB
  finally:
    tracemalloc.stop()


def test_a_broken_image_is_named(files):
  folder, _ = files
  (folder / '3.png').write_bytes(tiny_pictures.png(3)[:-30])
  with pytest.raises(UserError, match=rf'--images={re.escape(str(folder))}: .*/3.png cannot be decoded'):
    list(given_images.open_images(folder).batches(2))


def test_paths_without_images_are_refused(tmp_path):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'x.bin').write_bytes(b'x')
  for name, message in (
    ('none', 'there is no such file or directory'),
    ('empty', 'holds no image'),
    ('x.bin', 'is a single file that is not a .zip'),
  ):
    with pytest.raises(UserError, match=f'--images={tmp_path}/{name}:? {message}'):
      given_images.open_images(tmp_path / name)
