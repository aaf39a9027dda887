"""Base training against the loss that it cannot go below, and the times it asks at."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.process import Prediction, diffuse, from_v
from diffusion_distillation.diffusion.schedules import Cosine, Karras, LinearBeta, ShiftedCosine
from diffusion_distillation.diffusion.weightings import WEIGHTINGS, SnrTrunc
from diffusion_distillation.methods import Denoising
from diffusion_distillation.networks.denoiser import Bound
from tests.methods.methods_test import GAUSSIAN, KEY, SCHEDULE


def logsnr_at(t):
  """The closed form of SCHEDULE, in float64."""
  b = np.arctan(np.exp(-10.0))
  return -2 * np.log(np.tan((np.arctan(np.exp(10.0)) - b) * t + b))


OFF = 0.5


DENOISERS = {
  'exact': GAUSSIAN,
  'mean': dataclasses.replace(GAUSSIAN, mean=0.4),
  'narrow': dataclasses.replace(GAUSSIAN, std=0.4),
  'wide': dataclasses.replace(GAUSSIAN, std=0.6),
  'off': lambda z, logsnr: off(GAUSSIAN(z, logsnr), logsnr),
}


def off(prediction, logsnr):
  """x is too large by OFF in the noisier half of time."""
  shift = jnp.where(logsnr > 0, 0.0, OFF)[:, None, None, None]
  return Prediction(prediction.x + shift, prediction.eps)


@pytest.fixture(scope='module')
def base_losses():
  """{(weighting, denoiser): the losses of 64 batches of Gaussian data}, all on the same draws."""

  @jax.vmap
  def losses(key):
    key_x, key_loss = jax.random.split(key)
    x = GAUSSIAN.mean + GAUSSIAN.std * jax.random.normal(key_x, (1024, 1, 1, 1))

    def loss(weighting, denoiser):
      def denoise(params, z, logsnr, cond, rng=None):
        return denoiser(z, logsnr)

      method = Denoising(SCHEDULE, WEIGHTINGS[weighting]())
      data = {'x': x, 'cond': None} | method.draw(key_loss, x.shape)
      return method.loss({'student': Bound(denoise, None)}, data, None, 0)[0]

    return {(w, d): loss(w, DENOISERS[d]) for w in WEIGHTINGS for d in DENOISERS}

  return {name: np.float64(v) for name, v in jax.jit(losses)(jax.random.split(KEY, 64)).items()}


@pytest.mark.parametrize('weighting', WEIGHTINGS)
def test_the_exact_denoiser_has_the_least_loss_there_is(base_losses, weighting):
  """E_t[weight Var[x | z]], with t uniform: the integral by the midpoint rule."""
  logsnr = logsnr_at((np.arange(20_000) + 0.5) / 20_000)
  snr = np.exp(logsnr)
  weight = {
    'constant': 1.0,
    'snr': snr,
    'snr_trunc': np.maximum(1.0, snr),
    'snr_plus_one': 1.0 + snr,
    'edm': snr + 1 / 0.5**2,
  }[weighting]
  least = np.mean(weight * GAUSSIAN.posterior_variance(logsnr))
  losses = base_losses[weighting, 'exact']
  error = losses.std() / np.sqrt(len(losses))
  assert error < 0.01 * least
  assert losses.mean() == pytest.approx(least, abs=4 * error)


@pytest.mark.parametrize('weighting', WEIGHTINGS)
@pytest.mark.parametrize('denoiser', ['mean', 'narrow', 'wide'])
def test_any_other_denoiser_has_a_higher_loss(base_losses, weighting, denoiser):
  excess = base_losses[weighting, denoiser] - base_losses[weighting, 'exact']
  assert excess.mean() > 4 * excess.std() / np.sqrt(len(excess))


def test_an_error_of_known_size_in_x_costs_its_square(base_losses):
  excess = base_losses['constant', 'off'] - base_losses['constant', 'exact']
  error = excess.std() / np.sqrt(len(excess))
  assert excess.mean() == pytest.approx(0.5 * OFF**2, abs=4 * error)  # logsnr <= 0 half the time


def recorded(method, size=4096):
  """What base training asks of the student: z, logsnr, cond and rng."""
  calls = []

  def recording(params, z, logsnr, cond, rng=None):
    calls.append((z, logsnr, cond, rng))
    return GAUSSIAN(z, logsnr)

  data = {'x': jnp.full((size, 1, 1, 1), 0.5), 'cond': {'label': jnp.arange(size)}}
  student = {'student': Bound(recording, None)}
  method.loss(student, data | method.draw(KEY, (size, 1, 1, 1)), KEY, 0)
  return calls


def time_at(logsnr):
  """The inverse of `logsnr_at`."""
  b = np.arctan(np.exp(-10.0))
  return (np.arctan(np.exp(-np.float64(logsnr) / 2)) - b) / (np.arctan(np.exp(10.0)) - b)


@pytest.mark.parametrize('law', [times.Uniform(), times.Uniform(stratified=True)], ids=str)
def test_base_training_draws_time_uniformly_and_noise_normally(law):
  ((z, logsnr, cond, rng),) = recorded(Denoising(SCHEDULE, SnrTrunc(), law))
  t = time_at(logsnr)
  clean = diffuse(jnp.full_like(z, 0.5), jnp.zeros_like(z), logsnr)
  sigma = diffuse(jnp.zeros_like(z), jnp.ones_like(z), logsnr)
  eps = np.ravel((z - clean) / sigma)
  assert stats.kstest(t, 'uniform').pvalue > 0.01
  assert stats.kstest(eps[t > 0.01], 'norm').pvalue > 0.01
  assert abs(np.corrcoef(t, eps)[0, 1]) < 4 / np.sqrt(len(t))
  np.testing.assert_array_equal(cond['label'], np.arange(len(t)))
  assert rng is not None


def test_base_training_with_stratified_time_has_one_example_in_each_stratum():
  ((_, logsnr, _, _),) = recorded(Denoising(SCHEDULE, SnrTrunc(), times.Uniform(stratified=True)), 64)
  np.testing.assert_array_equal(np.sort(np.ceil(64 * time_at(logsnr) - 1e-4)), np.arange(64) + 1)


@pytest.mark.parametrize('num_steps', [1, 5, 8])
def test_in_discrete_time_base_training_asks_at_i_nths_and_as_often_at_each(num_steps):
  size = 4096
  ((_, logsnr, _, _),) = recorded(Denoising(SCHEDULE, SnrTrunc(), num_steps=num_steps), size)
  i = np.round(num_steps * time_at(logsnr)).astype(int)
  np.testing.assert_allclose(logsnr, SCHEDULE(jnp.array(i) / num_steps), rtol=1e-5, atol=1e-5)
  counts = np.bincount(i, minlength=num_steps + 1)
  assert counts[0] == 0
  share = 1 / num_steps
  assert (np.abs(counts[1:] - size * share) <= 4 * np.sqrt(size * share * (1 - share))).all()


def test_in_discrete_stratified_time_every_i_has_its_exact_share():
  law = times.Uniform(stratified=True)
  draws = Denoising(SCHEDULE, SnrTrunc(), law, num_steps=8).draw(KEY, (64, 1, 1, 1))
  np.testing.assert_array_equal(np.sort(draws['t']), np.repeat(np.arange(1, 9) / 8, 8))


def test_in_discrete_time_the_exact_denoiser_has_the_mean_of_its_losses_at_i_nths():
  n, size = 5, 100_000
  method = Denoising(SCHEDULE, SnrTrunc(), num_steps=n)
  x = GAUSSIAN.mean + GAUSSIAN.std * jax.random.normal(jax.random.key(1), (size, 1, 1, 1))

  @jax.jit
  def losses():
    data = {'x': x, 'cond': None} | method.draw(KEY, x.shape)
    return method.losses(lambda z, logsnr, *_: GAUSSIAN(z, logsnr), data)

  logsnr = logsnr_at(np.arange(1, n + 1) / n)
  weight = np.maximum(1.0, np.exp(logsnr))
  got = np.float64(losses())
  error = got.std() / np.sqrt(size)
  assert got.mean() == pytest.approx(
    np.mean(weight * GAUSSIAN.posterior_variance(logsnr)), abs=4 * error
  )


@pytest.mark.parametrize('smallest', [True, False])
def test_base_training_never_asks_about_clean_data(smallest, monkeypatch):
  """Uniform numbers lie in [0, 1): neither the smallest nor the largest may become t = 0."""
  extreme = 0.0 if smallest else 1.0 - 2.0**-23
  monkeypatch.setattr(jax.random, 'uniform', lambda key, shape: jnp.full(shape, extreme))
  ((_, logsnr, _, _),) = recorded(Denoising(SCHEDULE, SnrTrunc()))
  assert np.isfinite(logsnr).all()


@pytest.mark.parametrize('weighting', WEIGHTINGS)
@pytest.mark.parametrize('schedule', [Cosine(), ShiftedCosine(8), LinearBeta(), Karras()], ids=str)
def test_a_time_of_0_is_taken_for_the_first_after_it(schedule, weighting):
  """And has a finite loss, whose gradient is finite."""
  method = Denoising(schedule, WEIGHTINGS[weighting]())
  x, eps = jax.random.normal(KEY, (2, 4, 2, 2, 1))

  def denoise(params, z, logsnr, cond, rng=None):
    return from_v(z, logsnr, params * z)

  def losses(scale, t):
    data = {'x': x, 'eps': eps, 't': jnp.full(4, t), 'cond': None}
    return method.losses(Bound(denoise, scale), data)

  at_0, after = losses(1.0, 0.0), losses(1.0, 1e-30)
  assert np.isfinite(at_0).all()
  np.testing.assert_allclose(at_0, after, rtol=1e-5)
  assert np.isfinite(jax.grad(lambda scale: losses(scale, 0.0).sum())(1.0))
