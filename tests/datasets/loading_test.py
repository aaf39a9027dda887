import contextlib
import dataclasses
import logging
import threading
import time
import weakref

import fsspec
import numpy as np
import pytest

from diffusion_distillation import datasets
from diffusion_distillation.datasets import decoding, folder, image_set, loading, preparing, shapes
from diffusion_distillation.datasets.loading import InOrder, Loader, Shuffled
from diffusion_distillation.errors import Preempted, UserError
from diffusion_distillation.system import interrupts
from tests import tiny_pictures

KINDS = ['digits', 'shapes', 'folder', 'zip', 'tfds', 'copy']
BROKEN = (5, 11, 12)  # of the 29 pictures of the folder, and of the zip and the copy that are made of it
SEED, BATCH, STEPS = 3, 8, 9  # two and a half epochs


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
  root = tmp_path_factory.mktemp('sources')
  found = tiny_pictures.sources(root, 29, BROKEN)
  found['copy'] = dataclasses.replace(found['folder'], prepared=str(root / 'copy'))
  preparing.prepare(found['copy'], workers=0, shard_bytes=2000)
  return found


@pytest.fixture(params=KINDS)
def images(request, sources):
  """A set of every kind."""
  return datasets.open_split(sources[request.param], 'train')


def batches(loader, start=0, stop=STEPS, batch_size=BATCH):
  with contextlib.closing(loader):
    return list(loader.shuffled(SEED, batch_size, start, stop))


def assert_same(some, others):
  assert len(some) == len(others) > 0
  for one, other in zip(map(tiny_pictures.flat, some), map(tiny_pictures.flat, others), strict=True):
    for key in one:
      np.testing.assert_array_equal(one[key], other[key], strict=True)


def wait_until(condition):
  deadline = time.monotonic() + 10
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.001)


def test_each_epoch_visits_every_example_once():
  order = Shuffled(10, 3, 4)
  epochs = np.concatenate([order(i)[0] for i in range(10)]).reshape(4, 10)
  for epoch in epochs:
    assert sorted(epoch) == list(range(10))
  assert len({tuple(epoch) for epoch in epochs}) == 4


def test_a_shuffled_batch_is_a_function_of_seed_and_number_alone():
  late = Shuffled(10, 3, 4)(1000)[0]
  for i in range(20):
    Shuffled(10, 3, 4)(i)
  np.testing.assert_array_equal(Shuffled(10, 3, 4)(1000)[0], late)
  assert any((Shuffled(10, 3, 4)(i)[0] != Shuffled(10, 4, 4)(i)[0]).any() for i in range(5))


def test_the_shuffled_stream_does_not_depend_on_the_batch_size():
  by_four = np.concatenate([Shuffled(10, 3, 4)(i)[0] for i in range(15)])
  by_six = np.concatenate([Shuffled(10, 3, 6)(i)[0] for i in range(10)])
  np.testing.assert_array_equal(by_four, by_six)


def test_a_shuffled_batch_larger_than_the_set_goes_round_it_and_all_of_it_counts():
  indices, counted = Shuffled(10, 3, 30)(0)
  assert np.bincount(indices).tolist() == [3] * 10
  assert counted.tolist() == [True] * 30


@pytest.mark.parametrize(('count', 'batch_size'), [(10, 4), (8, 4), (3, 5), (1, 1)])
def test_in_order_every_index_counts_once_and_the_rest_is_not_counted(count, batch_size):
  given = [7 * k + 5 for k in range(count)]
  order = InOrder(given, batch_size)
  indices, counted = map(np.concatenate, zip(*map(order, range(len(order))), strict=True))
  assert len(indices) == -(-count // batch_size) * batch_size
  np.testing.assert_array_equal(indices[counted], given)


def test_batches_hold_the_images_at_the_shuffled_indices(images):
  order = Shuffled(len(images), SEED, BATCH)
  shape = (BATCH, *images.image_shape)
  whole = 0
  for i, batch in enumerate(map(tiny_pictures.flat, batches(Loader(images)))):
    assert batch['image'].shape == shape and batch['image'].dtype == np.uint8
    assert batch['label'].dtype == np.int32 and batch['mask'].dtype == bool
    for k, image, label, counts in zip(order(i)[0], *batch.values(), strict=True):
      if counts:
        expected, expected_label = images.read(int(k))
        np.testing.assert_array_equal(image, expected)
        assert label == expected_label
      else:
        with pytest.raises(image_set.BrokenImage):
          images.read(int(k))
      whole += counts
  assert whole >= STEPS * BATCH * (1 - 2 * len(BROKEN) / 29)


def test_batches_are_bit_for_bit_the_same_from_memory_threads_and_processes(images):
  expected = batches(Loader(images))
  assert_same(batches(Loader(images, in_memory_gb=1)), expected)
  assert_same(batches(Loader(images, workers=2)), expected)


def test_batches_are_the_same_started_in_the_middle(images):
  expected = batches(Loader(images))
  assert_same(batches(Loader(images), start=5), expected[5:])
  assert_same(batches(Loader(images, in_memory_gb=1), start=5), expected[5:])


def test_the_parts_of_four_processes_make_the_batches_of_one(images):
  parts = [map(tiny_pictures.flat, batches(Loader(images, part=(k, 4)))) for k in range(4)]
  for batch, *of_it in zip(map(tiny_pictures.flat, batches(Loader(images))), *parts, strict=True):
    for key, whole in batch.items():
      np.testing.assert_array_equal(np.concatenate([part[key] for part in of_it]), whole, strict=True)


@pytest.mark.parametrize('in_memory_gb', [0.0, 1.0])
def test_in_order_no_image_is_lost_and_none_comes_twice(images, in_memory_gb):
  for count in (1, 4):
    seen = []
    streams = [Loader(images, in_memory_gb, part=(k, count)).in_order(12) for k in range(count)]
    for parts in zip(*streams, strict=True):
      assert all(len(part['mask']) == 12 // count for part in parts)
      seen += [image for part in parts for image in part['image'][part['mask']]]
    whole = []
    for k in range(len(images)):
      with contextlib.suppress(image_set.BrokenImage):
        whole.append(images.read(k)[0])
    np.testing.assert_array_equal(seen, whole)


@pytest.mark.parametrize('in_memory_gb', [0, 1])
def test_a_set_without_labels_has_none(in_memory_gb):
  loader = Loader(tiny_pictures.numbers(10, classes=()), in_memory_gb)
  assert [batch['cond'] for batch in batches(loader, 0, 3)] == [None] * 3


def test_for_a_broken_image_stands_the_next_whole_one_and_does_not_count():
  images = tiny_pictures.numbers(10, broken=(3, 4, 9))
  for in_memory_gb in (0, 1):
    (batch,) = Loader(images, in_memory_gb).in_order(10)
    assert batch['image'].ravel().tolist() == [0, 1, 2, 5, 5, 5, 6, 7, 8, 0]
    assert np.flatnonzero(~batch['mask']).tolist() == [3, 4, 9]


@pytest.mark.parametrize('in_memory_gb', [0.0, 1.0])
@pytest.mark.parametrize('kind', ['folder', 'zip', 'copy'])
def test_each_broken_image_is_reported_once_and_counted(sources, kind, in_memory_gb, caplog):
  loader = Loader(datasets.open_split(sources[kind], 'train'), in_memory_gb)
  batches(loader)
  batches(loader)
  lines = [record.getMessage() for record in caplog.records]
  assert len(lines) == len(loader.skipped) == len(BROKEN)
  for k in BROKEN:
    (line,) = [line for line in lines if f'/{k}.png cannot be decoded' in line]
    assert line.startswith(
      'skipped an image of folder: ' if kind != 'zip' else 'skipped an image of pictures'
    )
  for k in loader.skipped:
    with pytest.raises(image_set.BrokenImage):
      loader.images.read(k)


@pytest.mark.parametrize(('broken', 'named', 'more'), [(19, 19, 0), (25, 20, 1)])
def test_only_twenty_broken_images_are_named(broken, named, more, caplog):
  loader = Loader(tiny_pictures.numbers(100, broken=range(0, 2 * broken, 2)))
  list(loader.in_order(10))
  lines = [record.getMessage() for record in caplog.records]
  assert [line for line in lines if 'is odd' in line] == [
    f'skipped an image of numbers: number {2 * k} is odd' for k in range(named)
  ]
  assert len([line for line in lines if 'only counted' in line]) == more
  assert sorted(loader.skipped) == list(range(0, 2 * broken, 2))
  assert all(record.levelno == logging.WARNING for record in caplog.records)


@pytest.mark.parametrize('in_memory_gb', [0.0, 1.0])
def test_a_set_without_a_whole_image_is_refused(in_memory_gb):
  loader = Loader(tiny_pictures.numbers(5, broken=range(5)), in_memory_gb)
  with pytest.raises(
    UserError, match=r"'numbers': 5 images in a row, of 5, cannot be used; .*number \d is odd"
  ):
    next(loader.shuffled(0, 4, 0, 9))


def test_batches_that_do_not_divide_by_the_processes_are_refused():
  with pytest.raises(UserError, match='batches of 6 images are not divisible by 4 processes'):
    next(Loader(tiny_pictures.numbers(30), part=(0, 4)).shuffled(0, 6, 0, 1))


@pytest.mark.parametrize(('gigabytes', 'fits'), [(300e-9, True), (299e-9, False)])
def test_a_set_is_kept_in_memory_if_it_fits_there_to_the_byte(gigabytes, fits):
  images = tiny_pictures.numbers(300)
  loader = Loader(images, gigabytes)
  reads = []
  for _ in range(3):
    found = np.concatenate([batch['image'].ravel() for batch in loader.in_order(100)])
    np.testing.assert_array_equal(found, np.arange(300) % 256)
    reads.append(len(images.reads))
  assert len(set(reads)) == (1 if fits else 3)


def test_reading_into_memory_is_shared_among_processes_that_then_end():
  images = tiny_pictures.numbers(600)
  loader = Loader(images, in_memory_gb=1, workers=1)
  found = np.concatenate([batch['image'].ravel() for batch in loader.in_order(100)])
  np.testing.assert_array_equal(found, np.arange(600) % 256)
  assert not images.reads and not tiny_pictures.workers()


def test_a_signal_stops_the_reading_into_memory(monkeypatch):
  monkeypatch.setattr(interrupts, '_received', ['SIGTERM'])
  with pytest.raises(Preempted, match='SIGTERM'):
    Loader(tiny_pictures.numbers(10), in_memory_gb=1).shuffled(0, 4, 0, 1)


def test_opening_a_folder_opens_no_file_and_batches_open_their_own(monkeypatch):
  system, opened = fsspec.filesystem('memory'), []
  for k in range(40):
    system.pipe(f'/lazy/{k}.png', tiny_pictures.png(k))
  read = type(system).cat_file
  monkeypatch.setattr(
    type(system), 'cat_file', lambda self, path: opened.append(path) or read(self, path)
  )
  monkeypatch.setattr(loading, '_cores', lambda: 1)
  given = tiny_pictures.settings('folder', path='memory://lazy', split='train')
  loader = Loader(datasets.open_split(given, 'train'))
  assert not opened
  with contextlib.closing(loader), contextlib.closing(loader.shuffled(0, 4, 0, 10)) as stream:
    next(stream)
    assert 4 <= len(opened) <= 12
  system.rm('/lazy', recursive=True)


@pytest.mark.parametrize('cores', [1, 3])
def test_two_batches_a_core_are_read_ahead_and_none_is_kept(cores, monkeypatch):
  monkeypatch.setattr(loading, '_cores', lambda: cores)
  asked, made = [], []

  class Watched(tiny_pictures.Numbers):
    def batch(self, indices):
      batch = super().batch(indices)
      made.append(weakref.ref(batch['image']))
      return batch

  def order(i):
    asked.append(i)
    return np.arange(4) + 4 * i, np.ones(4, bool)

  with contextlib.closing(Loader(Watched('numbers', (1, 1, 1), (), '', 4 * 200))) as loader:
    stream = loader.stream(order, range(200))
    for i in range(200):
      assert next(stream)['image'].ravel().tolist() == [(4 * i + k) % 256 for k in range(4)]
      assert asked == list(range(min(i + 1 + 2 * cores, 200)))
      wait_until(lambda: sum(image() is not None for image in made) <= 2 * cores)
  assert len(made) == 200


def test_a_stream_closed_early_reads_no_more_and_the_loader_goes_on(monkeypatch):
  monkeypatch.setattr(loading, '_cores', lambda: 1)
  gate = threading.Event()

  class Gated(tiny_pictures.Numbers):
    def batch(self, indices):
      if indices[0]:
        gate.wait(20)
      return super().batch(indices)

  images = Gated('numbers', (1, 1, 1), (), '', 40)
  with contextlib.closing(Loader(images)) as loader:
    stream = loader.in_order(4)
    next(stream)
    stream.close()
    gate.set()
    assert [batch['image'][0, 0, 0, 0] for batch in loader.in_order(4)] == [*range(0, 40, 4)]
  begun = [0, 1, 2, 3], [*range(8)]  # the second batch may have been begun; the third was not
  assert images.reads in [[*some, *range(40)] for some in begun]


def test_labels_are_counted_without_decoding_an_image(images, monkeypatch):
  """As they are read from all images; a broken image counts where a folder's name tells its class."""
  labels = [images.read(k)[1] for k in range(len(images)) if not is_broken(images, k)]
  if isinstance(images, folder.Folder):
    labels = [label for _, label in images.files]

  def decode(*args):
    raise AssertionError('an image is decoded')

  monkeypatch.setattr(decoding.Decoder, '__call__', decode)
  monkeypatch.setattr(shapes, 'draw', decode)
  expected = np.bincount(labels, minlength=len(images.classes))
  assert loading.count_labels(images) == expected.tolist()


def is_broken(images, k):
  try:
    images.read(k)
  except image_set.BrokenImage:
    return True
  return False


def test_labels_that_are_not_known_do_not_count():
  labels = np.array([1, -1, 0, 1], np.int32)
  images = image_set.InMemory('x', (1, 1, 1), ('a', 'b'), 'x', np.zeros((4, 1, 1, 1), np.uint8), labels)
  assert loading.count_labels(images) == [1, 2]
