"""The benchmark of single convolutions."""

import numpy as np
import pytest

from benchmarks import convolutions


def by_hand(x, kernel, gradient):
  """A 3x3 convolution with zeros around the images, and what the two gradients of <result, gradient> are."""
  size, found = x.shape[1], {kind: 0.0 for kind in convolutions.KINDS}
  padded = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
  of_input, of_kernel = np.zeros_like(padded), np.zeros_like(kernel)
  for i in range(3):
    for j in range(3):
      window = (slice(None), slice(i, i + size), slice(j, j + size))
      found['forward'] = found['forward'] + padded[window] @ kernel[i, j]
      of_input[window] += gradient @ kernel[i, j].T
      of_kernel[i, j] = np.einsum('bhwc,bhwd->cd', padded[window], gradient)
  return found | {'input gradient': of_input[:, 1:-1, 1:-1], 'kernel gradient': of_kernel}


@pytest.mark.parametrize('kind', convolutions.KINDS)
def test_the_convolution_and_its_gradients(kind):
  shape = convolutions.Shape(2, 4, 3, 5)
  run, wait = convolutions.ours(shape, kind)
  run()
  expected = by_hand(*convolutions._arrays(shape))[kind]
  np.testing.assert_allclose(wait(), expected, rtol=1e-4, atol=1e-5)


def test_the_table_has_a_row_for_each_kind(monkeypatch, capsys):
  monkeypatch.setattr(convolutions.importlib.util, 'find_spec', lambda name: None)
  monkeypatch.setitem(convolutions.SHAPES, 'digits', (convolutions.Shape(2, 4, 3, 5),))
  assert convolutions.main(['--network=digits', '--turns=2', '--seconds=0']) == 0
  out, err = capsys.readouterr()
  assert err.startswith('PyTorch is not installed')
  lines = [[cell.strip() for cell in line.split('|')[1:-1]] for line in out.splitlines()]
  assert [line[2] for line in lines[2:]] == list(convolutions.KINDS)
  assert {line[3] for line in lines[2:]} == {f'{2 * 9 * 2 * 16 * 15 / 1e9:.3g}'}
