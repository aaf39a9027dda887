"""Samplers against data for which the denoiser and the probability-flow map are known."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.diffusion import samplers, times
from diffusion_distillation.diffusion.process import Prediction, from_x
from diffusion_distillation.diffusion.samplers import (
  DDIM,
  SAMPLERS,
  Ancestral,
  DPMSolver2M,
  EdmHeun,
  MultistepConsistency,
  ProbabilityFlow,
  Sampler,
  clipped,
  sample,
)
from diffusion_distillation.diffusion.schedules import Cosine
from diffusion_distillation.networks.spaces import Pixels
from tests.exact import Gaussian, Mixture, scales

SCHEDULE = Cosine()
GAUSSIAN = Gaussian(mean=0.3, std=0.5)
MIXTURE = Mixture(weights=(0.5, 0.2, 0.3), means=(-0.6, 0.1, 0.8), stds=(0.15, 0.1, 0.2))
STOCHASTIC = (Ancestral, MultistepConsistency)
BIMODAL = Mixture(weights=(0.4, 0.6), means=(-0.6, 0.5), stds=(0.2, 0.3))


def keys(batch, seed=0):
  return jax.vmap(lambda k: jax.random.fold_in(jax.random.key(seed), k))(jnp.arange(batch))


def padded(grid, length):
  return jnp.pad(jnp.array(grid), (length + 1 - len(grid), 0))


def usual_samplers():
  """Every sampler with its usual numbers, unclipped."""
  return [cls() for cls in SAMPLERS.values()]


def all_samplers():
  """The same, and ancestral sampling at the other gammas."""
  return [*usual_samplers(), Ancestral(gamma=0.5), Ancestral(gamma=1.0)]


def deterministic_samplers():
  return [step for step in usual_samplers() if not isinstance(step, STOCHASTIC)]


def unlimited(step):
  """The sampler as it is from any noise on, where its own has a highest level."""
  return EdmHeun(sigma_max=1e6) if isinstance(step, EdmHeun) else step


def samplers_that_end_on_x():
  return [unlimited(step) for step in all_samplers() if not isinstance(step, ProbabilityFlow)]


def by_hand(step, rng, denoise, z, logsnr):
  """`step` from row to row of logsnr (M + 1, B), its own loops unrolled."""
  state = step.begin(z)
  with jax.disable_jit():
    for at, to in itertools.pairwise(logsnr):
      state = step(rng, denoise, state, at, to)
  return step.end(state)


def slope(nums, errors):
  return np.polyfit(np.log(nums), np.log(errors), 1)[0]


@pytest.mark.parametrize('step', samplers_that_end_on_x(), ids=str)
def test_the_last_step_returns_x_exactly_and_adds_no_noise(step):
  z = jax.random.normal(jax.random.key(0), (5, 2, 2, 1))
  logsnr_t = jnp.array([-20.0, -3.0, 0.0, 4.0, 20.0])
  x = by_hand(step, keys(5), MIXTURE, z, [logsnr_t, jnp.full(5, jnp.inf)])
  np.testing.assert_array_equal(x, MIXTURE(z, logsnr_t).x)


def test_dpm_solver_returns_x_exactly_after_several_steps_too():
  z = jax.random.normal(jax.random.key(0), (5, 2, 2, 1))
  logsnr = [jnp.full(5, value) for value in (-20.0, -3.0, 4.0, jnp.inf)]
  asked = []

  def denoise(z, logsnr):
    asked.append(MIXTURE(z, logsnr))
    return asked[-1]

  x = by_hand(DPMSolver2M(), None, denoise, z, logsnr)
  np.testing.assert_array_equal(x, asked[-1].x)


@pytest.mark.parametrize('step', usual_samplers(), ids=str)
def test_the_network_is_not_called_at_clean_data_nor_beyond_nor_at_padding(step):
  def poisoned(z, logsnr):
    unknown = jnp.where(jnp.isfinite(logsnr), 0.0, jnp.nan)[:, None, None, None]
    return Prediction(*(part + unknown for part in GAUSSIAN(z, logsnr)))

  z = jnp.ones((1, 1, 1, 1))
  run = jax.jit(lambda grid: sample(step, poisoned, SCHEDULE, grid, z, keys(1)))
  for num_steps in (1, 2, 6):
    assert np.isfinite(run(padded(times.uniform(num_steps), 6))).all()


@pytest.mark.parametrize('step', all_samplers(), ids=str)
@pytest.mark.parametrize('end', [1.0, jnp.inf])
def test_a_step_calls_the_network_as_often_as_it_says_between_its_ends(step, end):
  asked = []

  def counting(z, logsnr):
    asked.append(float(logsnr[0]))
    return GAUSSIAN(z, logsnr)

  by_hand(step, keys(1), counting, jnp.ones((1, 1, 1, 1)), jnp.array([[-1.0], [end]]))
  last, usual = step.calls(1), step.calls(2) - step.calls(1)
  assert len(asked) == (last if np.isinf(end) else usual)
  assert asked[0] == -1.0
  assert all(-1.0 <= logsnr <= end + 1e-6 for logsnr in asked)


@pytest.mark.parametrize('step', deterministic_samplers(), ids=str)
def test_any_grid_gives_what_stepping_by_hand_gives(step):
  grid = jnp.array([0.0, 0.03, 0.4, 0.45, 0.9, 1.0])
  z = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
  logsnr = jnp.tile(SCHEDULE(grid)[::-1, None], (1, 3))
  stepped = by_hand(step, None, BIMODAL, z, logsnr)
  run = jax.jit(lambda grid: sample(step, BIMODAL, SCHEDULE, grid, z, keys(3)))
  np.testing.assert_allclose(run(grid), stepped, rtol=1e-5, atol=1e-5)
  assert np.abs(run(times.uniform(5)) - stepped).max() > 0.01


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
  step = jax.jit(Ancestral(gamma=gamma), static_argnums=1)
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
    z = Ancestral()(keys(n, seed=2 + i), point, z, at, to)
    alpha, sigma = scales(SCHEDULE(t[i + 1]))
    assert np.mean(z) == pytest.approx(alpha * 0.7, abs=4 * sigma / np.sqrt(n))
    assert np.var(z) == pytest.approx(sigma**2, rel=4 * np.sqrt(2 / n))


@pytest.mark.parametrize('cls', STOCHASTIC)
def test_a_sampler_that_draws_noise_needs_keys(cls):
  with pytest.raises(ValueError, match='key'):
    cls()(None, GAUSSIAN, jnp.zeros((1, 1, 1, 1)), jnp.zeros(1), jnp.ones(1))


@pytest.mark.parametrize('gamma', [-0.1, 1.1, float('nan')])
def test_gamma_outside_0_to_1_is_refused(gamma):
  with pytest.raises(ValueError, match='gamma'):
    Ancestral(gamma=gamma)


@pytest.mark.parametrize('logsnr', [(-4.0, -1.0), (2.0, 2.5)])
def test_a_multistep_consistency_step_adds_new_noise_to_x(logsnr):
  """z_s given z_t is N(alpha_s x^(z_t), sigma_s^2): of z_t's own noise nothing is left but what x^ has."""
  n = 40_000
  alpha_s, sigma_s = (s[1] for s in scales(logsnr))
  z_t = samplers.normal(keys(n, seed=1), (1, 1, 1))
  at, to = (jnp.full(n, value) for value in logsnr)
  z_s = MultistepConsistency()(keys(n), GAUSSIAN, z_t, at, to)
  noise = np.ravel((np.float64(z_s) - alpha_s * np.float64(GAUSSIAN(z_t, at).x)) / sigma_s)
  assert abs(noise.mean()) < 4 / np.sqrt(n)
  assert noise.var() == pytest.approx(1.0, rel=4 * np.sqrt(2 / n))
  assert abs(np.corrcoef(noise, np.ravel(z_t))[0, 1]) < 4 / np.sqrt(n)


def test_of_a_perfect_consistency_function_any_number_of_steps_draws_from_the_data():
  """x^ of z is where the probability flow takes it: exact samples for a Gaussian, in 1, 2 or 5 steps."""
  n = 40_000

  def consistent(z, logsnr):
    return from_x(z, logsnr, GAUSSIAN.consistency(z, logsnr))

  z = samplers.normal(keys(n, seed=1), (1, 1, 1))
  step = MultistepConsistency()
  run = jax.jit(lambda grid: sample(step, consistent, SCHEDULE, grid, z, keys(n)))
  drawn = [np.float64(run(padded(times.uniform(steps), 5))) for steps in (1, 2, 5)]
  for x in drawn:
    assert x.mean() == pytest.approx(GAUSSIAN.mean, abs=4 * GAUSSIAN.std / np.sqrt(n))
    assert x.var() == pytest.approx(GAUSSIAN.std**2, rel=4 * np.sqrt(2 / n))
  assert np.abs(drawn[0] - drawn[1]).max() > 0.5


def test_ddim_needs_no_keys():
  z = DDIM()(None, GAUSSIAN, jnp.zeros((1, 1, 1, 1)), jnp.zeros(1), jnp.ones(1))
  assert np.isfinite(z).all()


@pytest.mark.parametrize('step', all_samplers(), ids=str)
def test_a_clipped_denoiser_predicts_pixels_and_the_noise_that_goes_with_them(step):
  wide = Gaussian(mean=0.0, std=3.0)
  z = jnp.linspace(-4.0, 4.0, 9)[:, None, None, None]
  logsnr = [jnp.full(9, value) for value in (1.0, 2.0, jnp.inf)]
  assert np.abs(wide(z, logsnr[0]).x).max() > 1.5

  def by_definition(z, logsnr):
    return from_x(z, logsnr, jnp.clip(wide(z, logsnr).x, -1.0, 1.0))

  for rows in (logsnr, logsnr[::2]):
    got, expected, free = (
      by_hand(step, keys(9), denoise, z, rows)
      for denoise in (clipped(wide, Pixels().clip), by_definition, clipped(wide, None))
    )
    np.testing.assert_array_equal(got, expected)
    assert np.abs(got - free).max() > 0.1


@pytest.mark.parametrize('step', samplers_that_end_on_x(), ids=str)
def test_samplers_of_a_clipped_denoiser_return_pixels(step):
  wide = Gaussian(mean=0.0, std=3.0)
  z = jnp.linspace(-4.0, 4.0, 9)[:, None, None, None]
  at, to = jnp.full(9, 1.0), jnp.full(9, jnp.inf)
  x = by_hand(step, keys(9), clipped(wide, Pixels().clip), z, [at, to])
  np.testing.assert_array_equal(x, np.clip(wide(z, at).x, -1.0, 1.0))


def test_ddim_takes_eps_from_the_clipped_x():
  wide = Gaussian(mean=0.0, std=3.0)
  z = jnp.linspace(-4.0, 4.0, 9)[:, None, None, None]
  at, to = jnp.full(9, 1.0), jnp.full(9, 2.0)
  (alpha_t, alpha_s), (sigma_t, sigma_s) = scales([1.0, 2.0])
  x = np.clip(wide(z, at).x, -1.0, 1.0)
  expected = alpha_s * x + sigma_s * (z - alpha_t * x) / sigma_t
  got = DDIM()(None, clipped(wide, Pixels().clip), z, at, to)
  np.testing.assert_allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize('step', usual_samplers(), ids=str)
def test_padding_a_grid_changes_nothing(step):
  z = jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
  run = jax.jit(lambda grid: sample(step, GAUSSIAN, SCHEDULE, grid, z, keys(3)))
  grid = times.quadratic(3)
  np.testing.assert_allclose(run(padded(grid, 9)), run(padded(grid, 3)), rtol=1e-6, atol=1e-6)


def test_grids_padded_to_one_length_share_a_trace():
  traces = []

  def run(grid, z):
    traces.append(grid)
    return sample(DDIM(), GAUSSIAN, SCHEDULE, grid, z, keys(1))

  jitted, z = jax.jit(run), jnp.ones((1, 1, 1, 1))
  one, many = (float(jitted(padded(times.uniform(n), 8), z).squeeze()) for n in (1, 8))
  assert len(traces) == 1
  assert abs(one - many) > 0.1  # and yet it was another grid


class Digits(Sampler):
  """Writes down what it is given, digit by digit, from 7 on; what it returns in the end is the negative."""

  def begin(self, z):
    return z + 7.0

  def end(self, z):
    return -z

  def __call__(self, rng, denoise, z, logsnr_t, logsnr_s):
    asked = denoise(logsnr_t, logsnr_s)[:, None, None, None]
    return 10.0 * z + asked + samplers.normal(rng, (1, 1, 1))


def test_sample_goes_down_the_grid_step_by_step_with_a_key_for_each():
  grid, rng = jnp.array([0.0, 0.2, 0.7, 1.0]), keys(2)

  def denoise(at, to):
    return 1000.0 * jnp.minimum(to, 30.0) + at

  z = jnp.zeros((2, 1, 1, 1))
  expected, logsnr = z + 7.0, SCHEDULE(grid)
  for i in range(3):
    noise = [jax.random.normal(jax.random.fold_in(key, i), (1, 1, 1)) for key in rng]
    at, to = logsnr[3 - i], jnp.minimum(logsnr[2 - i], 30.0)
    expected = 10.0 * expected + 1000.0 * to + at + jnp.stack(noise)
  got = sample(Digits(), denoise, SCHEDULE, grid, z, rng)
  np.testing.assert_allclose(got, -expected, rtol=1e-6)


@pytest.mark.parametrize('step', usual_samplers(), ids=str)
def test_an_image_does_not_depend_on_its_batch(step):
  rng = keys(5)
  z = jax.random.normal(jax.random.key(0), (5, 2, 2, 1))
  grid = jnp.array(times.uniform(4))
  run = jax.jit(lambda z, rng: sample(step, GAUSSIAN, SCHEDULE, grid, z, rng))
  together = run(z, rng)
  np.testing.assert_allclose(run(z[3:4], rng[3:4]), together[3:4], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize('step', all_samplers(), ids=str)
def test_each_image_has_its_own_logsnr_even_where_batch_and_channels_agree(step):
  rng = keys(3)
  z = jax.random.normal(jax.random.key(0), (3, 4, 4, 3))
  logsnr = jnp.array([[-2.0, 0.5, 3.0], [-1.0, 2.0, 3.5], [0.0, jnp.inf, 4.5]])
  together = by_hand(step, rng, GAUSSIAN, z, logsnr)
  for k in range(3):
    row = slice(k, k + 1)
    alone = by_hand(step, rng[row], GAUSSIAN, z[row], logsnr[:, row])
    np.testing.assert_allclose(together[row], alone, rtol=1e-6, atol=1e-6)


def test_each_image_has_its_own_noise():
  noise = samplers.normal(keys(3), (4, 4, 2))
  assert noise.shape == (3, 4, 4, 2)
  np.testing.assert_array_equal(noise[2], jax.random.normal(keys(3)[2], (4, 4, 2)))
