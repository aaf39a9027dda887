"""Images with captions: tables, text files and WebDataset's tar files, of which none may mix up an image and a caption."""

import io
import json
import pickle
import shutil
import tarfile

import fsspec
import numpy as np
import pytest

from diffusion_distillation import datasets
from diffusion_distillation.datasets import Settings, captions, preparing, survey
from diffusion_distillation.datasets.image_set import BrokenImage
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.errors import DamagedError, UserError
from tests.datasets.folder_test import paint, zipped

NAMES = [f'{folder}{k}.png' for folder in ('', 'more/') for k in range(4)]
KINDS = ('metadata.csv', 'captions.jsonl', 'txt', 'zip', 'tar', 'tars')


@pytest.fixture(autouse=True)
def forget_listings():
  captions._samples.cache_clear()


def caption_of(name):
  return f'a "{name}", with commas,\nand ünusual letters'


def open_captions(path, role='train', **changes):
  fields = {
    'name': 'captions',
    'path': str(path),
    'prepared': '',
    'split': 'train',
    'eval_split': 'train',
  }
  fields |= {'image_size': 6, 'channels': None, 'resize': 'area'}
  return datasets.open_split(Settings(**fields | changes), role)


def write_tar(path, members):
  """Writes a tar file of (name, content or TarInfo)."""
  path.parent.mkdir(parents=True, exist_ok=True)
  with tarfile.open(path, 'w') as tar:
    for name, content in members:
      if isinstance(content, tarfile.TarInfo):
        tar.addfile(content)
        continue
      info = tarfile.TarInfo(name)
      info.size = len(content)
      tar.addfile(info, io.BytesIO(content))
  return path


def png(tmp_path, seed=0, shape=(6, 6, 3)):
  paint(tmp_path / 'one.png', seed, shape)
  return (tmp_path / 'one.png').read_bytes()


def store(tmp_path, kind):
  """Writes NAMES with their captions in one of KINDS; returns the path and the pixels by caption."""
  root = tmp_path / 'images'
  painted = {caption_of(name): paint(root / name, seed) for seed, name in enumerate(NAMES)}
  rows = [{'file_name': name, 'text': f' {caption_of(name)}\n'} for name in NAMES]
  if kind == 'captions.jsonl':
    below = [
      json.dumps({'file_name': f'./{k}.png', 'caption': caption_of(f'more/{k}.png')}) for k in range(4)
    ]
    (root / 'more' / kind).write_text('\r\n'.join(below))
    (root / kind).write_text('\n\n'.join(json.dumps(row) for row in rows[:4]) + '\n')
  elif kind == 'metadata.csv':
    quoted = [
      '"{}","{}",9'.format(row['file_name'], row['text'].replace('"', '""')) for row in rows[::-1]
    ]
    (root / kind).write_text('\ufefffile_name,text,size\n' + '\n'.join(quoted), encoding='utf-8')
  else:
    for row in rows:
      (root / row['file_name']).with_suffix('.txt').write_text(row['text'])
  if kind == 'zip':
    return zipped(root, tmp_path / 'images.zip'), painted
  if kind in ('tar', 'tars'):
    members = [(name, (root / name).read_bytes()) for name in NAMES]
    texts = [(row['file_name'].replace('.png', '.txt'), row['text'].encode()) for row in rows[:4]]
    found = [
      (
        row['file_name'].replace('.png', '.json'),
        json.dumps({'caption': row['text'], 'key': 7}).encode(),
      )
      for row in rows[3:]
    ]
    if kind == 'tar':
      return write_tar(tmp_path / 'all.tar', [*texts, *members, *found]), painted
    write_tar(tmp_path / 'tars' / '0.tar', [*members[:4], *texts])
    write_tar(tmp_path / 'tars' / 'deep' / '1.tar', [*members[4:], *found[1:]])
    return tmp_path / 'tars', painted
  return root, painted


@pytest.mark.parametrize('kind', KINDS)
def test_each_image_has_its_caption_and_the_set_keeps_the_contract(tmp_path, kind):
  path, painted = store(tmp_path, kind)
  images = open_captions(path)
  assert images.image_shape == (6, 6, 3) and images.classes == () and len(images) == 8
  found = {images.caption(k): images.read(k) for k in range(8)}
  assert found.keys() == painted.keys()
  for caption, (pixels, label) in found.items():
    assert pixels.dtype == np.uint8 and label == 0
    np.testing.assert_array_equal(pixels, painted[caption])
  batch = images.batch(np.array([5, 2, 5]))
  assert batch['cond'] is None and batch['valid'].all() and batch['skipped'] == ()
  for k, image in zip((5, 2, 5), batch['image'], strict=True):
    np.testing.assert_array_equal(image, images.read(k)[0])
  again = pickle.loads(pickle.dumps(images))
  assert again.identity == images.identity and again.caption(3) == images.caption(3)
  np.testing.assert_array_equal(again.read(3)[0], images.read(3)[0])
  part = open_captions(path, split='train[2:4]')
  assert [part.caption(k) for k in range(2)] == [images.caption(2), images.caption(3)]
  assert part.identity != images.identity
  with pytest.raises(UserError, match=r"dataset\.split='tset': there is no such split"):
    open_captions(path, split='tset')
  lines = '\n'.join(survey.lines(Settings('captions', str(path), split='train', eval_split='train')))
  assert 'to train on               8 images with captions' in lines


def test_every_way_to_store_captions_gives_the_same_examples_in_the_same_order(tmp_path):
  """Only tars of several files differ: their names are part of those of the images."""
  found = {}
  for kind in KINDS[:-1]:
    images = open_captions(store(tmp_path / kind.replace('.', ''), kind)[0])
    found[kind] = images.identity, images.captions
  assert len({identity for identity, _ in found.values()}) == 1
  assert all(order == found['txt'][1] for _, order in found.values())


def test_captions_stay_with_images_that_are_kept_in_memory_or_copied(tmp_path):
  path, painted = store(tmp_path, 'txt')
  original = open_captions(path)
  loader = Loader(original, in_memory_gb=1.0)
  assert sum(batch['mask'].sum() for batch in loader.in_order(4)) == 8
  loader.close()
  copied = Settings('captions', str(path), str(tmp_path / 'copy'), 'train', 'train', 6)
  preparing.prepare(copied, 0)
  copy = datasets.open_split(copied, 'train')
  assert isinstance(loader.images, datasets.InMemory) and copy.identity == original.identity
  for images in (loader.images, copy):
    for k in range(8):
      assert images.caption(k) == original.caption(k)
      np.testing.assert_array_equal(images.read(k)[0], painted[images.caption(k)])
  (tmp_path / 'copy' / 'train-captions.json').unlink()
  with pytest.raises(DamagedError, match=r'train-captions\.json is missing or damaged; run --mode=prep'):
    datasets.open_split(copied, 'train')
  preparing.prepare(copied, 0)
  assert datasets.open_split(copied, 'train').caption(0) == original.caption(0)


def test_another_caption_is_another_identity(tmp_path):
  path, _ = store(tmp_path, 'txt')
  before = open_captions(path).identity
  assert open_captions(path).identity == before
  (path / '2.txt').write_text('another')
  captions._samples.cache_clear()
  assert open_captions(path).identity != before


def test_splits_are_folders_or_the_first_words_of_the_names_of_tar_files(tmp_path):
  for split in ('train', 'val'):
    for k in range(3):
      paint(tmp_path / 'photos' / split / f'{k}.png', k)
    rows = [f'{k}.png,{split} {k}' for k in range(3)]
    (tmp_path / 'photos' / split / 'metadata.csv').write_text('\n'.join(['file_name,text', *rows]))
    sample = [('a.png', png(tmp_path)), ('a.txt', split.encode())]
    write_tar(tmp_path / 'shards' / f'{split}-00000.tar', sample)
  for path in (tmp_path / 'photos', tmp_path / 'shards'):
    sets = [open_captions(path, role, split='', eval_split='') for role in datasets.ROLES]
    assert [len(images) for images in sets] == [3, 3] if path.name == 'photos' else [1, 1]
    assert [images.caption(0).split()[0] for images in sets] == ['train', 'val']


def test_without_splits_readable_images_are_held_out_with_their_captions(tmp_path):
  path, painted = store(tmp_path, 'txt')
  order = [name.removeprefix(f'{path}/') for name, _ in open_captions(path).files]
  (path / order[-1]).write_bytes(b'broken')
  train, held_out = (open_captions(path, role, split='', eval_split='') for role in datasets.ROLES)
  assert [held_out.caption(k) for k in range(2)] == [caption_of(name) for name in order[-3:-1]]
  assert train.captions == [caption_of(name) for name in [*order[:-3], order[-1]]]
  np.testing.assert_array_equal(held_out.read(0)[0], painted[caption_of(order[-3])])
  with pytest.raises(BrokenImage, match=r'\.png is none of PNG'):
    train.read(5)


def test_a_bucket_is_read_like_a_folder(tmp_path):
  far = fsspec.filesystem('memory')
  expected = {}
  for kind in ('txt', 'tars'):
    path, _ = store(tmp_path / kind, kind)
    for file in path.rglob('*.*'):
      far.pipe_file(f'memory://{kind}-bucket/{file.relative_to(path)}', file.read_bytes())
    expected[kind] = open_captions(path)
    images = open_captions(f'memory://{kind}-bucket')
    assert (images.identity, images.captions) == (expected[kind].identity, expected[kind].captions)
    np.testing.assert_array_equal(images.read(1)[0], expected[kind].read(1)[0])
  single = open_captions('memory://tars-bucket/0.tar')
  assert len(single) == 4


def test_images_with_empty_captions_are_left_out_and_counted(tmp_path):
  path, _ = store(tmp_path, 'txt')
  (path / '0.txt').write_text(' \n')
  (path / '1.txt').write_bytes(b'')
  images = open_captions(path)
  assert len(images) == 6
  assert '2 with an empty caption, such as 0.png' in images.beside().lines()


REFUSED = {
  'an image without a caption': (
    lambda root: (root / '1.txt').unlink(),
    '1 of 8 images have no caption, such as 1.png; put the caption',
  ),
  'a caption without an image': (
    lambda root: (root / '1.png').unlink(),
    'there is a caption of 1.txt, but no such image (1 in total); restore the image',
  ),
  'no captions': (
    lambda root: [path.unlink() for path in root.rglob('*.txt')],
    'holds 8 images and no captions; add metadata.csv',
  ),
  'empty captions': (
    lambda root: [path.write_text('') for path in root.rglob('*.txt')],
    'all 8 captions are empty',
  ),
  'no text': (lambda root: (root / '1.txt').write_bytes(b'\xff\xfe'), '1.txt is not UTF-8 text'),
  'rows are missing': (
    lambda root: (root / 'metadata.csv').write_text('file_name,text\n1.png,one\n'),
    '7 of 8 images have no caption, such as 0.png; add rows to metadata.csv',
  ),
  'a row without an image': (
    lambda root: (root / 'metadata.csv').write_text('file_name,text\nx.png,one\n'),
    'there is a caption of x.png, but no such image',
  ),
  'no column of names': (
    lambda root: (root / 'metadata.csv').write_text('file,text\n1.png,one\n'),
    'metadata.csv, line 2 has no file_name',
  ),
  'no column of captions': (
    lambda root: (root / 'metadata.csv').write_text('file_name,title\n1.png,one\n'),
    'metadata.csv, line 2 has no caption: a text called text, caption or prompt is needed',
  ),
  'a path that leads out': (
    lambda root: (root / 'more' / 'metadata.csv').write_text('file_name,text\n../1.png,one\n'),
    'more/metadata.csv, line 2 names ../1.png, a path outside the folder of the table',
  ),
  'an absolute path': (
    lambda root: (root / 'metadata.jsonl').write_text('{"file_name": "/etc/passwd", "text": "a"}'),
    'metadata.jsonl, line 1 names /etc/passwd, a path outside',
  ),
  'two rows of an image': (
    lambda root: (root / 'metadata.csv').write_text('file_name,text\n1.png,one\n./1.png,two\n'),
    'metadata.csv, line 3 names 1.png, which already has a caption; keep one row per image',
  ),
  'a damaged table': (
    lambda root: (root / 'metadata.csv').write_text('file_name,text\n1.png,"one\n'),
    'metadata.csv is not valid CSV after line 1: unexpected end of data',
  ),
  'a damaged line': (
    lambda root: (root / 'metadata.jsonl').write_text('\n{"file_name": "1.png"'),
    'metadata.jsonl, line 2 is not valid JSON',
  ),
  'a line that is no object': (
    lambda root: (root / 'metadata.jsonl').write_text('["1.png", "a"]'),
    'metadata.jsonl, line 1 is not a JSON object',
  ),
  'tar files beside images': (
    lambda root: write_tar(root / 'a.tar', []),
    'holds tar files (a.tar) and images next to them (0.png)',
  ),
  'folders like splits': (
    lambda root: shutil.move(root / 'more', root / 'Test'),
    "has a folder 'Test'; folders of splits must be called train",
  ),
}


@pytest.mark.parametrize('case', REFUSED)
def test_captions_that_do_not_fit_are_refused_in_one_line(tmp_path, case):
  path, _ = store(tmp_path, 'txt')
  REFUSED[case][0](path)
  with pytest.raises(UserError) as caught:
    open_captions(path)
  assert str(caught.value).startswith(f'dataset.path={path}') and REFUSED[case][1] in str(caught.value)
  assert '\n' not in str(caught.value)
