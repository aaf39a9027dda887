"""Sets of images by name; and the digits, which come with scikit-learn."""

import dataclasses
import importlib.util
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from diffusion_distillation import datasets
from diffusion_distillation.datasets import Settings, digits, shapes, tfds
from diffusion_distillation.errors import UserError
from tests import tiny


def settings(name, **changes):
  fields = {'path': '', 'prepared': '', 'split': '', 'eval_split': '', 'image_size': 8}
  return Settings(name, **fields | {'channels': None, 'resize': 'area'} | changes)


def everything(images):
  return images.batch(np.arange(len(images)))


def test_digits_are_images_with_their_labels():
  train = datasets.open_split(settings('digits'), 'train')
  batch = everything(train)
  assert len(train) == 1437 and train.image_shape == (8, 8, 1) and train.classes == tuple('0123456789')
  assert batch['image'].shape == (1437, 8, 8, 1) and batch['image'].dtype == np.uint8
  assert batch['cond']['label'].dtype == np.int32 and np.bincount(batch['cond']['label']).min() > 100
  assert batch['valid'].all() and batch['skipped'] == ()
  levels = np.unique(batch['image'])
  np.testing.assert_array_equal(levels, np.round(np.arange(17) * 255 / 16))


def test_the_digits_are_read_from_the_file_or_else_by_importing_scikit_learn(monkeypatch):
  found = {}
  for case, (module, name, value) in {
    'file': (sys.modules, 'sklearn.datasets', None),  # cannot be imported
    'elsewhere': (vars(importlib.util), 'find_spec', lambda _: None),
  }.items():
    digits._table.cache_clear()
    with monkeypatch.context() as patch:
      patch.setitem(module, name, value)
      found[case] = datasets.open_split(settings('digits'), 'train').identity
  digits._table.cache_clear()
  assert found['file'] == found['elsewhere']


def test_every_digit_is_either_trained_on_or_held_out():
  bunch = load_digits()
  originals = [(image.tobytes(), label) for image, label in zip(bunch.images, bunch.target, strict=True)]
  found = []
  for role, count in (('train', 1437), ('eval', 360)):
    batch = everything(datasets.open_split(settings('digits'), role))
    assert len(batch['image']) == count
    sixteenths = np.round(batch['image'][..., 0] * (16 / 255))
    found += [
      (image.tobytes(), label) for image, label in zip(sixteenths, batch['cond']['label'], strict=True)
    ]
  assert sorted(found) == sorted(originals)
  assert found != originals
  assert len({image for image, _ in originals}) == 1797


def test_a_batch_holds_what_is_read_one_by_one():
  for name in ('digits', 'shapes'):
    images = datasets.open_split(settings(name), 'eval')
    indices = np.array([5, 2, 5])
    batch = images.batch(indices)
    for k, image, label in zip(indices, batch['image'], batch['cond']['label'], strict=True):
      np.testing.assert_array_equal(image, images.read(k)[0])
      assert label == images.read(k)[1]


def test_the_digits_are_the_same_every_time_and_can_be_sliced():
  whole = datasets.open_split(settings('digits'), 'train')
  part = datasets.open_split(settings('digits', split='train[100:110]'), 'train')
  assert datasets.open_split(settings('digits'), 'train').identity == whole.identity != part.identity
  np.testing.assert_array_equal(everything(part)['image'], whole.images[100:110])
  np.testing.assert_array_equal(everything(part)['cond']['label'], whole.labels[100:110])
  other = datasets.open_split(settings('digits', eval_split='train[100:110]'), 'eval')
  assert other.identity == part.identity


def test_sets_are_described_as_they_are(tmp_path):
  for animal in ('ant', 'bee', 'cat'):
    (tmp_path / animal).mkdir()
    for k in range(2):
      Image.new('L', (9, 9)).save(tmp_path / animal / f'{k}.png')
  expected = {
    settings('digits'): ((8, 8, 1), 10),
    settings('shapes', image_size=24): ((24, 24, 3), 6),
    settings('shapes', channels=1): ((8, 8, 1), 6),
    settings('folder', path=str(tmp_path)): ((8, 8, 3), 3),
    settings('folder', path=str(tmp_path), channels=1, image_size=4): ((4, 4, 1), 3),
  }
  for chosen, (shape, num_classes) in expected.items():
    assert datasets.describe(chosen) == (shape, num_classes)
    for role in datasets.ROLES:
      images = datasets.open_split(chosen, role)
      assert (images.image_shape, len(images.classes)) == (shape, num_classes)
      pixels, label = images.read(len(images) - 1)
      assert pixels.shape == shape and 0 <= label < num_classes


@pytest.mark.parametrize(
  ('name', 'image_size', 'channels', 'expected'),
  [
    ('cifar10', 32, None, ((32, 32, 3), 10)),
    ('celeb_a', 64, None, ((64, 64, 3), 0)),
    ('imagenet2012', 64, None, ((64, 64, 3), 1000)),
    ('lsun/bedroom', 128, None, ((128, 128, 3), 0)),
    ('lsun/church_outdoor', 128, 1, ((128, 128, 1), 0)),
    ('mnist', 28, None, ((28, 28, 1), 10)),
    ('mnist', 28, 3, ((28, 28, 3), 10)),
  ],
)
def test_known_sets_are_described_without_being_at_hand(
  monkeypatch, name, image_size, channels, expected
):
  monkeypatch.setattr(tfds, 'builder_of', None)
  assert datasets.describe(settings(name, image_size=image_size, channels=channels)) == expected


def test_the_copy_is_what_is_opened_and_described_where_there_is_one(tmp_path):
  for name in ('digits', 'mnist'):
    copied = settings(name, prepared=str(tmp_path / 'copy'))
    for look in (datasets.describe, lambda chosen: datasets.open_split(chosen, 'eval')):
      with pytest.raises(UserError, match=r'dataset\.prepared=.*/copy holds no finished copy'):
        look(copied)
  copied = settings('shapes', prepared=str(tmp_path / 'copy'))
  assert isinstance(datasets.open_original(copied, 'train'), shapes.Shapes)


@pytest.mark.parametrize(
  ('name', 'near'), [('digit', 'digits'), ('shape', 'shapes'), ('Folder', 'folder'), ('minst', 'mnist')]
)
def test_a_set_that_there_is_not_is_answered_with_the_nearest(tmp_path, name, near):
  for look in (datasets.describe, lambda chosen: datasets.open_split(chosen, 'train')):
    with pytest.raises(
      UserError, match=rf"^dataset\.name='{name}' is not known.*did you mean '{near}'\?$"
    ):
      look(settings(name, path=str(tmp_path)))


@pytest.mark.parametrize(
  ('name', 'changes', 'message'),
  [
    ('digits', {'image_size': 16}, r'^dataset\.image_size=16, .* size 8 with 1 channel$'),
    ('digits', {'channels': 3}, r'dataset\.channels=3: .* size 8 with 1 channel$'),
    ('digits', {'split': 'tset'}, r"^dataset\.split='tset': .* train, test, .* 'test'\?$"),
    ('digits', {'split': 'train[:0]'}, r"^dataset\.split='train\[:0\]' holds no image$"),
    ('shapes', {'channels': 2}, r'^dataset\.channels=2 must be 1 \(grey\) or 3$'),
    ('shapes', {'channels': 0}, r'^dataset\.channels=0 must be 1 \(grey\) or 3$'),
    ('shapes', {'channels': 4}, r'^dataset\.channels=4 must be 1 \(grey\) or 3$'),
    ('shapes', {'resize': 'nearest'}, r"^dataset\.resize='nearest' is not one of .*'area', 'bilinear'"),
    ('shapes', {'prepared': 'gs://a/b'}, r'^dataset\.prepared=gs://a/b: .* name a directory$'),
    ('folder', {}, r'^dataset\.name=folder needs dataset\.path'),
  ],
)
def test_settings_that_do_not_fit_are_refused(name, changes, message):
  with pytest.raises(UserError, match=message):
    datasets.open_split(settings(name, **changes), 'train')


def test_settings_come_from_the_config():
  section = tiny.config(dataset__split='train[:9]', dataset__eval_split='test[:5]').dataset
  chosen = Settings.of(section)
  assert dataclasses.asdict(chosen) == {key: section[key] for key in dataclasses.asdict(chosen)}
  assert (Settings.key('train'), Settings.key('eval')) == ('dataset.split', 'dataset.eval_split')
  assert [len(datasets.open_split(chosen, role)) for role in datasets.ROLES] == [9, 5]


def test_a_split_is_the_sets_own_unless_the_config_names_one():
  own = ('mine', 'yours')
  assert [settings('digits').spec(role, own) for role in datasets.ROLES] == ['mine', 'yours']
  given = settings('digits', split='a', eval_split='b')
  assert [given.spec(role, own) for role in datasets.ROLES] == ['a', 'b']
  assert [settings('digits', eval_split='b').spec(role, own) for role in datasets.ROLES] == ['mine', 'b']


@pytest.mark.parametrize(('channels', 'expected'), [(None, [1, 3]), (1, [1, 1]), (3, [3, 3])])
def test_channels_are_the_sets_own_unless_the_config_says(channels, expected):
  chosen = settings('mnist', image_size=28, channels=channels, resize='lanczos')
  decoders = [chosen.decoder(own) for own in (1, 3)]
  assert [decoder.channels for decoder in decoders] == expected
  assert {(decoder.size, decoder.resize) for decoder in decoders} == {(28, 'lanczos')}
