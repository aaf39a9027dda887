import importlib.util
import io
import pathlib
import re
import shlex
import shutil
import sys

import numpy as np
import pytest
import tensorflow_datasets

from diffusion_distillation import datasets
from diffusion_distillation.datasets.image_set import BrokenImage
from diffusion_distillation.errors import DamagedError, UserError
from tests import tiny_pictures
from tests.tiny_pictures import by_pixels, found

Image, ClassLabel = tensorflow_datasets.features.Image, tensorflow_datasets.features.ClassLabel
COLOUR = Image(shape=(None, None, 3))
TRAIN, TEST = range(20), range(20, 26)


def open_set(path, name='tiny_pictures', role='train', **given):
  return datasets.open_split(tiny_pictures.settings(name, path=path, **given), role)


@pytest.fixture(scope='module')
def pristine(tmp_path_factory):
  """A prepared set; tests only read it, or copy it."""
  path = tmp_path_factory.mktemp('tfds')
  splits = {'train': TRAIN, 'test': TEST}
  tiny_pictures.prepare(path, {name: map(tiny_pictures.example, ks) for name, ks in splits.items()})
  return path


@pytest.fixture
def path(pristine, tmp_path):
  return shutil.copytree(pristine, tmp_path / 'tensorflow datasets')  # people's paths have spaces


def test_images_labels_and_classes_come_back_without_tensorflow(pristine, monkeypatch):
  asked = []

  class Finder:
    @staticmethod
    def find_spec(name, *_):
      asked.append(name.split('.')[0])

  monkeypatch.setattr(sys, 'meta_path', [Finder, *sys.meta_path])
  for role, ks in (('train', TRAIN), ('eval', TEST)):
    images = open_set(pristine, role=role)
    assert found(images) == by_pixels(ks)
    assert images.classes == ('blue', 'green', 'red') and images.image_shape == (8, 8, 3)
    assert images.name == 'tiny_pictures'
  assert 'tensorflow' not in asked and 'tensorflow' not in sys.modules


def test_a_set_is_described_as_it_is_found(pristine):
  given = tiny_pictures.settings('tiny_pictures', path=pristine, image_size=4)
  assert datasets.describe(given) == ((4, 4, 3), 3)
  assert datasets.open_split(given, 'train').read(0)[0].shape == (4, 4, 3)


def test_splits_can_be_sliced_and_added(pristine):
  whole = [open_set(pristine).read(k)[0].tobytes() for k in range(20)]
  test = [open_set(pristine, role='eval').read(k)[0].tobytes() for k in range(6)]
  for spec, expected in {
    'train[:30%]': whole[:6],
    'train[15:]': whole[15:],
    'train[-3:]+test': whole[-3:] + test,
    'train[2:4]+train[2:4]': whole[2:4] * 2,
  }.items():
    for role, key in (('train', 'split'), ('eval', 'eval_split')):
      images = open_set(pristine, role=role, **{key: spec})
      assert [images.read(k)[0].tobytes() for k in range(len(images))] == expected


@pytest.mark.parametrize(
  ('role', 'spec', 'message'),
  [
    ('train', 'trian', r"dataset\.split='trian': .* splits are train, test, .*did you mean 'train'"),
    ('eval', 'tast[:3]', r"dataset\.eval_split='tast\[:3\]': .*did you mean 'test'"),
    ('train', 'train[:90', r"dataset\.split='train\[:90': .* sliced, such as train\[:90%\]$"),
    ('train', 'train[3:3]', r"dataset\.split='train\[3:3\]'"),
    ('eval', 'test[:1%]', r"dataset\.eval_split='test\[:1%\]'"),
    ('eval', 'train[5:500]', r"dataset\.eval_split='train\[5:500\]'"),
  ],
)
def test_splits_that_there_are_not_are_refused(role, spec, message, pristine):
  key = 'split' if role == 'train' else 'eval_split'
  with pytest.raises(UserError, match=message):
    open_set(pristine, role=role, **{key: spec})


def test_the_identity_tells_splits_and_versions_apart(tmp_path):
  for version in ('1.0.0', '1.0.1'):
    both = {'train': map(tiny_pictures.example, TRAIN), 'test': map(tiny_pictures.example, TEST)}
    tiny_pictures.prepare(tmp_path, both, version=version)
  given = [{'role': 'train'}, {'role': 'eval'}, {'split': 'train[:10]'}, {'split': 'train[10:]'}]
  names = ('tiny_pictures/1.0.0', 'tiny_pictures/1.0.1')
  assert len({open_set(tmp_path, name, **g).identity for name in names for g in given}) == 8
  assert open_set(tmp_path).identity == open_set(tmp_path, names[1]).identity


@pytest.mark.parametrize(('own', 'channels'), [(1, 1), (3, 3), (4, 3), (None, 3)])
def test_channels_are_those_of_the_feature_unless_given(own, channels, tmp_path):
  tiny_pictures.prepare_one(tmp_path, {'image': Image(shape=(None, None, own))})
  image, label = open_set(tmp_path).read(0)
  assert image.shape == (8, 8, channels) and label == 0
  if own in (1, 3):
    expected = tiny_pictures.pixels(5, (9, 8, own))[:8]
    np.testing.assert_array_equal(image, expected)
  for given in (1, 3):
    images = open_set(tmp_path, channels=given)
    assert images.read(0)[0].shape == images.image_shape == (8, 8, given)


@pytest.mark.parametrize(
  ('features', 'label', 'classes'),
  [
    ({'image': COLOUR}, 0, ()),
    ({'image': COLOUR, 'kind': ClassLabel(names=list('abc'))}, 1, ('a', 'b', 'c')),
    ({'image': COLOUR, 'kind': ClassLabel(num_classes=3)}, 1, ('0', '1', '2')),
    ({'image': COLOUR, 'kind': ClassLabel(num_classes=3), 'label': ClassLabel(num_classes=9)}, 5, 9),
    ({'image': COLOUR, 'kind': ClassLabel(num_classes=3), 'age': ClassLabel(num_classes=9)}, 0, ()),
  ],
)
def test_the_label_is_the_one_of_that_name_or_the_only_one(features, label, classes, tmp_path):
  tiny_pictures.prepare_one(tmp_path, features)
  images = open_set(tmp_path)
  assert images.read(0)[1] == label
  assert images.classes == (tuple(map(str, range(classes))) if isinstance(classes, int) else classes)
  assert (images.batch(np.array([0]))['cond'] is None) == (not images.classes)


def test_the_image_is_the_one_of_that_name_or_the_only_one(tmp_path):
  tiny_pictures.prepare_one(tmp_path / 'one', {'photo': COLOUR})
  tiny_pictures.prepare_one(tmp_path / 'two', {'image': COLOUR, 'mask': COLOUR})
  for which in ('one', 'two'):  # 'photo' and 'image' are pictures 5, 'mask' is 4
    image, _ = open_set(tmp_path / which).read(0)
    np.testing.assert_array_equal(image, tiny_pictures.pixels(5, (9, 8, 3))[:8])


def test_a_set_without_an_image_or_with_two_is_refused(tmp_path):
  other = tensorflow_datasets.features.Text()
  for path, features in (
    ('two', {'left': COLOUR, 'right': COLOUR}),
    ('none', {'text': other, 'note': other}),
  ):
    tiny_pictures.prepare_one(tmp_path / path, features)
    with pytest.raises(UserError, match='is not a dataset of images: it has') as caught:
      open_set(tmp_path / path)
    assert set(str(caught.value).split('features ')[1].split(', ')) == set(features)


def test_an_example_that_is_no_image_is_broken_and_named(tmp_path):
  examples = [{'image': io.BytesIO(b'a text'), 'label': 2}]
  tiny_pictures.prepare(tmp_path, {'train': examples})
  with pytest.raises(BrokenImage, match=r'^example 0 is none of PNG'):
    open_set(tmp_path).read(0)


def test_the_newest_version_is_read_unless_one_is_named(tmp_path):
  for count, version in enumerate(('1.9.0', '1.10.0', '1.2.11'), 1):
    examples = map(tiny_pictures.example, range(count))
    tiny_pictures.prepare(tmp_path, {'train': examples}, version=version)
  (tmp_path / 'tiny_pictures' / '2.0.0').mkdir()  # begun, not finished
  other = shutil.copytree(tmp_path / 'tiny_pictures' / '1.9.0', tmp_path / 'incomplete.ABC_3.0.0')
  other.rename(tmp_path / 'tiny_pictures' / other.name)
  sizes = {'': 2, '/1.9.0': 1, '/1.10.0': 2, '/1.2.11': 3}
  assert {name: len(open_set(tmp_path, f'tiny_pictures{name}')) for name in sizes} == sizes


def test_configs_are_part_of_the_name(tmp_path):
  for count, config in enumerate(('bedroom', 'church'), 1):
    examples = map(tiny_pictures.example, range(count))
    tiny_pictures.prepare(tmp_path, {'train': examples}, config=config)
  sizes = {'bedroom': 1, 'church': 2, 'church/1.0.0': 2}
  assert {name: len(open_set(tmp_path, f'tiny_pictures/{name}')) for name in sizes} == sizes


def test_sets_are_looked_for_where_tensorflow_datasets_keeps_them(path, tmp_path, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(path))
  assert len(open_set('')) == 20
  monkeypatch.delenv('TFDS_DATA_DIR')
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  path.rename((tmp_path / 'home').mkdir() or tmp_path / 'home' / 'tensorflow_datasets')
  assert len(open_set('')) == 20
  assert len(open_set('~/tensorflow_datasets')) == 20


def test_a_set_of_another_format_can_be_read_after_the_conversion_that_the_message_names(path):
  directory = path / 'tiny_pictures' / '1.0.0'
  info = directory / 'dataset_info.json'
  original = info.read_text()
  info.write_text(original.replace('"array_record"', '"tfrecord"'))
  with pytest.raises(UserError, match='holds tfrecord, which cannot be read by index') as caught:
    open_set(path)
  message = str(caught.value)
  command = re.search(r'&& (tfds convert_format .*); then set', message)[1]
  words = shlex.split(command)
  given = dict(word.removeprefix('--').split('=') for word in words[2:])
  assert words[:2] == ['tfds', 'convert_format']
  assert given.keys() == {'dataset_version_dir', 'out_file_format', 'out_dir'}
  assert given['dataset_version_dir'] == str(directory) and given['out_file_format'] == 'array_record'
  shutil.copytree(directory, given['out_dir'])
  (pathlib.Path(given['out_dir']) / 'dataset_info.json').write_text(original)
  assert len(open_set(re.search(r'set dataset\.path=(.*)$', message)[1])) == 20


def without_tensorflow(monkeypatch, there=False):
  """As if TensorFlow were not installed (or were)."""
  original = importlib.util.find_spec
  monkeypatch.setattr(
    importlib.util,
    'find_spec',
    lambda name, *a: there or None if name == 'tensorflow' else original(name, *a),
  )


def test_what_is_not_prepared_is_prepared_by_the_command_of_the_message(tmp_path, monkeypatch):
  without_tensorflow(monkeypatch)
  where = tmp_path / "ann's sets"
  with pytest.raises(UserError) as caught:
    open_set(where, 'lsun/bedroom')
  message = str(caught.value)
  assert (
    f"'lsun/bedroom' is not prepared: there is no {where}/lsun/bedroom/VERSION/dataset_info" in message
  )
  assert "pip install -e '.[tf]'" in message and '\n' not in message
  words = shlex.split(message[message.index('python -c ') :])
  assert words[:2] == ['python', '-c'] and len(words) == 3
  calls = []

  class Builder:
    def __init__(self, *args, **kwargs):
      calls.append((args, kwargs))

    def download_and_prepare(self):
      calls.append('prepared')

  monkeypatch.setattr(tensorflow_datasets, 'builder', Builder)
  exec(words[2], {})
  assert calls == [
    (('lsun/bedroom',), {'data_dir': str(where), 'file_format': 'array_record'}),
    'prepared',
  ]


@pytest.mark.parametrize('there', [False, True])
@pytest.mark.parametrize(
  ('name', 'hint'),
  [('mnst', 'mnist'), ('digit', 'digits'), ('shape', 'shapes'), ('caltech100', 'caltech101')],
)
def test_an_unknown_name_is_answered_with_the_nearest(name, hint, there, tmp_path, monkeypatch):
  without_tensorflow(monkeypatch, there)
  with pytest.raises(
    UserError, match=rf"dataset\.name='{name}' is not known: .*did you mean '{hint}'\?"
  ):
    open_set(tmp_path, name)


def test_with_tensorflow_a_set_is_prepared_when_it_is_first_asked_for(tmp_path, monkeypatch):
  without_tensorflow(monkeypatch, there=True)
  asked = []

  def builder(name, data_dir, file_format):
    asked.append((name, file_format))
    return tiny_pictures.builder(data_dir, {'train': map(tiny_pictures.example, TRAIN)}, name='Mnist')

  monkeypatch.setattr(tensorflow_datasets, 'builder', builder)
  for _ in range(2):
    assert found(open_set(tmp_path, 'mnist')) == by_pixels(TRAIN)
  assert asked == [('mnist', 'array_record')]


@pytest.mark.parametrize(
  ('error', 'line'),
  [
    (AssertionError('\nManual download required.\nPlease visit ...\n'), 'Manual download required.'),
    (ConnectionError(), 'ConnectionError()'),
  ],
)
def test_a_download_that_fails_is_one_line(error, line, tmp_path, monkeypatch):
  without_tensorflow(monkeypatch, there=True)

  def builder(*_, **__):
    raise error

  monkeypatch.setattr(tensorflow_datasets, 'builder', builder)
  with pytest.raises(UserError) as caught:
    open_set(tmp_path, 'imagenet2012')
  assert str(caught.value) == f"dataset 'imagenet2012' cannot be prepared in {tmp_path}: {line}"


def flip(path):
  data = bytearray(path.read_bytes())
  data[data.index(b'IDAT') + 20] ^= 1
  path.write_bytes(data)


DAMAGE = {
  'flipped byte': ('array_record', flip),
  'cut': ('array_record', lambda path: path.write_bytes(path.read_bytes()[:70000])),
  'cut in half': ('array_record', lambda path: path.write_bytes(path.read_bytes()[:65536])),
  'empty': ('array_record', lambda path: path.write_bytes(b'')),
  'missing': ('array_record', pathlib.Path.unlink),
  'dataset_info.json': ('dataset_info.json', lambda path: path.write_text(path.read_text()[:40])),
  'features.json': ('features.json', lambda path: path.write_text('{')),
}


@pytest.mark.parametrize('kind', DAMAGE)
def test_damaged_files_are_an_error_of_one_line_and_not_broken_images(kind, path):
  part, damage = DAMAGE[kind]
  (file,) = [p for p in path.rglob('*') if part in p.name and 'test' not in p.name]
  damage(file)
  with pytest.raises(DamagedError, match=r'prepare the dataset again') as caught:
    images = open_set(path)
    for k in range(len(images)):
      images.read(k)
  assert 'tiny_pictures' in str(caught.value) and '\n' not in str(caught.value)


@pytest.mark.parametrize(
  ('name', 'channels', 'expected'),
  [('mnist', None, ((9, 9, 1), 10)), ('lsun/bedroom', 1, ((9, 9, 1), 0))],
)
def test_known_sets_are_described_without_being_there(name, channels, expected, tmp_path):
  given = tiny_pictures.settings(name, path=tmp_path, image_size=9, channels=channels)
  assert datasets.describe(given) == expected


def test_for_evaluation_is_the_test_split_or_the_one_for_validation_or_what_is_known(tmp_path):
  names = ['train', 'validation', 'test']
  for name, count in (('Imagenet2012', 3), ('TwoSplits', 2), ('ThreeSplits', 3)):
    splits = {split: [tiny_pictures.example(k)] for k, split in enumerate(names[:count])}
    tiny_pictures.prepare(tmp_path, splits, name=name)
  for name, k in (('imagenet2012', 1), ('two_splits', 1), ('three_splits', 2)):
    assert found(open_set(tmp_path, name, 'eval')) == by_pixels([k])


def test_a_bucket_is_refused():
  with pytest.raises(
    UserError, match=r'dataset\.path=gs://sets: ArrayRecord files can only be read from disk'
  ):
    open_set('gs://sets')
