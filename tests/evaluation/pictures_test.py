"""Where drawn images go: what `--out` may name, and what is written there."""

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
