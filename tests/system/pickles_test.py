"""The stack machine that reads pickles: what it takes, and what it refuses."""

import pickletools

import numpy as np
import pytest

from diffusion_distillation.interop import edm
from diffusion_distillation.system import pickles


@pytest.mark.parametrize(
  ('offset', 'shape', 'strides'),
  [(1, (64,), (1,)), (0, (8, 9), (8, 1)), (0, (2**40,), (0,)), (63, (64,), (-1,)), (-1, (2,), (1,))],
)
def test_a_tensor_stays_in_its_storage(offset, shape, strides):
  numbers = np.arange(64.0)
  with pytest.raises(ValueError, match='a tensor'):
    pickles.tensor(numbers, offset, shape, strides)
  turned = pickles.tensor(numbers, 4, (3, 5), (1, 12))
  np.testing.assert_array_equal(turned, 4 + np.arange(3)[:, None] + 12 * np.arange(5)[None])


def test_a_module_that_holds_itself_is_refused(tmp_path):
  inner = pickles.Inert('SongUNet')
  inner.state['_modules'] = {'model': inner}
  with pytest.raises(ValueError, match='one a second time'):
    edm._state_dict(inner, '', set())


def test_every_opcode_is_known_or_refused():
  """Those that are refused call things, or refer to what is not in the file."""
  machine = pickles.Machine({})
  refused = {
    opcode.name
    for opcode in pickletools.opcodes
    if opcode.name not in {'STOP', *pickles._CONSTANTS, *pickles._VALUES, *pickles._SKIPPED}
    and not hasattr(machine, f'_{opcode.name.lower()}')
  }
  assert refused == {
    *('INST', 'OBJ', 'NEWOBJ_EX', 'EXT1', 'EXT2', 'EXT4', 'PERSID', 'NEXT_BUFFER', 'READONLY_BUFFER')
  }
