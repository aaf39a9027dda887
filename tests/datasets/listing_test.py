"""Which files of a folder or zip are images, and what is said of the others."""

import io
import os
import stat
import struct
import tarfile
import zipfile

import numpy as np
import pytest
from PIL import Image

from diffusion_distillation import datasets
from diffusion_distillation.datasets import decoding, folder, listing, survey
from diffusion_distillation.errors import UserError
from diffusion_distillation.system import interrupts
from tests import tiny_pictures

PNG = tiny_pictures.png(0)


def written(form):
  """A small picture in one of Pillow's formats."""
  file = io.BytesIO()
  Image.new('RGB', (8, 8), (60, 160, 60)).save(file, form)
  return file.getvalue()


def write(root, files):
  for name, data in files.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(data)
  return root


def write_zip(path, files):
  """A zip of (name, bytes), the names as they are."""
  with zipfile.ZipFile(path, 'w') as file:
    for name, data in files:
      file.writestr(zipfile.ZipInfo(name), data)
  return path


def listed(path, max_bytes=2**20):
  return listing.list_images(str(path), max_bytes)


def folder_or_zip(root, kind):
  if kind == 'folder':
    return root
  files = [(str(f.relative_to(root)), f.read_bytes()) for f in root.rglob('*') if f.is_file()]
  return write_zip(root.with_suffix('.zip'), files)


@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_every_file_in_a_format_that_is_read_is_found_whatever_it_is_called(tmp_path, kind):
  suffixes = {
    'JPEG': ('.jfif', '.JFIF', '.jpe', '.jif', '.JPG', '.mpo'),
    'TIFF': ('.tif', '.TIFF', '.dat'),
  }
  suffixes |= {form: ('', '.img', '.txt.bak', f'.{form.lower()}') for form in decoding.FORMATS}
  files = {f'a/{k}{s}': written(f) for f, all_of in suffixes.items() for k, s in enumerate(all_of)}
  files |= {
    f'b/{form}.d/{k}{s}': written(form) for form in suffixes for k, s in enumerate(suffixes[form])
  }
  found = listed(folder_or_zip(write(tmp_path / 'pictures', files), kind))
  assert set(found.found) == set(files) and not found.left_out.counts


@pytest.mark.parametrize('kind', ['folder', 'zip'])
def test_every_other_file_is_counted_with_its_reason_and_an_example(tmp_path, kind):
  reasons = {
    'hidden': ['a/.b.png', '.c/1.png'],
    'of the operating system': [
      'a/._1.png',
      'Thumbs.db',
      '__MACOSX/a/1.png',
      'a/.DS_Store',
      'Desktop.ini',
    ],
    'in an unsupported format (.txt)': ['a/1.TXT', 'a/2.txt'],
    'in an unsupported format (.heic)': ['d/1.heic', 'd/2.HEIC', 'd/3.heic'],
    'in an unsupported format (no suffix)': ['P1', 'BM'],
    'archives (.zip), which are not opened inside a dataset: unpack them': ['d/1.zip', 'd/2.ZIP'],
    'archives (.gz), which are not opened inside a dataset: unpack them': ['d/1.tar.gz'],
    'empty': ['a/nothing'],
    'larger than 1 MiB': ['a/large.png'],
  }
  files = {name: name.encode() + b' is no picture' for names in reasons.values() for name in names}
  files |= {'a/nothing': b'', 'a/large.png': bytes(2**20 + 1), 'a/1.png': PNG}
  found = listed(folder_or_zip(write(tmp_path / 'pictures', files), kind))
  assert set(found.found) == {'a/1.png'}
  assert found.left_out.counts == {reason: len(names) for reason, names in reasons.items()}
  examples = {reason: min(names) for reason, names in reasons.items()}
  if kind == 'folder':  # whose hidden directories are not walked
    examples['hidden'] = '.c/'
  assert found.left_out.examples == examples
  assert found.left_out.lines()[0] == '5 of the operating system, such as Desktop.ini'


def test_what_cannot_be_opened_is_counted_too(tmp_path):
  root = write(tmp_path / 'pictures', {'a/1.png': PNG, 'a/2.png': PNG})
  (root / 'a' / '3.png').symlink_to(tmp_path / 'nowhere')
  (root / 'b').symlink_to(tmp_path / 'nowhere')
  (root / 'c').symlink_to(root / 'a')
  os.mkfifo(root / 'a' / '4.png')
  found = listed(root)
  assert set(found.found) == {'a/1.png', 'a/2.png'}
  assert found.left_out.counts == {
    'links that lead nowhere': 2,
    'linked directories that are already listed': 1,
    'not regular files': 1,
  }


def test_hidden_directories_and_the_system_s_are_not_walked_and_count_once(tmp_path, monkeypatch):
  files = {
    f'{d}/{k}.png': PNG for d in ('a', '.git', '@eaDir', 'lost+found', 'a/.cache') for k in range(3)
  }
  root, walked, scandir = write(tmp_path / 'pictures', files), [], os.scandir
  monkeypatch.setattr(os, 'scandir', lambda path: walked.append(path) or scandir(path))
  found = listed(root)
  assert len(found.found) == 3 and walked == [str(root), str(root / 'a')]
  assert found.left_out.counts == {'hidden': 2, 'of the operating system': 2}


@pytest.mark.parametrize('way', [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_damaged_member_of_a_zip_is_a_broken_image_however_it_is_packed(tmp_path, way):
  path = tmp_path / 'x.zip'
  with zipfile.ZipFile(path, 'w', way) as file:
    for k in range(8):
      file.writestr(f'{k}.png', tiny_pictures.png(k))
  data = bytearray(path.read_bytes())
  place = data.index(b'5.png') + len('5.png') + 9 * (way == zipfile.ZIP_LZMA)  # behind its header
  data[place : place + 24] = b'\xff' * 24
  path.write_bytes(data)
  images = datasets.open_split(tiny_pictures.settings('folder', path=path, split='train'), 'train')
  whole = {files[0]: images.is_whole(k) for k, files in enumerate(images.files)}
  assert len(whole) == 8 and [name for name, ok in whole.items() if not ok] == ['5.png']
  (reason,) = images.batch(np.arange(8))['skipped']
  assert '5.png cannot be unpacked: ' in reason[1]


def test_files_of_a_zip_that_are_damaged_or_links_are_no_images(tmp_path):
  path = tmp_path / 'x.zip'
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
    file.writestr('1.png', PNG)
    file.writestr('2', b'0123456789' * 100)
    link = zipfile.ZipInfo('3.png')
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    file.writestr(link, '1.png')
  data = bytearray(path.read_bytes())
  place = data.index(b'2', data.index(b'PK\3\4', 4))
  data[place + 1 : place + 6] = b'\xff' * 5
  path.write_bytes(data)
  found = listed(path)
  assert set(found.found) == {'1.png'} and found.left_out.counts.pop('links in a zip') == 1
  assert sum(found.left_out.counts.values()) == 1


@pytest.mark.parametrize('form', ['./{}', './/{}', '.\\{}', '././{}', 'x/../{}', '{}'])
@pytest.mark.parametrize('separator', ['/', '\\', '//', '/./'])
def test_a_zip_by_any_way_of_writing_names_is_the_folder(tmp_path, form, separator):
  """As tar's habits, Windows and careless scripts write them."""
  names = [f'{animal}/{k}.png' for animal in ('ant', 'cat') for k in range(4)]
  files = {name: tiny_pictures.png(k) for k, name in enumerate(names)}
  root = write(tmp_path / 'pictures', files)
  odd = [(form.format(name.replace('/', separator)), data) for name, data in files.items()]
  path = write_zip(tmp_path / 'x.zip', [('./', b''), ('ant\\', b''), *odd])
  ours = [datasets.open_split(tiny_pictures.settings('folder', path=p), 'train') for p in (root, path)]
  assert ours[0].classes == ours[1].classes == ('ant', 'cat') and ours[0].identity == ours[1].identity
  assert tiny_pictures.examples(ours[0]) == tiny_pictures.examples(ours[1])


@pytest.mark.parametrize(
  ('names', 'message'),
  [
    (['a/1.png', '../2.png'], "holds '../2.png', a path outside the archive"),
    (['a/1.png', 'a/../../2.txt'], "holds 'a/../../2.txt', a path outside the archive"),
    (['a/1.png', '..\\2.png'], 'a path outside the archive'),
    (['/etc/1.png'], "holds '/etc/1.png', a path outside the archive"),
    (['\\1.png'], 'a path outside the archive'),
    (['C:\\x\\1.png'], 'a path outside the archive'),
    (['c:/1.png'], 'a path outside the archive'),
    (['a/1.png', './a//1.png'], "holds 'a/1.png' twice"),
    (['..\n/1.png', '../\n2.png'], 'a path outside the archive'),
  ],
)
def test_a_zip_with_hostile_names_is_refused_in_one_line(tmp_path, names, message):
  path = write_zip(tmp_path / 'x.zip', [(name, PNG) for name in names])
  with pytest.raises(UserError) as caught:
    listed(path)
  assert str(caught.value).startswith(f'dataset.path={path} ') and message in str(caught.value)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('offset', 'value', 'message'),
  [
    (8, 1, r'is encrypted \(1\.png\); unpack it'),
    (10, 9, r'uses an unsupported compression \(1\.png\)'),
  ],
)
def test_a_zip_that_cannot_be_unpacked_is_refused_before_it_is_read(tmp_path, offset, value, message):
  path = write_zip(tmp_path / 'x.zip', [('1.png', PNG)])
  data = bytearray(path.read_bytes())
  struct.pack_into('<H', data, data.index(b'PK\1\2') + offset, value)
  path.write_bytes(data)
  with pytest.raises(UserError, match=message):
    listed(path)


@pytest.mark.parametrize('name', ['x.tar', 'x.tar.gz', 'x.tgz', 'x.bin', 'x.7z', 'x.rar'])
def test_other_archives_are_refused_with_a_remedy(tmp_path, name):
  path = write(tmp_path, {name: b'Rar!'}) / name
  if name in ('x.tar', 'x.tar.gz', 'x.bin'):
    with tarfile.open(path, 'w:gz' if name == 'x.tar.gz' else 'w') as file:
      file.addfile(tarfile.TarInfo('1.png'))
  with pytest.raises(UserError, match=rf'{name} is an archive of an unsupported kind; unpack it'):
    datasets.open_split(tiny_pictures.settings('folder', path=path), 'train')


def test_an_archive_that_ends_with_a_zip_is_not_read_as_that_zip(tmp_path):
  inner = write_zip(tmp_path / 'inner.zip', [(f'{k}.png', PNG) for k in range(4)])
  path = tmp_path / 'pictures.tar'
  with tarfile.open(path, 'w') as file:
    file.add(inner)
  assert zipfile.is_zipfile(path)
  with pytest.raises(UserError, match=r'pictures\.tar is an archive of an unsupported kind; unpack it'):
    datasets.open_split(tiny_pictures.settings('folder', path=path), 'train')


def test_a_zip_is_one_by_its_content_too(tmp_path):
  path = write_zip(tmp_path / 'pictures', [(f'{k}.png', PNG) for k in range(4)])
  assert len(listed(path).found) == 4


def test_a_folder_without_images_says_what_there_is_instead(tmp_path):
  write(tmp_path, {'1.heic': b'no picture', '2.heic': b'no picture'})
  with pytest.raises(
    UserError, match=r'holds no image .*; 2 in an unsupported format \(\.heic\), such as 1'
  ):
    datasets.open_split(tiny_pictures.settings('folder', path=tmp_path), 'train')


@pytest.fixture
def pictures(tmp_path):
  """Of three classes, with three that cannot be used and three files that are not images."""
  root = tiny_pictures.write_folder(tmp_path / 'pictures', 30, broken=[0])
  files = {'red/small.png': tiny_pictures.png(1, (7, 9, 3)), 'red/nothing.png': b'', 'blue/x.txt': b'x'}
  return write(root, files | {'blue/y.txt': b'y', '.DS_Store': b'x'})


def lines_of(path, **given):
  text = '\n'.join(survey.lines(tiny_pictures.settings('folder', path=path, **given)))
  return text.replace(f'{path}/', '')


def test_a_plan_shows_images_and_classes_by_split_and_what_is_left_out(pictures):
  lines = lines_of(pictures, split='train[:24]', eval_split='train[24:]').splitlines()
  files = datasets.open_split(
    tiny_pictures.settings('folder', path=pictures, split='train'), 'train'
  ).files
  counts = [sum(label == k for _, label in files[:24]) for k in range(3)]
  least, most = min(counts), max(counts)
  names = ('blue', 'green', 'red')
  spread = f'{least} ({names[counts.index(least)]}) to {most} ({names[counts.index(most)]})'
  spread = f'{least}' if least == most else spread
  assert lines[0] == 'images of pictures, 8x8x3'
  assert lines[1].split(maxsplit=3)[-1] == f'24 images of 3 classes, {spread} each'
  text = '\n'.join(lines)
  assert text.count('of them') == 3
  for part in (
    ' 8 images of 3 classes, ',
    ' 1 too small, such as red/small.png is 9x7, smaller than dataset.image_size=8',
    ' 1 empty, such as red/nothing.png is empty',
    ' 1 broken, such as blue/0.png cannot be decoded: ',
    ' 2 in an unsupported format (.txt), such as blue/x.txt',
    ' 1 of the operating system, such as .DS_Store',
  ):
    assert text.count(part) == 1, (part, text)


def test_of_a_large_set_a_plan_looks_at_some_images_and_says_so(pictures, monkeypatch):
  monkeypatch.setattr(survey, 'SECONDS', 0.0)
  lines = lines_of(pictures).splitlines()
  assert [line.split()[:2] for line in lines[1:5]] == [
    ['to', 'train'],
    ['checked', '0;'],
    ['held', 'out'],
    ['checked', '0;'],
  ]
  assert lines[2].endswith(' 0; the others are checked when they are read')


def test_a_prepared_copy_is_planned_as_its_original(pictures, tmp_path):
  from diffusion_distillation.datasets import preparing

  copy = str(tmp_path / 'copy')
  preparing.prepare(tiny_pictures.settings('folder', path=pictures, prepared=copy), 0)
  original = lines_of(pictures)
  copied = lines_of(pictures, prepared=copy).splitlines()
  assert [line for line in original.splitlines() if 'each' not in line] == [
    line for line in copied if 'images of 3 classes' not in line
  ]


def test_sets_without_files_are_planned_without_a_look(monkeypatch):
  digits = list(survey.lines(tiny_pictures.settings('digits')))
  assert digits[0] == 'images of digits, 8x8x1' and len(digits) == 3
  assert '1,437 images of 10 classes, ' in digits[1] and '360 images of 10 classes, ' in digits[2]
  drawn = list(survey.lines(tiny_pictures.settings('shapes')))
  assert '50,000 images of 6 classes, 8,333 (triangle) to 8,334 (disc) each' in drawn[1]
  (line,) = survey.lines(tiny_pictures.settings('cifar10', path='/nowhere'))
  assert line == 'images of cifar10: not prepared on this machine'


def test_a_look_of_one_process_does_not_count_the_looks_for_signals(pictures, monkeypatch):
  """All processes of a run look for signals equally often, but only the first one shows the plan."""
  monkeypatch.setattr(interrupts, 'pending', lambda: pytest.fail('looked for a signal'))
  assert ' 8 images of 3 classes, ' in lines_of(pictures, split='train[:24]', eval_split='train[24:]')


def test_listings_are_kept(pictures, monkeypatch):
  folder._listing.cache_clear()
  calls = []
  list_images = listing.list_images
  monkeypatch.setattr(listing, 'list_images', lambda *args: calls.append(args) or list_images(*args))
  lines_of(pictures)
  assert len(calls) == 1
