"""Splits and classes, read off the names of files."""

import numpy as np
import pytest

from diffusion_distillation.datasets.folder import arrange


@pytest.mark.parametrize(
  ('names', 'expected'),
  [
    ('1 2', 'train train'),
    ('a/1 a/2', 'train train'),
    ('x/y/1 x/y/2', 'train train'),
    ('1', 'train'),
    ('x/1', 'train'),
    ('test/1 test/2', 'train train'),
    ('cat/1 ant/1', 'train:cat train:ant'),
    ('x/cat/1 x/ant/1', 'train:cat train:ant'),
    ('cat/1 cat/deep/er/2 ant/deep/1', 'train:cat train:cat train:ant'),
    ('train/1 test/1 train/2', 'train test train'),
    ('x/train/cat/1 x/train/ant/1 x/val/cat/2', 'train:cat train:ant val:cat'),
    ('train/a/1 test/a/1', 'train test'),
    ('train/1 valid/1 validation/1 test/1 val/1', 'train valid validation test val'),
    ('train/1 plane/1 car/1', 'train:train train:plane train:car'),
    ('train/cat/1 test/ant/1', 'train:cat test:ant'),
  ],
)
def test_splits_and_classes_are_read_off_the_names(names, expected):
  tree = arrange(names.split())
  found = {}
  for split, files in tree.files.items():
    found |= {name: f'{split}:{tree.classes[label]}' if tree.classes else split for name, label in files}
  assert found == dict(zip(names.split(), expected.split(), strict=True))
  assert list(tree.classes) == sorted(tree.classes)
  assert all(tree.files.values()) and sum(map(len, tree.files.values())) == len(found)


@pytest.mark.parametrize(
  ('names', 'inside', 'beside'),
  [
    (['cat/1.png', '2.png', '3.png'], 'cat/1.png', '2.png'),
    (['x/cat/1.png', 'x/2.png'], 'x/cat/1.png', 'x/2.png'),
    (['train/cat/1.png', 'train/2.png', 'test/3.png'], 'train/cat/1.png', 'test/3.png'),
    (['train/cat/1.png', 'test/3.png'], 'train/cat/1.png', 'test/3.png'),
    (['train/1.png', 'rest/2.png', '3.png'], 'rest/2.png', '3.png'),
  ],
)
def test_images_in_folders_and_beside_them_are_refused(names, inside, beside):
  with pytest.raises(ValueError, match='in folders') as caught:
    arrange(names)
  assert f'({inside})' in str(caught.value) and f'({beside})' in str(caught.value)


def test_the_order_depends_on_the_names_below_the_split_alone():
  names = [f'{animal}/{k}.png' for k in range(20) for animal in ('cat', 'ant')]

  def order(prefix, given, *others):
    files = arrange([prefix + name for name in given] + [*others]).files['train']
    return [name.removeprefix(prefix) for name, _ in files]

  expected = order('', names)
  assert sorted(expected) == sorted(names) and expected != sorted(names)
  assert order('', names[::-1]) == order('x/y/', names) == expected
  assert order('train/', names, 'test/cat/1.png') == expected
  assert len(order('', ['no utf-8 \udcff.png', '1.png'])) == 2


def test_any_slice_is_a_fair_sample():
  """Of 400 images, half of them of either class, the first 100 hold 50 +- 4.3 of each."""
  tree = arrange([f'{animal}/{k:03d}.png' for animal in ('cat', 'ant') for k in range(200)])
  labels = np.array([label for _, label in tree.files['train']])
  assert all(abs(labels[k : k + 100].sum() - 50) < 17 for k in range(0, 400, 100))


@pytest.mark.parametrize(
  'names', ['train/1 test/1 extra/1', 'Train/1 Test/1', 'test/1 val/1', 'a/1 training/1']
)
def test_folders_called_almost_like_splits_are_refused(names):
  with pytest.raises(ValueError, match='folders of splits must be called train, test'):
    arrange(names.split())
