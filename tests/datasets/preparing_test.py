import dataclasses
import json
import os
import pathlib
import re
import shutil
import signal

import numpy as np
import pytest

from diffusion_distillation import datasets
from diffusion_distillation.datasets import loading, prepared, preparing, shapes
from diffusion_distillation.errors import DamagedError, Preempted, UserError
from diffusion_distillation.system import interrupts
from tests import tiny_pictures
from tests.tiny_pictures import examples

COUNT, BROKEN = 29, (5, 11, 12)
SHARD_BYTES = 10 * 8 * 8 * 3 + 100  # ten images of colour
SHARDS = ['eval-00000-of-00001', *(f'train-{k:05d}-of-00003' for k in range(3))]
FILES = {'info.json', *(f'{shard}.array_record' for shard in SHARDS)}
DRAWN = tiny_pictures.settings('shapes', split=f'train[:{COUNT}]', eval_split='test[:7]')


def to(directory, settings=DRAWN, **changes):
  return dataclasses.replace(settings, prepared=str(directory), **changes)


def prepare(directory, settings=DRAWN, **changes):
  return preparing.prepare(to(directory, settings, **changes), workers=0, shard_bytes=SHARD_BYTES)


def content(directory):
  return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != '.lock'}


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
  return tiny_pictures.sources(tmp_path_factory.mktemp('sources'), COUNT, BROKEN)


@pytest.fixture(scope='module')
def pristine(tmp_path_factory):
  """A finished copy of drawn shapes; tests only read it, or copy it."""
  directory = tmp_path_factory.mktemp('pristine') / 'copy'
  assert prepare(directory) == {'train': 0, 'eval': 0}
  assert set(content(directory)) == FILES
  return directory


@pytest.fixture
def copy(pristine, tmp_path):
  return pathlib.Path(shutil.copytree(pristine, tmp_path / 'copy'))


@pytest.mark.parametrize('kind', ['digits', 'shapes', 'folder', 'zip', 'tfds'])
def test_a_copy_is_the_original_bit_for_bit_with_its_broken_images_and_all_that_is_known(
  sources, kind, tmp_path
):
  counts = prepare(tmp_path / 'new' / 'copy', sources[kind])
  for role in datasets.ROLES:
    original = datasets.open_split(sources[kind], role)
    read_back = datasets.open_split(to(tmp_path / 'new' / 'copy', sources[kind]), role)
    assert examples(read_back) == examples(original)
    for name in ('name', 'image_shape', 'classes', 'identity'):
      assert getattr(read_back, name) == getattr(original, name)
    assert counts[role] == sum(isinstance(example, str) for example in examples(original))
  assert counts['train'] == (len(BROKEN) if kind in ('folder', 'zip') else 0)
  assert datasets.describe(to(tmp_path / 'new' / 'copy', sources[kind])) == datasets.describe(
    sources[kind]
  )


def test_a_record_is_the_label_and_the_pixels_or_a_mark_and_the_reason(sources, tmp_path):
  from array_record.python import array_record_data_source

  prepare(tmp_path, sources['folder'])
  original = datasets.open_split(sources['folder'], 'train')
  info = json.loads((tmp_path / 'info.json').read_text())
  position, broken = 0, {}
  for path in sorted(tmp_path.glob('train-*')):
    for record in array_record_data_source.ArrayRecordDataSource([str(path)]):
      label = int.from_bytes(record[:4], 'little', signed=True)
      if label == prepared.BROKEN:
        broken[str(position)] = record[4:].decode()
        assert 'cannot be decoded' in broken[str(position)]
      else:
        image, expected = original.read(position)
        assert label == expected and record[4:] == image.tobytes()
      position += 1
  assert position == COUNT and len(broken) == len(BROKEN)
  assert info['splits']['train']['broken'] == broken


def test_processes_write_the_same_files(pristine, tmp_path, monkeypatch):
  monkeypatch.setattr(shapes.Shapes, 'check', lambda self, key: None)
  monkeypatch.setattr(shapes.Shapes, 'read', None)  # in this process
  preparing.prepare(to(tmp_path / 'copy'), workers=2, shard_bytes=SHARD_BYTES)
  assert content(tmp_path / 'copy') == content(pristine)


def test_images_without_a_known_label_are_copied_too(tmp_path):
  """Test splits of tensorflow-datasets have -1 for labels that are not public."""
  unknown = [tiny_pictures.example(k) | {'label': -1} for k in range(4)]
  known = [tiny_pictures.example(k) for k in range(4)]
  tiny_pictures.prepare(tmp_path / 'tfds', {'train': known, 'test': unknown})
  settings = tiny_pictures.settings('tiny_pictures', path=tmp_path / 'tfds')
  assert prepare(tmp_path / 'copy', settings) == {'train': 0, 'eval': 0}
  original = datasets.open_split(settings, 'eval')
  assert examples(datasets.open_split(to(tmp_path / 'copy', settings), 'eval')) == examples(original)


def stop_at(position, how, monkeypatch):
  """Reading shape `position` of the training set fails, or sends a signal."""
  read = shapes.Shapes.read

  def failing(self, k):
    if k == position and len(self) == COUNT:
      if how == 'signal':
        os.kill(os.getpid(), signal.SIGTERM)
      else:
        raise OSError('the disk is gone')
    return read(self, k)

  monkeypatch.setattr(preparing, '_BATCH', 2)
  monkeypatch.setattr(loading, '_cores', lambda: 1)  # how far ahead of the writing it is read
  monkeypatch.setattr(shapes.Shapes, 'read', failing)


@pytest.fixture
def signals():
  """Signals are noticed as in a run, and afterwards as before."""
  before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
  interrupts.install()
  yield
  for number, handler in before.items():
    signal.signal(number, handler)
  interrupts._received.clear()


@pytest.mark.parametrize(('how', 'error'), [('signal', Preempted), ('failure', OSError)])
def test_interrupted_and_called_again_it_keeps_whole_files_and_ends_like_the_uninterrupted_copy(
  how, error, pristine, tmp_path, monkeypatch, signals
):
  directory = tmp_path / 'copy'
  with monkeypatch.context() as patch:
    stop_at(25, how, patch)
    with pytest.raises(error):
      prepare(directory)
  interrupts.install()
  finished = {path: path.stat() for path in directory.glob('*.array_record')}
  assert {path.name for path in finished} == {f'train-{k:05d}-of-00003.array_record' for k in range(2)}
  with pytest.raises(UserError, match=r'no finished copy; .*--mode=prepare'):
    datasets.open_split(to(directory), 'train')
  prepare(directory)
  assert content(directory) == content(pristine)
  for path, before in finished.items():
    now = path.stat()
    assert (now.st_ino, now.st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_broken_images_of_files_before_an_interruption_are_still_counted_after_it(
  sources, tmp_path, monkeypatch
):
  expected = prepare(tmp_path / 'uninterrupted', sources['folder'])
  write_shard, written = preparing.write_shard, []

  def failing(path, *args):
    if len(written) == 2:
      raise OSError('no space left on device')
    written.append(path)
    return write_shard(path, *args)

  with monkeypatch.context() as patch:
    patch.setattr(preparing, 'write_shard', failing)
    with pytest.raises(OSError, match='no space'):
      prepare(tmp_path / 'copy', sources['folder'])
  assert prepare(tmp_path / 'copy', sources['folder']) == expected
  assert content(tmp_path / 'copy') == content(tmp_path / 'uninterrupted')
  assert prepare(tmp_path / 'copy', sources['folder']) == expected


def test_a_finished_copy_is_not_written_or_read_again(copy, monkeypatch):
  before = {path: path.stat().st_mtime_ns for path in copy.glob('*.array_record')}
  monkeypatch.setattr(shapes.Shapes, 'read', None)
  prepare(copy)
  assert {path: path.stat().st_mtime_ns for path in copy.glob('*.array_record')} == before
  assert set(content(copy)) == FILES


def cut(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  data = bytearray(path.read_bytes())
  data[data.index(shapes.draw(shapes.parameters(14), 8, 3).tobytes()) + 50] ^= 1
  path.write_bytes(data)


SHARD = 'train-00001-of-00003.array_record'
DAMAGE = {
  'cut': (SHARD, cut),
  'cut to nothing': (SHARD, lambda path: path.write_bytes(b'')),
  'longer': (SHARD, lambda path: path.write_bytes(path.read_bytes() + b'x')),
  'missing': (SHARD, pathlib.Path.unlink),
  'flipped byte': (SHARD, flip),
  'no JSON': ('info.json', cut),
  'other JSON': ('info.json', lambda path: path.write_text('{"dataset": {}}')),
  'a list': ('info.json', lambda path: path.write_text('[]')),
}


def read_all(directory):
  return [examples(datasets.open_split(to(directory), role)) for role in datasets.ROLES]


@pytest.mark.parametrize('kind', DAMAGE)
def test_damage_is_an_error_that_says_what_to_remove_and_that_is_enough(kind, copy, pristine):
  name, damage = DAMAGE[kind]
  damage(copy / name)
  with pytest.raises(DamagedError, match='run --mode=prepare again') as caught:
    read_all(copy)
  message = str(caught.value)
  assert '\n' not in message
  named = pathlib.Path(re.match(r'(\S+?):? ', message)[1])
  assert named in (copy, copy / name)
  if 'remove it' in message:
    shutil.rmtree(named) if named.is_dir() else named.unlink()
  prepare(copy)
  assert content(copy) == content(pristine)
  assert read_all(copy) == read_all(pristine)


@pytest.mark.parametrize('kind', ['cut', 'cut to nothing', 'longer'])
def test_prepared_again_a_damaged_file_is_not_taken_for_a_whole_one(kind, copy, pristine):
  name, damage = DAMAGE[kind]
  damage(copy / name)
  try:
    prepare(copy)
  except DamagedError as error:
    assert str(copy / name) in str(error)
  else:
    assert content(copy) == content(pristine)


def test_images_beside_a_flipped_byte_are_read(copy):
  flip(copy / SHARD)
  images = datasets.open_split(to(copy), 'train')
  for k in (9, 13, 15, 20):
    np.testing.assert_array_equal(images.read(k)[0], shapes.draw(shapes.parameters(k), 8, 3))
  with pytest.raises(DamagedError, match=f'^{re.escape(str(copy / SHARD))} is damaged'):
    images.read(14)


@pytest.mark.parametrize(
  'changes',
  [
    {'image_size': 16},
    {'channels': 1},
    {'resize': 'lanczos'},
    {'split': 'train[:30]'},
    {'eval_split': 'test', 'image_size': 4},
    {'name': 'folder'},
  ],
)
def test_other_settings_than_those_of_the_copy_are_refused_by_their_names(changes, copy, sources):
  path = sources['folder'].path
  spec = {'split': 'train', 'eval_split': 'train'} if 'name' in changes else {}
  for act in (lambda s: datasets.open_split(s, 'train'), lambda s: preparing.prepare(s, 0, SHARD_BYTES)):
    with pytest.raises(UserError) as caught:
      act(to(copy, path=path if spec else '', **spec | changes))
    named = re.findall(r'dataset\.(\w+) was (\S+), is (\S+?)(?:;|$)', str(caught.value))
    assert named == [
      (field.name, str(getattr(DRAWN, field.name)), str((spec | changes)[field.name]))
      for field in dataclasses.fields(DRAWN)
      if field.name in spec | changes
    ]


def test_a_copy_of_another_format_is_refused(copy):
  text = (copy / 'info.json').read_text()
  (copy / 'info.json').write_text(text.replace(f'"format": {prepared.FORMAT}', '"format": 0'))
  with pytest.raises(UserError, match=rf'dataset\.format was 0, is {prepared.FORMAT}$'):
    datasets.open_split(to(copy), 'train')


def test_where_the_original_lies_does_not_matter_but_what_it_is(sources, tmp_path):
  prepare(tmp_path / 'copy', sources['folder'])
  moved = shutil.copytree(sources['folder'].path, tmp_path / 'moved' / 'folder')
  prepare(tmp_path / 'copy', sources['folder'], path=str(moved))
  elsewhere = shutil.copytree(moved, tmp_path / 'elsewhere')
  with pytest.raises(UserError, match=r'dataset\.path was folder, is elsewhere'):
    prepare(tmp_path / 'copy', sources['folder'], path=str(elsewhere))
  other = shutil.copytree(moved, tmp_path / 'other' / 'folder')
  (other / 'red' / 'new.png').write_bytes(tiny_pictures.png(99))
  with pytest.raises(
    UserError, match=r'begun with other images \(train: num_images was 29, is 30.*remove it'
  ):
    prepare(tmp_path / 'copy', sources['folder'], path=str(other))
  larger = shutil.copytree(moved, tmp_path / 'larger' / 'folder')
  (larger / 'red' / '2.png').write_bytes(tiny_pictures.png(2, (99, 99, 3)))
  with pytest.raises(UserError, match='begun with other images'):
    prepare(tmp_path / 'copy', sources['folder'], path=str(larger))


def test_a_copy_is_read_without_the_original(sources, tmp_path):
  original = shutil.copytree(sources['folder'].path, tmp_path / 'original')
  prepare(tmp_path / 'copy', sources['folder'], path=str(original))
  shutil.rmtree(original)
  read_back = datasets.open_split(to(tmp_path / 'copy', sources['folder'], path=''), 'train')
  assert examples(read_back)[0] == examples(datasets.open_split(sources['folder'], 'train'))[0]


def test_directories_that_hold_something_else_or_cannot_be_are_refused(tmp_path):
  (tmp_path / 'thesis.tex').write_text('dear reader')
  with pytest.raises(UserError, match='is not empty, and holds no copy; name another'):
    prepare(tmp_path)
  with pytest.raises(UserError, match=r'cannot write to .*thesis\.tex'):
    prepare(tmp_path / 'thesis.tex' / 'copy')
  with pytest.raises(UserError, match=r'thesis\.tex'):
    prepare(tmp_path / 'thesis.tex')
  assert content(tmp_path) == {'thesis.tex': b'dear reader'}


def test_without_a_directory_nothing_is_prepared():
  with pytest.raises(UserError, match=r'needs dataset\.prepared'):
    preparing.prepare(DRAWN, workers=0)


@pytest.mark.parametrize('name', ['nowhere', 'empty'])
def test_what_is_not_there_is_not_read(name, tmp_path):
  (tmp_path / 'empty').mkdir()
  with pytest.raises(UserError, match=rf'{name} holds no finished copy; .*--mode=prepare, or leave'):
    datasets.open_split(to(tmp_path / name), 'train')


def test_an_empty_directory_may_be_used_and_a_disk_that_is_too_small_not(
  pristine, tmp_path, monkeypatch
):
  size, usage = (COUNT + 7) * (8 * 8 * 3 + 4), shutil.disk_usage(tmp_path)
  for free in (size - 1, size):
    monkeypatch.setattr(shutil, 'disk_usage', lambda _, free=free: usage._replace(free=free))
    if free < size:
      with pytest.raises(UserError, match=r'needs .* GB, but .* GB are free'):
        prepare(tmp_path)
    else:
      prepare(tmp_path)
  assert content(tmp_path) == content(pristine)
