"""Batches of stored pairs: every pair once an epoch, each process its own part."""

import numpy as np
import pytest

from diffusion_distillation.run import pairs
from diffusion_distillation.system import sharding
from tests.run.pairs_test import FILES, ONE, everything, teacher


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
  """A directory of ONE's pairs, which tests only read."""
  directory = tmp_path_factory.mktemp('pairs')
  pairs.ensure(directory, ONE, teacher())
  return directory


@pytest.mark.parametrize('batch_size', [8, 5, 20, 32])
def test_every_pair_comes_once_an_epoch_and_a_batch_depends_on_seed_and_number_alone(drawn, batch_size):
  """Batches may be larger than the files, smaller, or larger than all there is; epochs run on within a batch."""
  stored = pairs.ensure(drawn, ONE, teacher())
  every = everything(stored)
  count = 5 * 20 // batch_size
  batches = list(stored.shuffled(3, batch_size, 0, count))
  assert len(batches) == count and all(batch['cond'] is None for batch in batches)
  place = {noise.tobytes(): k for k, noise in enumerate(every['noise'])}
  order = [place[noise.tobytes()] for batch in batches for noise in batch['noise']]
  epochs = [order[k : k + 20] for k in range(0, len(order) - 19, 20)]
  assert len(epochs) >= 4 and all(sorted(epoch) == list(range(20)) for epoch in epochs)
  assert len({tuple(epoch) for epoch in epochs}) == len(epochs)
  images = np.concatenate([batch['image'] for batch in batches])
  np.testing.assert_array_equal(images, every['image'][order])  # each with its own noise, of every file
  (later,) = stored.shuffled(3, batch_size, 2, 3)
  np.testing.assert_array_equal(later['noise'], batches[2]['noise'])
  (other,) = stored.shuffled(4, batch_size, 0, 1)
  assert not np.array_equal(other['noise'], batches[0]['noise'])


def test_each_process_reads_its_own_part_of_a_batch(drawn, monkeypatch):
  stored = pairs.ensure(drawn, ONE, teacher())
  (whole,) = stored.shuffled(3, 8, 1, 2)
  parts = []
  for index in range(2):
    monkeypatch.setattr(sharding, 'part', lambda index=index: (index, 2))
    parts += stored.shuffled(3, 8, 1, 2)
  np.testing.assert_array_equal(np.concatenate([part['noise'] for part in parts]), whole['noise'])


def test_indices_lead_to_the_records_of_every_file_of_the_last_too(drawn):
  stored = pairs.ensure(drawn, ONE, teacher())
  files = np.concatenate([np.load(drawn / 'pairs' / name, allow_pickle=False) for name in FILES])
  assert [len(np.load(drawn / 'pairs' / name)) for name in FILES] == [8, 8, 4]
  index = np.array([19, 0, 16, 7, 8, 19])
  for name in ('noise', 'image'):
    np.testing.assert_array_equal(stored.read(index)[name], files[name][index])
  with pytest.raises(IndexError):
    stored.read(np.array([20]))
