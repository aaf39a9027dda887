"""Splits by name and slice."""

import pytest

from diffusion_distillation.datasets import splits
from diffusion_distillation.errors import UserError

TRAIN, TEST = list(range(200)), list(range(1000, 1040))
TABLE = {'train': TRAIN, 'test': TEST}


@pytest.mark.parametrize(
  ('spec', 'expected'),
  [
    ('train', TRAIN),
    ('test', TEST),
    ('train[:30]', TRAIN[:30]),
    ('train[30:]', TRAIN[30:]),
    ('train[10:20]', TRAIN[10:20]),
    ('train[-3:]', TRAIN[-3:]),
    ('train[:-3]', TRAIN[:-3]),
    ('train[:90%]', TRAIN[:180]),
    ('train[90%:]', TRAIN[180:]),
    ('train[25%:75%]', TRAIN[50:150]),
    ('test[-10%:]', TEST[-4:]),
    ('train+test', TRAIN + TEST),
    ('test + train[:1]', [*TEST, 0]),
    ('train[5:7]+train[:2]+test[1:2]', [5, 6, 0, 1, 1001]),
    ('all', TRAIN + TEST),
  ],
)
def test_slices_count_examples_or_per_cent_and_are_joined_in_order(spec, expected):
  assert splits.select('dataset.split', spec, TABLE) == expected


def test_examples_are_taken_from_any_sequence():
  assert splits.select('dataset.split', 'train[-2:]', {'train': range(10, 20)}) == [18, 19]


@pytest.mark.parametrize(
  'spec',
  [
    '',
    'train[',
    'train[5]',
    'train[a:b]',
    'train[::2]',
    'train[:201]',
    'train[:101%]',
    'all[:9]',
    'train-test',
    '+',
  ],
)
def test_what_cannot_be_read_is_answered_with_what_can(spec):
  with pytest.raises(UserError) as caught:
    splits.select('dataset.split', spec, TABLE)
  message = str(caught.value)
  assert message.startswith(
    f'dataset.split={spec!r}: there is no such split; the splits are train, test,'
  )
  assert 'train[:90%]' in message and '\n' not in message


@pytest.mark.parametrize(
  ('spec', 'near'),
  [
    ('trian', 'train'),
    ('tset[:10]', 'test'),
    ('train[:10]+tset', 'test'),
    ('train+tset', 'test'),
    ('test+tain[:3]', 'train'),
  ],
)
def test_a_name_that_there_is_not_is_answered_with_the_nearest(spec, near):
  with pytest.raises(UserError, match=f'did you mean {near!r}') as caught:
    splits.select('dataset.eval_split', spec, TABLE)
  assert str(caught.value).startswith(f'dataset.eval_split={spec!r}: ')


@pytest.mark.parametrize('spec', ['train[500:600]', 'train[x:]', 'zzzzzz'])
def test_nothing_is_guessed_where_nothing_is_near_or_the_name_is_right(spec):
  with pytest.raises(UserError) as caught:
    splits.select('dataset.split', spec, TABLE)
  assert 'did you mean' not in str(caught.value)


@pytest.mark.parametrize('spec', ['train[7:7]', 'train[50:10]', 'test[:0%]'])
def test_a_slice_with_nothing_in_it_is_refused(spec):
  with pytest.raises(UserError) as caught:
    splits.select('dataset.split', spec, TABLE)
  assert str(caught.value) == f'dataset.split={spec!r} holds no image'


@pytest.mark.parametrize(
  ('count', 'size'), [(3, 2), (40, 2), (59, 2), (60, 3), (1000, 50), (200_000, 10_000), (10**6, 10_000)]
)
def test_a_twentieth_is_held_out_and_two_at_least_and_ten_thousand_at_most(count, size):
  table = {'train': range(count)}
  train, held_out = (splits.select('dataset.split', spec, table) for spec in splits.held_out(count))
  assert (train, held_out) == (list(range(count - size)), list(range(count - size, count)))
