"""What a set of images is looked into for before anything is written, and how failures are told apart."""

import contextlib
import resource

import numpy as np
import pytest
from PIL import Image

from diffusion_distillation import datasets
from diffusion_distillation.datasets import decoding, folder, image_set, prepared, preparing, reader
from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.system import files
from tests import tiny, tiny_pictures


def write(root, *names, side=8):
  for k, name in enumerate(names):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(tiny_pictures.pixels(k, (side, side, 3))).save(path)
  return root


def plan_for(workdir, root, **changes):
  values = {'dataset__name': 'folder', 'dataset__path': str(root), 'model__num_groups': 4} | changes
  return workdirs.plan_for(workdir, tiny.config(**values))


@pytest.mark.parametrize('role', ['train', 'test'])
@pytest.mark.parametrize('whole', [0, 1])
def test_splits_without_two_whole_images_are_refused_before_anything_is_written(tmp_path, role, whole):
  root = tmp_path / 'images'
  write(root, *(f'{split}/{k}.png' for split in ('train', 'test') for k in range(6)))
  write(root / role, *(f'{k}.png' for k in range(whole, 6)), side=5)
  key = 'dataset.split' if role == 'train' else 'dataset.eval_split'
  message = rf'^{key}: of 6 images of \'images\', only {whole} can be used; at least 2 are needed.*5x5, smaller than'
  with pytest.raises(UserError, match=message):
    plan_for(tmp_path / 'workdir', root)
  assert not (tmp_path / 'workdir').exists()


def test_splits_with_two_whole_images_are_planned(tmp_path):
  root = write(
    tmp_path / 'images', *(f'{split}/{k}.png' for split in ('train', 'test') for k in range(6))
  )
  for role in ('train', 'test'):
    write(root / role, *(f'{k}.png' for k in range(2, 6)), side=5)
  assert len(plan_for(tmp_path / 'workdir', root)[1]) == 6


def test_a_set_is_given_up_after_many_broken_images_in_a_row(monkeypatch):
  monkeypatch.setattr(image_set, '_IN_A_ROW', 4)
  images = tiny_pictures.numbers(20, broken=range(10))
  assert images.batch(np.array([7]))['skipped'] == tuple((k, f'number {k} is odd') for k in range(7, 10))
  with pytest.raises(UserError, match='4 images in a row, of 20, cannot be used'):
    images.batch(np.array([6]))


@pytest.mark.parametrize('name', ['digits', 'shapes'])
def test_a_path_to_what_is_not_read_is_refused(name):
  with pytest.raises(UserError, match=rf'dataset\.path=photos, but dataset\.name={name} reads no files'):
    tiny_pictures.settings(name, path='photos')


def test_a_split_to_train_on_alone_does_not_say_what_is_held_out(tmp_path):
  write(tmp_path, *(f'{k}.png' for k in range(6)))
  given = tiny_pictures.settings('folder', path=tmp_path, split='train')
  with pytest.raises(UserError, match=r'dataset\.split=train is given without dataset\.eval_split'):
    datasets.open_split(given, 'eval')
  both = tiny_pictures.settings('folder', path=tmp_path, split='train[:4]', eval_split='train[4:]')
  assert [len(datasets.open_split(both, role)) for role in datasets.ROLES] == [4, 2]


def test_linked_folders_are_followed_once(tmp_path):
  write(tmp_path / 'elsewhere', '1.png', '2.png')
  root = write(tmp_path / 'images', 'cat/1.png', 'cat/2.png')
  (root / 'dog').symlink_to(tmp_path / 'elsewhere')
  (root / 'dog' / 'loop').symlink_to(root)
  images = datasets.open_split(tiny_pictures.settings('folder', path=root, split='train'), 'train')
  assert images.classes == ('cat', 'dog') and len(images) == 4


def test_a_folder_that_cannot_be_listed_is_an_error_and_no_missing_class(tmp_path, monkeypatch):
  root = write(tmp_path, 'cat/1.png', 'dog/2.png')
  scandir = folder.os.scandir

  def closed(path):
    if str(path).endswith('dog'):
      raise PermissionError(13, 'Permission denied', path)
    return scandir(path)

  monkeypatch.setattr(folder.os, 'scandir', closed)
  with pytest.raises(UserError, match=r'cannot be listed: .*Permission denied.*dog'):
    datasets.open_split(tiny_pictures.settings('folder', path=root, split='train'), 'train')


@pytest.mark.parametrize(
  ('text', 'kind', 'message'),
  [
    ('chunk data hash mismatch', DamagedError, 'x is damaged (chunk data hash mismatch); make it anew'),
    ('open() failed: No such file or directory', DamagedError, 'make it anew'),
    ('open() failed: Too many open files', UserError, 'x cannot be read: open() failed: Too many'),
    ('read() failed: Input/output error\nand more', UserError, 'x cannot be read: read() failed: Input'),
  ],
)
def test_only_what_is_damaged_is_to_be_made_anew(text, kind, message):
  error = image_set.reading_error('x', RuntimeError(text), 'make it anew')
  assert type(error) is kind and message in str(error) and '\n' not in str(error)


def test_as_many_files_may_be_open_as_the_system_allows():
  soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
  resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard - 1), hard))
  try:
    reader.allow_files()
    assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
  finally:
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


SHAPES = {'split': 'train[:6]', 'eval_split': 'test[:2]'}


def test_two_processes_do_not_write_one_copy(tmp_path):
  given = tiny_pictures.settings('shapes', prepared=tmp_path / 'copy', **SHAPES)
  held = files.lock(tmp_path / 'copy', 'dataset.prepared')
  with held, pytest.raises(UserError, match=r'another run is using dataset\.prepared='):
    preparing.prepare(given, 0)
  assert preparing.prepare(given, 0) == {'train': 0, 'eval': 0}


def test_a_full_disk_is_one_line_and_the_same_command_goes_on(tmp_path, monkeypatch):
  from array_record.python import array_record_module

  class Full:
    def __init__(self, path, options):
      pass

    def write(self, record):
      raise RuntimeError('write() failed: No space left on device; writing it\nand more')

    def close(self):
      pass

  given = tiny_pictures.settings('shapes', prepared=tmp_path / 'copy', **SHAPES)
  with monkeypatch.context() as patch:
    patch.setattr(array_record_module, 'ArrayRecordWriter', Full)
    with pytest.raises(
      UserError, match=r'train-00000-of-00001\S* cannot be written: .*No space'
    ) as caught:
      preparing.prepare(given, 0)
  assert '\n' not in str(caught.value)
  with pytest.raises(UserError, match='holds no finished copy'):
    datasets.open_split(given, 'train')
  preparing.prepare(given, 0)
  assert len(datasets.open_split(given, 'train')) == 6


def test_reasons_with_names_that_are_no_text_are_kept():
  record = prepared.pack_broken('photos/\udcff.png is cut')
  with pytest.raises(image_set.BrokenImage, match=r'photos/\\udcff\.png is cut'):
    prepared.unpack(record, (8, 8, 3))


@pytest.mark.parametrize('block', [1, 200, 1000])
def test_area_is_the_same_however_many_rows_it_has_at_a_time(block, monkeypatch):
  image = tiny_pictures.pixels(0, (37, 37, 3))
  whole = decoding.area(image, 8)
  monkeypatch.setattr(decoding, '_BLOCK', block)
  np.testing.assert_allclose(decoding.area(image, 8), whole, rtol=1e-13)


def test_area_has_only_some_rows_in_floating_point_at_a_time(monkeypatch):
  heights = []
  einsum = np.einsum
  monkeypatch.setattr(decoding, '_BLOCK', 37 * 10)
  monkeypatch.setattr(
    np, 'einsum', lambda s, d, block, *a, **k: heights.append(len(block)) or einsum(s, d, block, *a, **k)
  )
  decoding.area(tiny_pictures.pixels(0, (37, 37, 3)), 8)
  assert len(heights) == 4 and max(heights) <= 11


def test_lock_and_json_name_what_they_cannot_do(tmp_path):
  (tmp_path / 'file').write_text('{')
  with pytest.raises(UserError, match=r'cannot write to --here=.*file/below'):
    files.lock(tmp_path / 'file' / 'below', '--here')
  with pytest.raises(DamagedError, match='file is damaged'):
    files.read_json(tmp_path / 'file')
  with contextlib.closing(files.lock(tmp_path / 'new' / 'one', '--here')):
    assert (tmp_path / 'new' / 'one' / files.LOCK).exists()
