"""Folders and zips of images, on disk and elsewhere."""

import pathlib
import pickle
import shutil
import zipfile

import fsspec
import numpy as np
import pytest
from PIL import Image

from diffusion_distillation.datasets import folder
from diffusion_distillation.datasets.image_set import BrokenImage
from diffusion_distillation.datasets.settings import Settings
from diffusion_distillation.errors import UserError


def paint(path, seed=0, shape=(6, 6, 3)):
  """Writes an image file of noise, and returns its pixels."""
  pixels = np.random.default_rng(seed).integers(0, 256, shape).astype(np.uint8)
  path.parent.mkdir(parents=True, exist_ok=True)
  Image.fromarray(pixels).save(path)
  return pixels


def paint_all(root, *names):
  return {name: paint(root / name, seed) for seed, name in enumerate(names)}


def zipped(root, path, below=''):
  """A zip of a folder, with the files in the reverse of their order."""
  with zipfile.ZipFile(path, 'w') as file:
    for inside in sorted(root.rglob('*'), reverse=True):
      file.write(inside, below / inside.relative_to(root))
  return path


def folder_or_zip(root, kind):
  return root if kind == 'folder' else zipped(root, root.with_suffix('.zip'))


def open_folder(path, role='train', **changes):
  fields = {'name': 'folder', 'path': str(path), 'prepared': '', 'split': '', 'eval_split': ''}
  fields |= {'image_size': 6, 'channels': None, 'resize': 'area'}
  return folder.open_split(Settings(**fields | changes), role)


ANIMALS = [f'{animal}/{k}.png' for animal in ('cat', 'ant', 'bee') for k in range(4)]


def by_name(images, root):
  """{name below root: pixels} of all images."""
  paths = [path.removeprefix(f'{root}/') for path, _ in images.files]
  return {path: images.read(k)[0] for k, path in enumerate(paths)}


def assert_same(one, other):
  assert len(one) == len(other) > 0
  assert (one.identity, one.classes) == (other.identity, other.classes)
  for k in range(len(one)):
    np.testing.assert_array_equal(one.read(k)[0], other.read(k)[0])
    assert one.read(k)[1] == other.read(k)[1]


def test_a_folder_gives_each_file_with_its_class(tmp_path):
  painted = paint_all(tmp_path / 'animals', *ANIMALS)
  images = open_folder(tmp_path / 'animals', split='train')
  assert (images.name, images.image_shape) == ('animals', (6, 6, 3))
  assert images.classes == ('ant', 'bee', 'cat')
  found = by_name(images, tmp_path / 'animals')
  assert len(images) == len(found) == 12
  for name, pixels in painted.items():
    np.testing.assert_array_equal(found[name], pixels)
  for k, (path, _) in enumerate(images.files):
    assert images.classes[images.read(k)[1]] == pathlib.Path(path).parent.name


@pytest.mark.parametrize('below', ['', 'animals', 'some/where'])
def test_a_zip_of_a_folder_is_the_folder(tmp_path, below):
  paint_all(tmp_path / 'animals', *ANIMALS)
  path = zipped(tmp_path / 'animals', tmp_path / 'Animals.ZIP', below)
  for role in ('train', 'eval'):
    assert_same(open_folder(tmp_path / 'animals', role), open_folder(path, role))


def identity(path, role='train'):
  return open_folder(path, role, split='train').identity


def test_other_images_have_another_identity(tmp_path):
  paint_all(tmp_path / 'one', *ANIMALS)
  shutil.copytree(tmp_path / 'one', tmp_path / 'copy')
  assert identity(tmp_path / 'one') == identity(tmp_path / 'copy')
  paint(tmp_path / 'copy' / ANIMALS[0], shape=(9, 9, 3))
  folder._listing.cache_clear()
  assert identity(tmp_path / 'one') != identity(tmp_path / 'copy')


def test_other_classes_are_another_identity(tmp_path):
  for animal in 'bcdefg':
    for name in ('a', animal):
      paint(tmp_path / animal / name / '1.png')
  assert len({identity(tmp_path / animal) for animal in 'bcdefg'}) == 6


def test_hidden_files_and_what_are_no_images_are_passed_over(tmp_path):
  paint_all(
    tmp_path, 'a/1.png', 'a/2.JPG', 'b/3.JPEG', 'b/.4.png', '.c/5.png', '__MACOSX/a/6.png', 'd.e/7.png'
  )
  (tmp_path / 'a' / 'notes.txt').write_text('no image')
  (tmp_path / 'png').write_text('no suffix')
  images = open_folder(tmp_path, split='train')
  assert set(by_name(images, tmp_path)) == {'a/1.png', 'a/2.JPG', 'b/3.JPEG', 'd.e/7.png'}
  assert images.classes == ('a', 'b', 'd.e')


def test_the_path_may_itself_be_hidden_or_a_link_and_begin_with_a_tilde(tmp_path, monkeypatch):
  paint_all(tmp_path / '.home' / 'images', 'a/1.png', 'b/2.png')
  (tmp_path / 'link').symlink_to(tmp_path / '.home' / 'images')
  monkeypatch.setenv('HOME', str(tmp_path / '.home'))
  monkeypatch.chdir(tmp_path)
  paths = (tmp_path / '.home' / 'images', 'link', '~/images', './link/', '.home/../link')
  assert len({identity(path) for path in paths}) == 1


def test_files_larger_than_any_image_are_passed_over(tmp_path, monkeypatch):
  paint_all(tmp_path, '1.png', '2.png')
  paint(tmp_path / 'large.png', shape=(60, 60, 3))
  monkeypatch.setattr(folder, 'MAX_BYTES', (tmp_path / 'large.png').stat().st_size - 1)
  assert len(open_folder(tmp_path, split='train')) == 2


@pytest.mark.parametrize(
  'name', ['a space', 'grün', '猫', "quo'te", '5%', 'a+b', 'x[1]', '{y}', '*', '#1']
)
@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_names_may_hold_any_character(tmp_path, name, kind):
  root = tmp_path / name
  painted = paint_all(root, f'{name}/{name}.png', 'other/1.png')
  images = open_folder(folder_or_zip(root, kind), split='train')
  assert images.classes == tuple(sorted([name, 'other']))
  k = next(k for k, (file, _) in enumerate(images.files) if file.endswith(f'{name}.png'))
  np.testing.assert_array_equal(images.read(k)[0], painted[f'{name}/{name}.png'])


@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_broken_images_are_named_and_another_stands_in(tmp_path, kind):
  root = tmp_path / 'images'
  painted = paint_all(root, *(f'{k}.png' for k in range(8)))
  (root / '2.png').write_bytes((root / '2.png').read_bytes()[:-30])
  (root / '5.png').write_text('no image')
  paint(root / '7.png', shape=(5, 9, 3))
  images = open_folder(folder_or_zip(root, kind), split='train')
  reasons = {'2': 'cannot be decoded', '5': 'is none of PNG', '7': 'is 9x5, smaller than dataset'}
  order = [pathlib.PurePath(path).stem for path, _ in images.files]
  for stem, reason in reasons.items():
    with pytest.raises(BrokenImage, match=rf'{stem}\.png {reason}'):
      images.read(order.index(stem))
  batch = images.batch(np.arange(8))
  assert {order[k] for k, _ in batch['skipped']} == set(reasons) and batch['cond'] is None
  for k, stem in enumerate(order):
    whole = next(name for name in (order + order)[k:] if name not in reasons)
    assert batch['valid'][k] == (stem not in reasons)
    np.testing.assert_array_equal(batch['image'][k], painted[f'{whole}.png'])


def test_a_read_that_fails_is_tried_again_before_it_is_an_error(tmp_path, monkeypatch):
  paint_all(tmp_path, '1.png', '2.png')
  images = open_folder(tmp_path, split='train')
  cat_file, failures, waits = images.system.cat_file, [TimeoutError('slow')] * 2, []

  def flaky(path):
    if failures:
      raise failures.pop()
    return cat_file(path)

  monkeypatch.setattr(images.system, 'cat_file', flaky)
  monkeypatch.setattr(folder.time, 'sleep', waits.append)
  assert images.read(0)[0].shape == images.image_shape and waits == [0.1, 1.0]
  failures += [TimeoutError('slow')] * 4
  with pytest.raises(UserError, match='cannot be read: slow'):
    images.read(0)


def test_a_file_that_vanishes_is_no_broken_image_but_an_error(tmp_path):
  paint_all(tmp_path, '1.png', '2.png')
  images = open_folder(tmp_path, split='train')
  (tmp_path / '1.png').unlink()
  gone = next(k for k, (path, _) in enumerate(images.files) if path.endswith('1.png'))
  with pytest.raises(
    UserError, match=r'1\.png cannot be read: .*No such file.*remove it from the dataset'
  ):
    images.read(gone)


def test_without_split_folders_a_twentieth_is_held_out(tmp_path):
  for k in range(60):
    (tmp_path / f'{k}.png').write_bytes(b'%d' % k)
  train, held_out = (open_folder(tmp_path, role).files for role in ('train', 'eval'))
  assert (len(train), len(held_out)) == (57, 3)
  assert train + held_out == open_folder(tmp_path, split='train').files
  assert len(set(train + held_out)) == 60


@pytest.mark.parametrize('kind', ['folder', 'zip'])
@pytest.mark.parametrize('count', [5, 10, 60])
def test_of_a_small_set_images_that_can_be_read_are_held_out(tmp_path, kind, count):
  """Whatever is broken among the last ones, which would be held out otherwise."""
  root = tmp_path / 'images'
  paint_all(root, *(f'{k}.png' for k in range(count)))
  order = [path for path, _ in open_folder(root, split='train').files]
  size = max(2, count // 20)
  for path in order[-2:] if count > 5 else order[-1:]:
    pathlib.Path(path).write_bytes(b'broken')
  folder._listing.cache_clear()
  train, held_out = (open_folder(folder_or_zip(root, kind), role) for role in ('train', 'eval'))
  assert len(held_out) == size and all(held_out.is_whole(k) for k in range(size))
  names = [pathlib.Path(path).name for path, _ in train.files + held_out.files]
  assert sorted(names) == sorted(pathlib.Path(path).name for path in order)
  held_out.check('dataset.eval_split')
  for _ in range(2):  # as another process finds it
    folder._listing.cache_clear()
    assert open_folder(folder_or_zip(root, kind), 'eval').identity == held_out.identity


def test_images_of_a_large_set_are_held_out_without_a_look(tmp_path, monkeypatch):
  monkeypatch.setattr(folder, 'SMALL', 9)
  paint_all(tmp_path, *(f'{k}.png' for k in range(10)))
  monkeypatch.setattr(folder.Folder, 'read', None)
  files = open_folder(tmp_path, split='train').files
  assert open_folder(tmp_path, 'eval').files == files[-2:]


@pytest.mark.parametrize('held_out', ['test', 'val', 'valid', 'validation'])
def test_split_folders_are_the_default_splits(tmp_path, held_out):
  paint_all(tmp_path, 'train/a/1.png', 'train/b/2.png', f'{held_out}/a/3.png')
  assert set(by_name(open_folder(tmp_path), tmp_path)) == {'train/a/1.png', 'train/b/2.png'}
  assert set(by_name(open_folder(tmp_path, 'eval'), tmp_path)) == {f'{held_out}/a/3.png'}


def test_test_images_are_preferred_to_validation_images(tmp_path):
  paint_all(tmp_path, 'train/1.png', 'val/2.png', 'test/3.png')
  assert set(by_name(open_folder(tmp_path, 'eval'), tmp_path)) == {'test/3.png'}
  assert set(by_name(open_folder(tmp_path, 'eval', eval_split='val'), tmp_path)) == {'val/2.png'}


def test_splits_are_slices_of_one_order(tmp_path):
  paint_all(tmp_path, *ANIMALS)
  files = open_folder(tmp_path, split='train').files
  assert open_folder(tmp_path, split='train[3:9]', eval_split='train').files == files[3:9]
  assert open_folder(tmp_path, 'eval', eval_split='train[9:]+train[:1]').files == [*files[9:], files[0]]
  assert open_folder(tmp_path, split='train[:50%]').files == files[:6]


def test_images_can_be_had_in_grey_and_in_other_sizes(tmp_path):
  painted = paint_all(tmp_path, '1.png', '2.png')
  images = open_folder(tmp_path, split='train', channels=1)
  assert images.image_shape == (6, 6, 1)
  grey = np.asarray(Image.fromarray(painted['1.png']).convert('L'))[..., None]
  np.testing.assert_array_equal(by_name(images, tmp_path)['1.png'], grey)
  images = open_folder(tmp_path, split='train', image_size=3)
  blocks = painted['1.png'].reshape(3, 2, 3, 2, 3).mean((1, 3))
  np.testing.assert_array_equal(by_name(images, tmp_path)['1.png'], np.floor(blocks + 0.5))
  nearer = open_folder(tmp_path, split='train', image_size=3, resize='lanczos')
  assert (nearer.read(0)[0] != images.read(0)[0]).any()


@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_a_bucket_is_read_as_a_folder_is(tmp_path, kind):
  """fsspec's file system in memory stands in for one that is far."""
  root = tmp_path / 'images'
  paint_all(root, *ANIMALS)
  far, url = fsspec.filesystem('memory'), f'memory://{tmp_path.name}-{kind}'
  if kind == 'zip':
    url += '/images.zip'
    far.pipe_file(url, zipped(root, tmp_path / 'images.zip').read_bytes())
  else:
    for name in ANIMALS:
      far.pipe_file(f'{url}/images/{name}', (root / name).read_bytes())
  for role in ('train', 'eval'):
    assert_same(open_folder(root, role), open_folder(url, role))


@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_a_set_can_be_sent_to_another_process(tmp_path, kind):
  paint_all(tmp_path / 'images', *ANIMALS)
  images = open_folder(folder_or_zip(tmp_path / 'images', kind), split='train')
  assert_same(images, pickle.loads(pickle.dumps(images)))


@pytest.mark.parametrize(
  ('path', 'message'),
  [
    ('', 'dataset.name=folder needs dataset.path, a directory or a .zip'),
    ('missing', 'dataset.path=missing: there is no such file or directory'),
    ('missing.zip', 'dataset.path=missing.zip: there is no such file or directory'),
    ('empty', r'dataset.path=empty holds no image (.png, .jpg'),
    ('text', 'dataset.path=text holds no image'),
    (
      'text/notes.txt',
      'dataset.path=text/notes.txt is a single file that is not a .zip; name the directory',
    ),
    ('fake.zip', 'dataset.path={tmp_path}/fake.zip cannot be listed: File is not a zip'),
    ('empty.zip', 'dataset.path=empty.zip holds no image'),
    ('mixed', 'dataset.path=mixed has images in folders (a/1.png) and next to them (2.png); see docs/'),
    ('nowhere://bucket/images', 'dataset.path=nowhere://bucket/images cannot be listed: '),
    ('memory://no/such/bucket', 'dataset.path=memory://no/such/bucket holds no image'),
  ],
)
def test_what_cannot_be_opened_is_refused_in_one_line(tmp_path, monkeypatch, path, message):
  monkeypatch.chdir(tmp_path)
  for name in ('empty', 'text'):
    (tmp_path / name).mkdir()
  (tmp_path / 'text' / 'notes.txt').write_text('no image')
  (tmp_path / 'fake.zip').write_text('no zip')
  zipped(tmp_path / 'empty', tmp_path / 'empty.zip')
  paint_all(tmp_path / 'mixed', 'a/1.png', '2.png')
  folder._listing.cache_clear()
  with pytest.raises(UserError) as caught:
    open_folder(path)
  assert str(caught.value).startswith(message.replace('{tmp_path}', str(tmp_path))) and '\n' not in str(
    caught.value
  )


@pytest.mark.parametrize('count', [1, 3])
def test_a_split_needs_an_image_at_least(tmp_path, count):
  """Of so few images none are left to train on, as two at least are held out; one can ask for them."""
  paint_all(tmp_path, *(f'{k}.png' for k in range(count)))
  with pytest.raises(UserError, match=f'holds {count} images; at least 4 are needed'):
    open_folder(tmp_path)
  assert len(open_folder(tmp_path, split='train')) == count
