"""Small files that would take exponential time or much memory if their content were printed, hashed or copied."""

import io
import pickle
import pickletools
import time

import numpy as np
import pytest

from diffusion_distillation.errors import UserError
from diffusion_distillation.interop import edm
from diffusion_distillation.system import pickles
from tests import edm_cases
from tests.interop.edm_test import CASE, changed, peers, pickled  # noqa: F401
from tests.interop.google_test import refused


def nested(depth=60, width=4):
  """Tuples of tuples, by one reference each: `width` ** `depth` leaves."""
  held = ('x',)
  for _ in range(depth):
    held = (held,) * width
  return held


BOMB = pickle.dumps(nested(), protocol=4)[:-1]  # without STOP: it is left on the stack
PROTO = b'\x80\x04'


def word(text):
  return b'\x8c' + bytes([len(text)]) + text.encode()


PLACES = {
  'a key': PROTO + b'}' + BOMB[2:] + b'K\x01s.',
  'keys': PROTO + b'}(' + BOMB[2:] + b'K\x01u.',
  'a key of DICT': PROTO + b'(' + BOMB[2:] + b'K\x01d.',
  'a member of a set': PROTO + b'\x8f(' + BOMB[2:] + b'\x90.',
  'a member of a frozenset': PROTO + b'(' + BOMB[2:] + b'\x91.',
  'a module': PROTO + BOMB[2:] + word('name') + b'\x93.',
  'the name of a function': PROTO + word('os') + BOMB[2:] + b'\x93.',
  'an encoding': PROTO + b'c_codecs\nencode\n' + word('x') + BOMB[2:] + b'\x86R.',
  'a type of numbers': PROTO + b'cnumpy\ndtype\n' + BOMB[2:] + b'\x85R.',
  'a member of a set that is called': PROTO + b'cbuiltins\nset\n]' + BOMB[2:] + b'a\x85R.',
  'a key of an OrderedDict': PROTO + b'ccollections\nOrderedDict\n]' + BOMB[2:] + b'K\x01\x86a\x85R.',
}


@pytest.mark.parametrize('place', PLACES)
def test_a_container_of_shared_containers_is_refused_at_once(place, tmp_path):
  path = tmp_path / 'model.pkl'
  path.write_bytes(PLACES[place])
  began = time.monotonic()
  assert len(refused(None, path, tmp_path / 'run', 'edm')) < 1000
  assert time.monotonic() - began < 5.0


def test_the_pickles_are_whole():
  for content in PLACES.values():
    assert list(pickletools.genops(content))[-1][0].name == 'STOP'


ARGUMENTS = ('img_resolution', 'channel_mult', 'model_type', 'sigma_min', 'use_fp16')


@pytest.mark.parametrize('name', ARGUMENTS)
def test_an_argument_of_shared_containers_is_named_at_once(name, tmp_path):
  began = time.monotonic()
  arguments = {'class': 'VEPrecond', 'img_resolution': 8, 'img_channels': 3} | {name: nested()}
  with pytest.raises((UserError, ValueError), match=f'{name}='):
    edm.to_model(arguments, {})
  with pytest.raises(UserError, match='class='):
    edm.to_model({'class': nested()}, {})
  assert time.monotonic() - began < 5.0


def test_a_huge_number_is_no_key():
  with pytest.raises(ValueError, match='huge number'):
    pickles.mapping([(1 << 100, 0)])


def test_content_is_not_copied_without_end():
  """One long list, given to a function a thousand times."""
  once = b'ccollections\nOrderedDict\nq\x01](' + (word('ab') * 1000) + b'eq\x02'
  again = b'h\x01h\x02\x85R' * 1000
  with pytest.raises(ValueError, match='copies its own content'):
    pickles.Machine(pickles.TENSORS).run(io.BytesIO(PROTO + once + again + b'.'))


def test_tensors_that_share_one_storage_do_not_outgrow_the_file(peers, tmp_path):  # noqa: F811
  """Each would be an array of its own."""
  whole, calls = peers.tensor, {}
  ones = np.ones(200_000)

  def tensor(values, **given):
    if values.shape != ones.shape:
      return whole(values, **given)
    return calls.setdefault('shared', whole(values))  # pickled once, and referred to

  peers.tensor = tensor
  arrays = CASE.state_dict() | {f'model.more{k}.weight': ones for k in range(40)}
  path = pickled(peers, tmp_path / 'model.pkl', arrays)
  message = refused(None, path, tmp_path / 'run', 'edm')
  assert 'far more than the file has' in message


@pytest.mark.parametrize(
  ('case', 'change'),
  [
    ('ve_ncsnpp_cond', {'channel_mult_noise': 100_000}),
    ('ve_ncsnpp_cond', {'channel_mult_emb': 100_000}),
    ('ve_ncsnpp_cond', {'channel_mult': [1, 90_000]}),
    ('ve_ncsnpp_cond', {'label_dim': 90_000}),
    ('ve_ncsnpp_cond', {'resample_filter': [1] * 100}),
    ('ve_ncsnpp_cond', {'num_blocks': 90_000, 'channel_mult': []}),
    ('vp_adm', {'model_channels': 100_000}),
  ],
)
def test_more_than_the_tensors_show_is_refused_before_it_is_traced(case, change, tmp_path, monkeypatch):
  monkeypatch.setattr('jax.eval_shape', None)
  changed(edm_cases.Case(case), tmp_path / 'model.safetensors', **change)
  message = refused(None, tmp_path / 'model.safetensors', tmp_path / 'run', 'edm')
  assert 'cannot be read' not in message
