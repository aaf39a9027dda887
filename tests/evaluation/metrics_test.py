import numpy as np
import pytest

from diffusion_distillation.evaluation.metrics import RunningFeatures


@pytest.mark.parametrize(('count', 'stride'), [(10_000, 1), (10_001, 2), (25_000, 3)])
def test_the_features_that_are_kept_are_spread_evenly_whatever_the_batches(count, stride):
  features = np.arange(2 * count, dtype=np.float32).reshape(count, 2)
  running = RunningFeatures(count)
  for batch in np.split(features, [1, 500, 501, 503, 9000]):
    running.add(batch)
  found = running.result()
  np.testing.assert_array_equal(found.some, features[::stride])
  np.testing.assert_allclose(found.moments.mean, features.mean(axis=0, dtype=np.float64), rtol=1e-12)
