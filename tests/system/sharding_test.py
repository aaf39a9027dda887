"""Batches on their way to the devices. (One device against eight: run/loop_test.py.)"""

import threading

import jax
import numpy as np
import pytest

from diffusion_distillation.errors import UserError
from diffusion_distillation.system import sharding


def batches(count, asked):
  for k in range(count):
    asked.append(k)
    yield {'image': np.full((8, 2, 2, 1), k, np.uint8), 'label': None}


def test_batches_arrive_in_order_and_none_is_lost():
  values = [int(batch['image'][0, 0, 0, 0]) for batch in sharding.ahead(batches(5, []))]
  assert values == [0, 1, 2, 3, 4]


def test_two_batches_are_on_the_devices_before_they_are_asked_for():
  asked = []
  stream = sharding.ahead(batches(9, asked))
  for taken in range(1, 5):
    batch = next(stream)
    assert asked == list(range(taken + 2))
    assert isinstance(batch['image'], jax.Array) and batch['image'].dtype == np.uint8
    assert batch['image'].sharding.is_equivalent_to(sharding.split(), 4)


def test_fewer_batches_than_are_kept_ahead_all_arrive():
  assert len(list(sharding.ahead(batches(1, [])))) == 1
  assert list(sharding.ahead(batches(0, []))) == []


def test_one_process_reads_whole_batches():
  assert sharding.part() == (0, 1)


def test_attention_of_gpus_is_refused_elsewhere():
  sharding.check_attention('xla', 'float32')
  with pytest.raises(UserError, match='needs GPUs, but this run has cpu devices'):
    sharding.check_attention('cudnn', 'bfloat16')
  with pytest.raises(UserError, match=r'needs compute\.dtype=bfloat16'):
    sharding.check_attention('cudnn', 'float32')


def test_what_goes_wrong_while_a_program_is_compiled_is_told_at_once():
  """The compiler is not waited for; where nothing goes wrong it is, and its own failure is left to the first call."""
  begun, allowed, ended = threading.Event(), threading.Event(), threading.Event()

  class Slow:
    def lower(self, *_):
      return self

    def compile(self):
      begun.set()
      allowed.wait(60)
      ended.set()
      raise ValueError('of the compiler')

  with pytest.raises(KeyError), sharding.compiled_meanwhile(Slow(), None, {}, {}, {}):
    begun.wait(60)
    raise KeyError
  assert not ended.is_set()
  allowed.set()
  assert ended.wait(60)
  allowed.clear()
  ended.clear()
  threading.Timer(0.5, allowed.set).start()
  with sharding.compiled_meanwhile(Slow(), None, {}, {}, {}):
    pass
  assert ended.is_set()


def test_a_program_is_traced_before_the_body_and_its_errors_are_raised_there():
  order = []

  class Step:
    def lower(self, *_):
      order.append('lowered')
      return self

    def compile(self):
      order.append('compiled')

  with sharding.compiled_meanwhile(Step(), None, {}, {}, {}):
    assert order[0] == 'lowered'
    order.append('body')
  assert sorted(order) == ['body', 'compiled', 'lowered']

  class Wrong:
    def lower(self, *_):
      raise TypeError('of the trace')

  with (
    pytest.raises(TypeError, match='of the trace'),
    sharding.compiled_meanwhile(Wrong(), None, {}, {}, {}),
  ):
    pytest.fail('the body must not run')
