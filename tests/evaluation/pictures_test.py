"""Where drawn images go: what `--out` may name, and what is written there."""

import io

import numpy as np
import pytest
from PIL import Image

from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import pictures


def test_suffixes_are_known_in_any_case_and_npz_has_the_name_of_adms_evaluator(tmp_path):
  images = np.zeros((2, 8, 8, 3), np.uint8)
  assert pictures.check_out('x.PNG', 2).kind == '.png'
  pictures.save(pictures.check_out(tmp_path / 'x.NPZ', 2), images, None)
  with np.load(tmp_path / 'x.NPZ', allow_pickle=False) as arrays:
    assert sorted(arrays) == ['arr_0', 'images']
    np.testing.assert_array_equal(arrays['arr_0'], images)


def test_a_folder_holds_each_image_under_a_name_that_sorts(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (12, 8, 8, 3)).astype(np.uint8)
  out = pictures.check_out(f'{tmp_path}/folder/', 12)
  assert not out.path.exists()
  for _ in range(2):  # the same again replaces them
    pictures.save(pictures.check_out(f'{tmp_path}/folder/', 12), images, None)
  names = sorted(path.name for path in out.path.iterdir())
  assert names[0] == '000000.png' and len(names) == 12
  for name, image in zip(names, images, strict=True):
    with Image.open(out.path / name) as found:
      np.testing.assert_array_equal(np.asarray(found), image)
  assert pictures.check_out(tmp_path / 'folder', 12).kind == '/'  # it is there
  with pytest.raises(UserError, match=r'holds other files, such as 000003\.png'):
    pictures.check_out(tmp_path / 'folder', 3)


@pytest.mark.parametrize('name', ['none/x.png', 'none/x/'])
def test_a_directory_that_is_not_there_is_named(tmp_path, name):
  with pytest.raises(UserError, match=f'there is no directory {tmp_path}/none; make it first'):
    pictures.check_out(f'{tmp_path}/{name}', 4)


@pytest.mark.parametrize('name', ['x', 'x.jpg', 'x.npy', '.png/x', 'there.png', 'file/'])
def test_what_is_neither_a_file_of_a_known_kind_nor_a_folder_is_refused(tmp_path, name):
  (tmp_path / 'there.png').mkdir()
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='--out='):
    pictures.check_out(f'{tmp_path}/{name}', 4)


def test_a_strip_has_transparent_gaps_and_every_image_at_its_place():
  images = np.arange(1, 6, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((1, 4, 4, 1), np.uint8)
  with Image.open(io.BytesIO(pictures.strip(images, 3, side=4))) as image:
    sheet = np.asarray(image)
  assert sheet.shape == (2 * 6 - 2, 3 * 6 - 2, 4)
  for k in range(5):
    top, left = 6 * (k // 3), 6 * (k % 3)
    assert (sheet[top : top + 4, left : left + 4] == [k + 1, k + 1, k + 1, 255]).all()
  assert (sheet[..., 3] == 255).sum() == 5 * 16


def test_a_grid_puts_every_image_where_it_belongs():
  images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((1, 4, 4, 1), np.uint8)
  sheet = pictures.grid(images, columns=3, gap=2)
  assert sheet.shape == (2 * 6 + 2, 3 * 6 + 2, 1)
  for k in range(5):
    top, left = 2 + 6 * (k // 3), 2 + 6 * (k % 3)
    assert (sheet[top : top + 4, left : left + 4] == k).all()
  assert (sheet[8:12, 14:18] == 255).all()
  assert (sheet == 255).sum() == sheet.size - 5 * 16


@pytest.mark.parametrize('channels', [1, 3])
def test_png_and_npz_hold_the_images(tmp_path, channels):
  images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, channels)).astype(np.uint8)
  pictures.save(pictures.check_out(tmp_path / 'x.npz', 4), images, np.arange(4))
  with np.load(tmp_path / 'x.npz', allow_pickle=False) as arrays:
    np.testing.assert_array_equal(arrays['images'], images)
    assert arrays['labels'].tolist() == [0, 1, 2, 3]
  pictures.save(pictures.check_out(tmp_path / 'x.png', 4), images, None)
  with Image.open(tmp_path / 'x.png') as image:
    sheet = np.asarray(image).reshape(70, 70, channels)
  np.testing.assert_array_equal(sheet[2:34:4, 2:34:4], images[0])
  np.testing.assert_array_equal(sheet[36:68:4, 36:68:4], images[3])
  assert sorted(path.name for path in tmp_path.iterdir()) == ['x.npz', 'x.png']


def test_out_has_to_be_a_png_or_npz_in_a_directory(tmp_path):
  assert pictures.check_out(tmp_path / 'x.png', 1) == (tmp_path / 'x.png', '.png')
  for out in (None, tmp_path / 'x.gif', tmp_path / 'no' / 'x.png'):
    with pytest.raises(UserError, match='--out'):
      pictures.check_out(out, 1)
