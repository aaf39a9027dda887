"""Samplers against data for which the denoiser and the probability-flow map are known."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation import samplers
from diffusion_distillation.diffusion import Prediction
from diffusion_distillation.samplers import DDIM, SAMPLERS, Ancestral, sample, uniform_times
from diffusion_distillation.schedules import Cosine
from tests.exact import Gaussian, Mixture, scales

SCHEDULE = Cosine()
GAUSSIAN = Gaussian(mean=0.3, std=0.5)
MIXTURE = Mixture(weights=(0.5, 0.2, 0.3), means=(-0.6, 0.1, 0.8), stds=(0.15, 0.1, 0.2))


def keys(batch, seed=0):
  return jax.vmap(lambda k: jax.random.fold_in(jax.random.key(seed), k))(jnp.arange(batch))


def padded(num_steps, length):
  return jnp.pad(jnp.array(uniform_times(num_steps)), (length - num_steps, 0))


def usual_samplers():
  """Every sampler with its usual numbers, unclipped."""
  return [cls(clip_x=False) for cls in SAMPLERS.values()]


def all_samplers():
  """The same, and ancestral sampling at the other gammas."""
  return [*usual_samplers(), Ancestral(gamma=0.5, clip_x=False), Ancestral(gamma=1.0, clip_x=False)]


@pytest.mark.parametrize('data', [GAUSSIAN, MIXTURE], ids=['gaussian', 'mixture'])
def test_ddim_converges_to_the_probability_flow_at_first_order(data):
  z = jnp.linspace(-2.0, 2.0, 9)[:, None, None, None]
  run = jax.jit(lambda times: sample(DDIM(clip_x=False), data, SCHEDULE, times, z, keys(9)))
  exact = data.probability_flow(z, float(SCHEDULE(jnp.float32(1.0))))
  nums = np.array([32, 64, 128, 256])
  errors = [np.sqrt(np.mean((run(padded(n, 256)) - exact) ** 2)) for n in nums]
  slope = np.polyfit(np.log(nums), np.log(errors), 1)[0]
  assert slope == pytest.approx(-1.0, abs=0.05)
  assert errors[-1] < 0.01


def test_ddim_on_a_gaussian_multiplies_deviations_by_a_known_factor_a_step():
  """A step from angle p to q (tan = sigma / alpha) scales (z - alpha m) by cos(p - q) if s = 1."""
  data, n = Gaussian(mean=0.3, std=1.0), 4
  z = jnp.linspace(-2.0, 2.0, 9)[:, None, None, None]
  x = sample(DDIM(clip_x=False), data, SCHEDULE, jnp.array(uniform_times(n)), z, keys(9))
  alpha, sigma = scales(SCHEDULE(jnp.arange(n + 1) / n))
  factor = np.prod(np.cos(np.diff(np.arctan2(sigma, alpha))))
  np.testing.assert_allclose(x, 0.3 + factor * (z - alpha[-1] * 0.3), atol=1e-5)


@pytest.mark.parametrize('step', all_samplers(), ids=str)
def test_the_last_step_returns_x_exactly_and_adds_no_noise(step):
  z = jax.random.normal(jax.random.key(0), (5, 2, 2, 1))
  logsnr_t = jnp.array([-20.0, -3.0, 0.0, 4.0, 20.0])
  x = step(keys(5), MIXTURE, z, logsnr_t, jnp.full(5, jnp.inf))
  np.testing.assert_array_equal(x, MIXTURE(z, logsnr_t).x)


@pytest.mark.parametrize('step', usual_samplers(), ids=str)
def test_the_network_is_not_called_at_clean_data_nor_at_padding(step):
  def poisoned(z, logsnr):
    unknown = jnp.where(jnp.isinf(logsnr), jnp.nan, 0.0)[:, None, None, None]
    return Prediction(*(part + unknown for part in GAUSSIAN(z, logsnr)))

  z = jnp.ones((1, 1, 1, 1))
  run = jax.jit(lambda times: sample(step, poisoned, SCHEDULE, times, z, keys(1)))
  for num_steps in (1, 2, 6):
    assert np.isfinite(run(padded(num_steps, 6))).all()


@pytest.mark.parametrize('logsnr', [(-4.0, -1.0), (-1.0, 0.5), (2.0, 2.5)])
@pytest.mark.parametrize('gamma', [0.0, 0.5, 1.0])
def test_an_ancestral_step_has_the_mean_and_variance_of_its_definition(gamma, logsnr):
  """Linear in z for Gaussian data: N(alpha_t m, v_t) becomes a known Gaussian.

  With alpha_ts = alpha_t / alpha_s and sigma_ts^2 = sigma_t^2 - alpha_ts^2 sigma_s^2, q(z_s | z_t, x) has
  mean (alpha_ts sigma_s^2 z_t + alpha_s sigma_ts^2 x) / sigma_t^2 and variance sigma_ts^2 sigma_s^2 / sigma_t^2
  (Ho et al. 2020, Eq. 7); the upper choice of variance is sigma_ts^2.
  """
  n, (logsnr_t, logsnr_s) = 40_000, logsnr
  (alpha_t, alpha_s), (sigma_t, sigma_s) = scales(logsnr)
  alpha_ts = alpha_t / alpha_s
  var_ts = sigma_t**2 - alpha_ts**2 * sigma_s**2
  noise_var = (var_ts * sigma_s**2 / sigma_t**2) ** (1 - gamma) * var_ts**gamma

  v_t = GAUSSIAN.variance(logsnr_t)
  x_slope = alpha_t * GAUSSIAN.std**2 / v_t
  slope = (alpha_ts * sigma_s**2 + alpha_s * var_ts * x_slope) / sigma_t**2

  noise = samplers.normal(keys(n, seed=1), (1, 1, 1))
  z_t = alpha_t * GAUSSIAN.mean + np.sqrt(v_t) * noise
  at, to = jnp.full(n, logsnr_t), jnp.full(n, logsnr_s)
  step = jax.jit(Ancestral(gamma, clip_x=False), static_argnums=1)
  z_s = np.float64(step(keys(n), GAUSSIAN, z_t, at, to)).ravel()
  residual = z_s - alpha_s * GAUSSIAN.mean - slope * (np.float64(z_t).ravel() - alpha_t * GAUSSIAN.mean)

  for deviations, variance in (
    (residual, noise_var),
    (z_s - alpha_s * GAUSSIAN.mean, slope**2 * v_t + noise_var),
  ):
    assert abs(deviations.mean()) < 4 * np.sqrt(variance / n)
    assert deviations.var() == pytest.approx(variance, rel=4 * np.sqrt(2 / n))


def test_ancestral_sampling_of_one_known_image_has_the_marginals_of_the_forward_process():
  """With gamma = 0 and x known, z_s ~ N(alpha_s x, sigma_s^2) after however many steps."""
  n, point = 40_000, Gaussian(mean=0.7, std=0.0)
  z = samplers.normal(keys(n, seed=1), (1, 1, 1))
  t = np.array([1.0, 0.8, 0.5, 0.2], np.float32)
  for i in range(3):
    at, to = (jnp.full(n, SCHEDULE(t[k])) for k in (i, i + 1))
    z = Ancestral(clip_x=False)(keys(n, seed=2 + i), point, z, at, to)
    alpha, sigma = scales(SCHEDULE(t[i + 1]))
    assert np.mean(z) == pytest.approx(alpha * 0.7, abs=4 * sigma / np.sqrt(n))
    assert np.var(z) == pytest.approx(sigma**2, rel=4 * np.sqrt(2 / n))


def test_ancestral_sampling_needs_keys():
  with pytest.raises(ValueError, match='key'):
    Ancestral()(None, GAUSSIAN, jnp.zeros((1, 1, 1, 1)), jnp.zeros(1), jnp.ones(1))


@pytest.mark.parametrize('gamma', [-0.1, 1.1, float('nan')])
def test_gamma_outside_0_to_1_is_refused(gamma):
  with pytest.raises(ValueError, match='gamma'):
    Ancestral(gamma=gamma)


def test_ddim_needs_no_keys():
  z = DDIM()(None, GAUSSIAN, jnp.zeros((1, 1, 1, 1)), jnp.zeros(1), jnp.ones(1))
  assert np.isfinite(z).all()


@pytest.mark.parametrize('step', all_samplers(), ids=str)
def test_clip_x_clips_the_prediction_to_pixels(step):
  clipping = dataclasses.replace(step, clip_x=True)
  wide = Gaussian(mean=0.0, std=3.0)
  z = jnp.linspace(-4.0, 4.0, 9)[:, None, None, None]
  at, to = jnp.full(9, 1.0), jnp.full(9, jnp.inf)
  x = wide(z, at).x
  assert np.abs(x).max() > 1.5
  np.testing.assert_array_equal(clipping(keys(9), wide, z, at, to), np.clip(x, -1.0, 1.0))


def test_ddim_takes_eps_from_the_clipped_x():
  wide = Gaussian(mean=0.0, std=3.0)
  z = jnp.linspace(-4.0, 4.0, 9)[:, None, None, None]
  at, to = jnp.full(9, 1.0), jnp.full(9, 2.0)
  (alpha_t, alpha_s), (sigma_t, sigma_s) = scales([1.0, 2.0])
  x = np.clip(wide(z, at).x, -1.0, 1.0)
  expected = alpha_s * x + sigma_s * (z - alpha_t * x) / sigma_t
  np.testing.assert_allclose(DDIM()(None, wide, z, at, to), expected, atol=1e-5)


@pytest.mark.parametrize('num_steps', [1, 2, 3, 1024])
def test_uniform_times_are_multiples_of_one_nth(num_steps):
  times = uniform_times(num_steps)
  assert (times[0], times[-1]) == (0.0, 1.0)
  assert np.count_nonzero(times) == num_steps
  np.testing.assert_allclose(times, np.arange(num_steps + 1) / num_steps, rtol=1e-7)


@pytest.mark.parametrize('num_steps', [0, -1])
def test_a_grid_of_no_steps_is_refused(num_steps):
  with pytest.raises(ValueError, match='at least 1'):
    uniform_times(num_steps)


@pytest.mark.parametrize('step', usual_samplers(), ids=str)
def test_padding_a_grid_changes_nothing(step):
  z = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
  run = jax.jit(lambda times: sample(step, GAUSSIAN, SCHEDULE, times, z, keys(3)))
  np.testing.assert_allclose(run(padded(3, 9)), run(padded(3, 3)), rtol=1e-6, atol=1e-6)


def test_grids_padded_to_one_length_share_a_trace():
  traces = []

  def run(times, z):
    traces.append(times)
    return sample(DDIM(clip_x=False), GAUSSIAN, SCHEDULE, times, z, keys(1))

  jitted, z = jax.jit(run), jnp.ones((1, 1, 1, 1))
  one, many = (float(jitted(padded(n, 8), z).squeeze()) for n in (1, 8))
  assert len(traces) == 1
  assert abs(one - many) > 0.1  # and yet it was another grid


def test_sample_goes_down_the_grid_step_by_step_with_a_key_for_each():
  """A sampler that writes down what it is given, digit by digit."""
  times, rng = jnp.array([0.0, 0.2, 0.7, 1.0]), keys(2)

  def step(rng, denoise, z, at, to):
    return 10.0 * z + denoise(at, to)[:, None, None, None] + samplers.normal(rng, (1, 1, 1))

  def denoise(at, to):
    return 1000.0 * jnp.minimum(to, 30.0) + at

  z = expected = jnp.zeros((2, 1, 1, 1))
  logsnr = SCHEDULE(times)
  for i in range(3):
    noise = [jax.random.normal(jax.random.fold_in(key, i), (1, 1, 1)) for key in rng]
    at, to = logsnr[3 - i], jnp.minimum(logsnr[2 - i], 30.0)
    expected = 10.0 * expected + 1000.0 * to + at + jnp.stack(noise)
  got = sample(step, denoise, SCHEDULE, times, z, rng)
  np.testing.assert_allclose(got, expected, rtol=1e-6)


@pytest.mark.parametrize('step', usual_samplers(), ids=str)
def test_an_image_does_not_depend_on_its_batch(step):
  rng = keys(5)
  z = jax.random.normal(jax.random.key(0), (5, 2, 2, 1))
  times = jnp.array(uniform_times(4))
  run = jax.jit(lambda z, rng: sample(step, GAUSSIAN, SCHEDULE, times, z, rng))
  together = run(z, rng)
  np.testing.assert_allclose(run(z[3:4], rng[3:4]), together[3:4], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('step', all_samplers(), ids=str)
def test_each_image_has_its_own_logsnr_even_where_batch_and_channels_agree(step):
  rng = keys(3)
  z = jax.random.normal(jax.random.key(0), (3, 4, 4, 3))
  at, to = jnp.array([-2.0, 0.5, 3.0]), jnp.array([-1.0, 2.0, jnp.inf])
  together = step(rng, GAUSSIAN, z, at, to)
  for k in range(3):
    row = slice(k, k + 1)
    alone = step(rng[row], GAUSSIAN, z[row], at[row], to[row])
    np.testing.assert_allclose(together[row], alone, rtol=1e-6, atol=1e-6)


def test_each_image_has_its_own_noise():
  noise = samplers.normal(keys(3), (4, 4, 2))
  assert noise.shape == (3, 4, 4, 2)
  np.testing.assert_array_equal(noise[2], jax.random.normal(keys(3)[2], (4, 4, 2)))
