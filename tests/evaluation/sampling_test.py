"""Drawing: image k is a function of (seed, k); one program for all step counts."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.samplers import Ancestral
from diffusion_distillation.evaluation import sampling
from diffusion_distillation.networks.conditioning import Text
from tests import tiny


def make(batch_size, **overrides):
  """A drawer and parameters that are zero nowhere."""
  stage = tiny.plan(**overrides)[0][0]
  params = stage.denoise.init(jax.random.key(0), (8, 8, 1))
  leaves, tree = jax.tree.flatten(params)
  keys = jax.random.split(jax.random.key(1), len(leaves))
  noise = [p + 0.1 * jax.random.normal(key, p.shape) for key, p in zip(keys, leaves, strict=True)]
  given = (stage.denoise, Ancestral(), stage.schedule, stage.space, (8, 8, 1), batch_size)
  drawer = sampling.Drawer(*given)
  return drawer, jax.tree.unflatten(tree, noise)


def assert_same_images(a, b):
  """Equal but for pixels that another order of summation rounds the other way."""
  assert a.shape == b.shape and a.dtype == b.dtype == np.uint8
  assert np.abs(a.astype(int) - b.astype(int)).max() <= 1


def test_images_depend_on_seed_and_index_alone():
  (small, params), (large, _) = make(8), make(20)  # rounded up to 24 on 8 devices
  grid = times.uniform(3)
  twenty = small.draw(params, grid, 20, seed=5)
  assert len(twenty) == 20
  assert_same_images(twenty, large.draw(params, grid, 20, seed=5))
  assert_same_images(twenty[:3], large.draw(params, grid, 3, seed=5))
  assert len({image.tobytes() for image in twenty}) == 20
  assert (small.draw(params, grid, 20, seed=6) != twenty).any(axis=(1, 2, 3)).all()


def test_progress_is_shown_where_there_are_several_batches(capsys):
  drawer, params = make(8)
  drawer.draw(params, times.uniform(3), 20, seed=5, name='sample')
  assert 'sample: 3/3, ' in capsys.readouterr().err
  drawer.draw(params, times.uniform(3), 8, seed=5, name='sample')
  drawer.draw(params, times.uniform(3), 20, seed=5)
  assert 'sample' not in capsys.readouterr().err


def test_one_program_serves_all_grids_of_times():
  drawer, params = make(16)
  traces = []

  class Counting(type(drawer.denoise)):
    def __call__(self, *args, **kwargs):
      traces.append(1)
      return super().__call__(*args, **kwargs)

  counting = Counting(drawer.denoise.network, drawer.denoise.output)
  drawer = dataclasses.replace(drawer, denoise=counting)
  grids = [*map(times.uniform, (1, 2, 7, 64)), times.quadratic(5), times.grid([0, 0.9, 1])]
  drawn = [drawer.draw(params, grid, 16, 0) for grid in grids]
  assert len({images.tobytes() for images in drawn}) == len(grids)
  assert len(traces) == 1


@pytest.mark.slow
def test_conditional_models_draw_balanced_classes_or_those_that_are_given():
  drawer, params = make(16, model__conditional=True)
  labels = drawer.cond(np.arange(40), 0)['label']
  assert np.bincount(labels).tolist() == [4] * 10
  images = drawer.draw(params, times.uniform(2), 20, seed=0)
  assert images.shape == (20, 8, 8, 1)
  assert drawer.cond(np.arange(5), 0, {'label': [7, 2]})['label'].tolist() == [7, 2, 7, 2, 7]
  chosen = drawer.draw(params, times.uniform(2), 20, seed=0, chosen={'label': [*range(9), 0]})
  same = (chosen == images).all(axis=(1, 2, 3))
  assert same.tolist() == [k % 10 != 9 for k in range(20)]
  in_proportion = dataclasses.replace(drawer, label_counts=(5, 1, 1, 1, 1, 1, 1, 1, 1, 7))
  labels = in_proportion.cond(np.arange(20), 0)['label']
  assert np.bincount(labels)[[0, 9]].sum() > 8
  of_data = in_proportion.draw(params, times.uniform(2), 20, seed=0)
  as_given = drawer.draw(params, times.uniform(2), 20, seed=0, chosen={'label': labels.tolist()})
  np.testing.assert_array_equal(of_data, as_given)
  assert in_proportion == drawer and hash(in_proportion) == hash(drawer)  # one program
  _, _, of_some = in_proportion.pairs(params, times.uniform(2), 0, np.array([17, 3]))
  np.testing.assert_array_equal(of_some['label'], labels[[17, 3]])
  unconditional, _ = make(16)
  assert unconditional.cond(np.arange(40), 0) is None


def test_drawing_is_timed_without_what_is_done_with_the_images(monkeypatch):
  drawer, params = make(16)
  seen = []

  def use(images, count):
    seen.append(np.asarray(images)[:count])

  args = (params, times.uniform(2), 40, 0)
  seconds = drawer.seconds_per_image(*args, then=lambda images: images, use=use)
  assert [len(images) for images in seen] == [16, 16, 8]
  assert 0 < seconds < 1
  np.testing.assert_array_equal(np.concatenate(seen), drawer.draw(params, times.uniform(2), 40, 0))

  clock = [0.0]

  def slow(*_):
    clock[0] += 100.0

  monkeypatch.setattr(sampling, 'time', types.SimpleNamespace(monotonic=lambda: clock[0]))
  assert drawer.seconds_per_image(*args, then=slow, use=slow) == 0.0


@pytest.mark.parametrize('enough', [None, 0, 1])
def test_a_batch_is_read_when_the_next_one_is_on_its_way(enough):
  drawer, params = make(16)
  events = []

  def then(images):
    events.append('drawn')
    return len(events)

  def use(made, count):
    events.append(('read', made, count))
    return len([e for e in events if e != 'drawn']) - 1 == enough

  drawer.seconds_per_image(params, times.uniform(2), 40, 0, then, use)
  every = ['drawn', 'drawn', ('read', 1, 16), 'drawn', ('read', 2, 16), ('read', 4, 8)]
  assert events == every[: {None: 6, 0: 3, 1: 5}[enough]]


def test_a_signal_stops_drawing(monkeypatch):
  from diffusion_distillation.errors import Preempted
  from diffusion_distillation.system import interrupts

  drawer, params = make(16)
  monkeypatch.setattr(interrupts, '_received', ['SIGTERM'])
  with pytest.raises(Preempted, match='SIGTERM'):
    drawer.draw(params, times.uniform(1), 16, 0)


def test_padding_repeats_the_first_time_whatever_it_is():
  """So that it is no step, neither of a grid that ends at clean data nor of one that does not."""
  for grid in (np.float32([0.0, 0.5, 1.0]), np.float32([0.001, 0.5, 0.9])):
    padded = sampling._padded(grid)
    assert len(padded) == sampling._GRID + 1 and (padded > padded[0]).sum() == 2
    np.testing.assert_array_equal(padded[-3:], grid)


def test_a_model_of_texts_draws_those_that_are_given():
  drawer = dataclasses.replace(
    make(8)[0], denoise=types.SimpleNamespace(conditioning={'text': Text(3, 2)})
  )
  text = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
  cond = drawer.cond(np.arange(3), 0, {'text': text, 'no_text': text[:1]})
  np.testing.assert_array_equal(cond['text'], text[[0, 1, 0]])
  np.testing.assert_array_equal(cond['no_text'], text[[0, 0, 0]])
