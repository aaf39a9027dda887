"""Reference statistics from files of other projects, and what is refused."""

import io
import pickle
import types

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import metrics, reference, reference_files
from diffusion_distillation.evaluation.extracted import Extracted
from diffusion_distillation.evaluation.metrics import RunningFeatures, measure_all

DIM = 5


class Means:
  """An extractor of Inception's kind, which takes images of any size: DIM means over the pixels, and spatial features."""

  name, digest, metric = 'means', 'd' * 64, 'FID'

  def of(self, images):
    pixels = jnp.asarray(images, jnp.float32).reshape(len(images), -1)
    features = jnp.stack([pixels[:, k::DIM].mean(1) for k in range(DIM)], 1)
    return Extracted(features, None, pixels[:, :3])


IMAGES = np.random.default_rng(0).integers(0, 256, (40, 6, 6, 3)).astype(np.uint8)
FEATURES = np.random.default_rng(1).normal(100.0, 10.0, (60, DIM)).astype(np.float32)
MU, SIGMA = FEATURES.mean(0, dtype=np.float64), np.cov(FEATURES.astype(np.float64).T)
MOMENTS = {'mu': MU, 'sigma': SIGMA}
SPATIAL = {'mu_s': np.ones(3), 'sigma_s': 4.0 * np.eye(3)}


def from_file(tmp_path, **arrays):
  path = tmp_path / 'statistics.npz'
  np.savez(path, **arrays)
  return reference.from_file(tmp_path / 'features', Means(), (6, 6, 3), str(path))


def samples():
  running = RunningFeatures(len(IMAGES))
  running.take(Means().of(IMAGES), slice(None))
  return running.result()


def assert_moments(found, mean=MU, cov=SIGMA):
  np.testing.assert_allclose(found.moments.mean, mean, rtol=1e-6)
  np.testing.assert_allclose(found.moments.cov, cov, rtol=1e-5, atol=1e-9)


def test_moments_of_edm_and_pytorch_fid_leave_out_what_needs_individual_features(tmp_path):
  found = from_file(tmp_path, **MOMENTS)
  assert_moments(found.features)
  assert found.features.some is None and found.features.count is None
  digest = found.described.pop('digest')
  assert len(digest) == 64
  assert found.described == {'file': 'statistics.npz', 'content': 'mu, sigma', 'num_images': None}
  assert measure_all(samples(), found.features).keys() == {'frechet'}
  assert from_file(tmp_path, mu=MU + 1, sigma=SIGMA).described['digest'] != digest


def test_adms_file_has_spatial_moments_and_images_for_the_rest(tmp_path):
  found = from_file(tmp_path, **MOMENTS, **SPATIAL, arr_0=IMAGES)
  assert_moments(found.features)
  assert_moments(found.features.spatial, SPATIAL['mu_s'], SPATIAL['sigma_s'])
  np.testing.assert_allclose(found.features.some, Means().of(IMAGES).features, rtol=1e-6)
  assert found.described['content'] == 'mu, sigma, mu_s, sigma_s, images'
  names = {'frechet', 'kid', 'precision', 'recall', 'sfid'}
  assert measure_all(samples(), found.features).keys() == names


def test_features_of_the_images_in_a_file_are_computed_once(tmp_path, monkeypatch):
  first = from_file(tmp_path, **MOMENTS, arr_0=IMAGES)
  monkeypatch.setattr(reference.given, 'features_of', None)
  again = from_file(tmp_path, **MOMENTS, arr_0=IMAGES)
  np.testing.assert_array_equal(first.features.some, again.features.some)
  with pytest.raises(TypeError):  # other images, for which the function would be called
    from_file(tmp_path, **MOMENTS, arr_0=IMAGES[::-1])


def test_features_and_images_are_references_with_all_metrics(tmp_path):
  found = from_file(tmp_path, pool3=FEATURES, logits=np.zeros((60, 7), np.float32))
  assert_moments(found.features)
  np.testing.assert_array_equal(found.features.some, FEATURES)
  assert found.described['content'] == 'pool3' and found.described['num_images'] == 60
  assert measure_all(samples(), found.features).keys() == {'frechet', 'kid', 'precision', 'recall'}
  images = from_file(tmp_path, images=IMAGES)
  assert images.described['content'] == 'images' and images.described['num_images'] == 40
  assert measure_all(samples(), images.features)['frechet'].value == pytest.approx(0.0, abs=1e-3)


def test_no_file_is_no_reference(tmp_path):
  assert reference.from_file(tmp_path, Means(), (6, 6, 3), '') == (None, None)


BAD = {
  'other names': ({'mean': MU}, 'has neither mu and sigma, nor pool3, nor arr_0; its arrays: mean'),
  'one of two': ({'mu': MU}, 'neither mu and sigma'),
  'another shape': ({'mu': MU, 'sigma': SIGMA[:3]}, r'sigma is float64 \(3, 5\)'),
  'whole numbers': ({'mu': MU.astype(int), 'sigma': SIGMA}, 'mu is int64'),
  'complex numbers': ({'mu': MU, 'sigma': SIGMA.astype(complex)}, 'sigma is complex128'),
  'not finite': ({'mu': MU * np.nan, 'sigma': SIGMA}, 'mu has entries that are not finite'),
  'not symmetric': ({'mu': MU, 'sigma': np.triu(SIGMA + 9)}, 'sigma is not a covariance'),
  'another extractor': (
    {'mu': MU[:4], 'sigma': SIGMA[:4, :4]},
    'describes 4 features, but FID compares 5',
  ),
  'features of another extractor': ({'pool3': FEATURES[:, :3]}, 'describes 3 features'),
  'one feature': ({'pool3': FEATURES[:1]}, r'pool3 is float32 \(1, 5\)'),
  'objects': ({'mu': np.array([{}]), 'sigma': SIGMA}, 'is not a readable .npz'),
  'images of numbers': (MOMENTS | {'arr_0': IMAGES / 255}, 'arr_0 is float64'),
  'spatial moments': (MOMENTS | {'mu_s': np.ones(3), 'sigma_s': np.ones(3)}, 'sigma_s'),
}


@pytest.mark.parametrize('name', BAD)
def test_what_is_no_reference_is_refused_in_one_line(tmp_path, name):
  arrays, message = BAD[name]
  with pytest.raises(UserError, match=message) as error:
    from_file(tmp_path, **arrays)
  assert str(error.value).startswith(('evaluation.reference=', f'{tmp_path}'))
  assert '\n' not in str(error.value) and not (tmp_path / 'features').exists()


def test_files_that_are_damaged_or_programs_are_refused(tmp_path):
  whole = io.BytesIO()
  np.savez_compressed(whole, **MOMENTS)
  array = io.BytesIO()
  np.save(array, MU)
  contents = {
    'cut': whole.getvalue()[:-40],
    'pickle': pickle.dumps(MU),
    'text': b'mu,sigma',
    'empty': b'',
    'single': array.getvalue(),
  }
  for name, content in contents.items():
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f'evaluation.reference={tmp_path}/{name} is ') as error:
      reference_files.read(tmp_path / name)
    assert '\n' not in str(error.value)
  with pytest.raises(UserError, match='there is no such file'):
    reference_files.read(tmp_path / 'none')


def test_a_run_refuses_statistics_of_other_features_before_it_begins(tmp_path):
  """Those of Inception for the small classifier, which is the usual mistake."""
  path = tmp_path / 'cifar10.npz'
  np.savez(path, mu=np.zeros(2048), sigma=np.eye(2048))
  section = types.SimpleNamespace(reference=str(path), inception='')
  config = types.SimpleNamespace(evaluation=section, dataset=types.SimpleNamespace(name='digits'))
  with pytest.raises(
    UserError, match='2048 features, but FD-digits compares 64; for statistics of Inception'
  ):
    reference.check(config)
  section.inception = 'weights.pth'
  reference.check(config)
  section.reference = ''
  reference.check(config)


def test_spatial_moments_that_no_extractor_has_are_ignored(tmp_path):
  found = from_file(tmp_path, **MOMENTS, **SPATIAL).features
  plain = metrics.Features(samples().moments, None, 40)
  assert measure_all(plain, found).keys() == {'frechet'}
