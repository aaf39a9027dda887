"""LPIPS beside what the lpips package answered for the same weights, on images of 32 and 64 pixels."""

import jax
import pytest

from diffusion_distillation.methods.distances import Lpips
from tests import peers


@pytest.mark.slow
def test_recorded_distances():
  case, arrays = peers.read('lpips_vgg')
  distance = Lpips(size=1)  # the package does not resize
  entries = [entry for entry in case['parameters'] if entry['kind'] != 'fixed']
  weights = distance.check({entry['name']: peers.tensor(case, entry) for entry in entries}, (32, 32, 3))
  apply = jax.jit(lambda weights, a, b: distance(a, b, weights))
  for side in (32, 64):
    found = apply(weights, arrays[f'in/a_{side}'], arrays[f'in/b_{side}'])
    peers.assert_close(case, f'distance_{side}', found, arrays[f'out/distance_{side}'])
