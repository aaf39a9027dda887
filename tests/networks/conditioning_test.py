"""What networks are told beside z and the time: made, selected and withheld by example."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.errors import UserError
from diffusion_distillation.networks import conditioning
from diffusion_distillation.networks.conditioning import Classes, Text


@dataclasses.dataclass(frozen=True)
class Direction:
  """A condition of this test alone: unit vectors (B, 2); zeros where it is not told."""

  def zeros(self, count):
    return np.tile(np.float32([1.0, 0.0]), (count, 1))

  def in_turn(self, index, chosen=()):
    angles = np.float32(chosen or [0.0, np.pi])[index % (len(chosen) or 2)]
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)

  def withheld(self, values):
    return jnp.zeros_like(values)


BOTH = {'label': Classes(3), 'direction': Direction()}
CONDITIONINGS = {'none': {}, 'label': {'label': Classes(3)}, 'both': BOTH}


@pytest.mark.parametrize('name', CONDITIONINGS)
def test_zeros_are_valid_values_of_the_shapes_and_types_that_are_drawn(name):
  made = conditioning.zeros(CONDITIONINGS[name], 5)
  drawn = conditioning.in_turn(CONDITIONINGS[name], np.arange(5))
  assert jax.tree.map(lambda a: (a.shape, a.dtype), made) == jax.tree.map(
    lambda a: (a.shape, a.dtype), drawn
  )
  assert (made is None) == (name == 'none')
  if made is not None:
    assert made.keys() == CONDITIONINGS[name].keys()
    assert (made['label'] == 0).all() and made['label'].dtype == np.int32


def test_values_come_in_turn_by_index_all_there_are_or_those_that_are_chosen():
  index = np.array([0, 1, 2, 3, 7])
  assert conditioning.in_turn(BOTH, index)['label'].tolist() == [0, 1, 2, 0, 1]
  chosen = conditioning.in_turn(BOTH, index, {'label': [2, -1]})
  assert chosen['label'].tolist() == [2, -1, 2, -1, -1]
  np.testing.assert_array_equal(chosen['direction'], Direction().in_turn(index))
  assert conditioning.in_turn({}, index, {'label': [2]}) is None


SIZES = (600, 300, 0, 99, 1)


def test_labels_have_the_proportions_of_the_data_however_many_are_drawn():
  """Within the bound of Kuipers & Niederreiter (1974), theorem 2.3.4, on the golden ratio's sequence."""
  sizes = np.array(SIZES)
  for seed in range(5):
    every = Classes(5).proportional(np.arange(40_000), seed, SIZES)
    assert every.dtype == np.int32
    for start in (0, 77, 20_000):
      for n in (1, 10, 100, 1000, 20_000):
        found = np.bincount(every[start : start + n], minlength=5)
        assert np.abs(found - n * sizes / sizes.sum()).max() <= 3 + 3.6 * np.log(n)
        assert found[2] == 0


def test_a_label_is_a_function_of_seed_and_number_in_exact_arithmetic():
  classes, index = Classes(5), np.array([5, 0, 2**31 - 1, 123_456_789, 7], np.int32)
  golden, edges = 0x9E3779B97F4A7C15, np.cumsum(SIZES)
  for seed in (0, 7):
    offset = int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0])
    places = [(int(k) * golden + offset) % 2**64 * 1000 for k in index]
    expected = [sum(place >= int(edge) * 2**64 for edge in edges) for place in places]
    assert classes.proportional(index, seed, SIZES).tolist() == expected
  one, other = (classes.proportional(np.arange(50), seed, SIZES) for seed in (0, 7))
  assert (one != other).any()


def test_sizes_that_no_label_can_be_drawn_from_are_an_error():
  for counts in ((1, 1, 1, 1), (0, 0)):
    with pytest.raises(ValueError, match='for 3 classes'):
      Classes(3).proportional(np.arange(2), 0, counts)


def test_only_labels_follow_the_data_and_without_its_sizes_come_in_turn():
  index = np.arange(9)
  drawn = conditioning.draw(BOTH, index, 3, (4, 1, 1))
  np.testing.assert_array_equal(drawn['label'], Classes(3).proportional(index, 3, (4, 1, 1)))
  np.testing.assert_array_equal(drawn['direction'], Direction().in_turn(index))
  assert conditioning.draw(BOTH, index, 3, ())['label'].tolist() == [0, 1, 2] * 3
  assert conditioning.draw({}, index, 3, (4, 1, 1)) is None


def test_a_network_takes_its_own_conditions_of_what_the_data_have():
  given = {'label': np.arange(4), 'direction': np.zeros((4, 2)), 'text': np.zeros(4)}
  assert conditioning.select({'label': Classes(3)}, given) == {'label': given['label']}
  assert conditioning.select(BOTH, given).keys() == BOTH.keys()
  assert conditioning.select({}, given) is None
  assert conditioning.select({}, None) is None


@pytest.mark.parametrize('given', [None, {}, {'label': np.arange(4)}])
def test_a_condition_that_the_data_do_not_have_is_named(given):
  with pytest.raises(ValueError, match="conditioned on 'direction', which the data does not have"):
    conditioning.select({'direction': Direction(), 'text': Direction()}, given)


def test_the_classes_of_a_network_are_those_of_its_labels():
  assert conditioning.classes(BOTH) == Classes(3)
  assert conditioning.classes({}) is None
  assert conditioning.classes({'label': Direction()}) is None


@pytest.mark.parametrize('probability', [0.0, 0.1, 0.7, 1.0])
def test_all_conditions_of_an_example_are_withheld_together_with_the_given_probability(probability):
  cond = conditioning.in_turn(BOTH, np.arange(4000))
  found = conditioning.drop(jax.random.key(0), BOTH, cond, probability)
  gone = np.asarray(found['label']) == Classes.NONE
  np.testing.assert_array_equal(gone, (np.asarray(found['direction']) == 0.0).all(-1))
  for key, values in cond.items():
    np.testing.assert_array_equal(found[key][~gone], values[~gone])
    assert found[key].dtype == values.dtype
  deviation = np.sqrt(4000 * probability * (1 - probability))
  assert abs(gone.sum() - 4000 * probability) <= 4 * deviation


def test_which_examples_are_dropped_is_a_function_of_the_key():
  cond = conditioning.in_turn(BOTH, np.arange(100))
  one, same, other = (
    np.asarray(conditioning.drop(jax.random.key(seed), BOTH, cond, 0.5)['label']) for seed in (0, 0, 1)
  )
  np.testing.assert_array_equal(one, same)
  assert (one != other).any()


def test_where_nothing_is_told_nothing_is_dropped():
  assert conditioning.drop(jax.random.key(0), {}, None, 0.5) is None


NUMBERED = tuple(sorted(map(str, range(1, 13))))  # '1', '10', '11', '12', '2', ...


@pytest.mark.parametrize(
  'names', [NUMBERED, ('-1', '0', '1'), ('1.5', '2.5'), ('01', '02'), ('cat', '7')]
)
def test_where_names_are_numbers_a_number_is_a_name(names):
  assert conditioning.labels_by_name(len(names), names) == {name: k for k, name in enumerate(names)}
  text = conditioning.choices(len(names), names)
  assert f'the {len(names)} classes are called {names[0]}, {names[1]}' in text and '\n' not in text


@pytest.mark.parametrize('names', [(), ('cat', 'dog'), ('1st', '2nd'), ('none', 'v2')])
def test_otherwise_a_number_is_a_label(names):
  known = conditioning.labels_by_name(2, names)
  assert known == {'0': 0, '1': 1} | {name: k for k, name in enumerate(names)}
  assert conditioning.choices(2, names).startswith('classes are whole numbers, 0 to 1')


TEXT = {'text': Text(3, 2), 'label': Classes(3)}


def embeddings(count):
  return np.arange(count * 6, dtype=np.float32).reshape(count, 3, 2)


def test_texts_are_drawn_in_turn_with_what_stands_for_no_text():
  chosen = {'text': embeddings(2), 'no_text': -np.ones((1, 3, 2), np.float32)}
  cond = conditioning.in_turn(TEXT, np.arange(3), chosen)
  np.testing.assert_array_equal(cond['text'], embeddings(2)[[0, 1, 0]])
  np.testing.assert_array_equal(cond['no_text'], -np.ones((3, 3, 2)))
  assert cond['label'].tolist() == [0, 1, 2] and conditioning.select(TEXT, cond).keys() == cond.keys()
  assert conditioning.zeros(TEXT, 5)['text'].shape == (5, 3, 2)
  with pytest.raises(UserError, match='give --prompts'):
    conditioning.in_turn(TEXT, np.arange(3))


def test_a_text_is_withheld_by_the_embeddings_of_the_empty_one():
  cond = {'text': embeddings(2), 'no_text': -np.ones((2, 3, 2), np.float32), 'label': np.array([0, 1])}
  found = conditioning.withheld(TEXT, cond)
  np.testing.assert_array_equal(found['text'], cond['no_text'])
  np.testing.assert_array_equal(found['no_text'], cond['no_text'])
  assert found['label'].tolist() == [-1, -1] and cond.keys() == found.keys()
  dropped = conditioning.drop(jax.random.key(0), TEXT, cond, 1.0)
  np.testing.assert_array_equal(dropped['text'], cond['no_text'])
  with pytest.raises(ValueError, match=r"cond\['no_text'\]"):
    conditioning.withheld(TEXT, {'text': cond['text']})
