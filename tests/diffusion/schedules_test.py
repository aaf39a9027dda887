"""Noise schedules against their closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.diffusion.schedules import (
  SCHEDULES,
  Cosine,
  Karras,
  LinearBeta,
  ShiftedCosine,
)

RANGES = [(-20.0, 20.0), (-12.0, 7.5), (-3.0, 15.0)]
NEEDED = {'shifted_cosine': {'image_size': 128}}


def build(name):
  """The schedule with its own defaults, and NEEDED for what has none."""
  return SCHEDULES[name](**NEEDED.get(name, {}))


@pytest.mark.parametrize('name', SCHEDULES)
def test_clean_data_has_infinite_logsnr_and_no_other_time_has(name):
  t = jnp.array([0.0, 1e-30, 1e-6, 0.5, 1.0])
  assert np.isposinf(build(name)(t)).tolist() == [True, False, False, False, False]


@pytest.mark.parametrize('name', SCHEDULES)
def test_shape_of_t_is_kept(name):
  assert build(name)(jnp.full((2, 3), 0.5)).shape == (2, 3)
  assert build(name)(jnp.float32(0.5)).shape == ()


@pytest.mark.parametrize('name', SCHEDULES)
def test_the_inverse_of_a_schedule_gives_back_its_time(name):
  t = np.linspace(0.01, 1.0, 100)
  with jax.enable_x64(True):
    schedule = build(name)
    np.testing.assert_allclose(schedule.inverse(schedule(jnp.array(t))), t, rtol=1e-9)
  np.testing.assert_allclose(schedule.inverse(schedule(jnp.float32(t))), t, atol=5e-7)


@pytest.mark.parametrize('name', SCHEDULES)
def test_the_inverse_of_what_a_schedule_does_not_reach_lies_outside_its_time(name):
  schedule = build(name)
  cleanest, noisiest = schedule(jnp.array([1e-30, 1.0]))
  beyond = jnp.array([cleanest + 1.0, 60.0, noisiest - 1.0, -60.0])
  t = schedule.inverse(beyond)
  assert (t[:2] < 0.0).all() and (t[2:] > 1.0).all() and np.isfinite(t).all()


@pytest.mark.parametrize(('low', 'high'), RANGES)
def test_cosine_runs_from_the_upper_to_the_lower_end_of_its_range(low, high):
  with jax.enable_x64(True):
    ends = Cosine(low, high)(jnp.array([1e-300, 1.0]))
  np.testing.assert_allclose(ends, [high, low], rtol=1e-9)


def test_cosine_reaches_its_ends_in_float32():
  """Near t = 1 the angle is known to some ulps of pi / 2, 2^-23; tan magnifies them by e^10."""
  ends = Cosine()(jnp.array([1e-30, 1.0], jnp.float32))
  np.testing.assert_allclose(ends[0], 20.0, rtol=1e-6)
  np.testing.assert_allclose(ends[1], -20.0, atol=2 * math.exp(10) * 2 * 2**-23)


@pytest.mark.parametrize(('low', 'high'), RANGES)
def test_cosine_is_minus_two_log_tan_of_a_line(low, high):
  t = np.linspace(0.001, 1.0, 200)
  b = np.arctan(np.exp(-high / 2))
  a = np.arctan(np.exp(-low / 2)) - b
  with jax.enable_x64(True):
    logsnr = Cosine(low, high)(jnp.array(t))
  np.testing.assert_allclose(logsnr, -2 * np.log(np.tan(a * t + b)), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('name', SCHEDULES)
def test_logsnr_falls_strictly_with_time(name):
  assert (np.diff(build(name)(jnp.arange(1025) / 1024)) < 0).all()


@pytest.mark.parametrize('image_size', [16, 64, 256])
@pytest.mark.parametrize('base_size', [32, 64])
def test_shifted_cosine_is_cosine_plus_twice_the_logarithm_of_the_ratio_of_sizes(image_size, base_size):
  with jax.enable_x64(True):
    t = jnp.arange(1, 101) / 100
    shift = ShiftedCosine(image_size, base_size)(t) - Cosine()(t)
  np.testing.assert_allclose(shift, 2 * np.log(base_size / image_size), rtol=1e-9, atol=1e-9)


def test_averaged_down_to_the_base_size_a_larger_image_has_the_signal_to_noise_of_cosine():
  """The mean of k x k pixels keeps the signal and has 1 / k^2 of the noise's variance."""
  t = jnp.arange(1, 101) / 100
  snr = np.exp(np.float64(ShiftedCosine(image_size=256)(t)))
  np.testing.assert_allclose(snr * (256 / 64) ** 2, np.exp(np.float64(Cosine()(t))), rtol=1e-4)


def test_shifted_cosine_at_its_base_size_is_cosine():
  t = jnp.arange(101) / 100
  np.testing.assert_array_equal(ShiftedCosine(64)(t), Cosine()(t))
  np.testing.assert_array_equal(ShiftedCosine(8, 8, -7.0, 9.0)(t), Cosine(-7.0, 9.0)(t))


@pytest.mark.parametrize('steps', [1000, 100_000])
def test_linear_beta_is_the_product_of_ddpm_s_betas(steps):
  """alpha^2 = prod (1 - beta_i) in discrete time; the two differ by O(1 / N), and by 0.1 at N = 1000."""
  betas = np.linspace(0.1 / steps, 20.0 / steps, steps)  # 1e-4 ... 0.02 in 1000 steps
  log_alpha_bar = np.cumsum(np.log1p(-betas))
  discrete = log_alpha_bar - np.log(-np.expm1(log_alpha_bar))
  with jax.enable_x64(True):
    logsnr = np.array(LinearBeta(logsnr_max=60.0)(jnp.arange(1, steps + 1) / steps))
  np.testing.assert_allclose(logsnr, discrete, rtol=0.0, atol=100 / steps)
  np.testing.assert_allclose(1 / (1 + np.exp(-logsnr)), np.exp(log_alpha_bar), atol=1 / steps)


@pytest.mark.parametrize('betas', [(0.1, 20.0), (0.5, 0.5), (1.0, 12.0)])
def test_linear_beta_has_an_alpha_that_falls_at_the_rate_of_its_betas(betas):
  """d log alpha^2 / dt = -beta(t), here by central differences, exact for a parabola."""
  low, high = betas
  t, h = np.linspace(0.1, 0.9, 9), 1e-3
  with jax.enable_x64(True):
    later, earlier = (jax.nn.log_sigmoid(LinearBeta(low, high)(jnp.array(t + d))) for d in (h, -h))
    slope = (later - earlier) / (2 * h)
  np.testing.assert_allclose(slope, -(low + (high - low) * t), rtol=1e-9)


@pytest.mark.parametrize('high', [20.0, 9.0])
def test_linear_beta_begins_at_the_upper_end_of_its_range(high):
  with jax.enable_x64(True):
    start = LinearBeta(logsnr_max=high)(jnp.array(1e-300))
  np.testing.assert_allclose(start, high, rtol=1e-7)
  np.testing.assert_allclose(LinearBeta(logsnr_max=high)(jnp.float32(1e-30)), high, rtol=1e-5)


@pytest.mark.parametrize('fields', [(0.002, 80.0, 7.0), (0.01, 10.0, 1.0), (0.002, 80.0, 3.0)])
def test_karras_has_evenly_spaced_roots_of_its_noise_levels(fields):
  """Karras et al. 2022, Eq. 5, from i = 0 (the most noise) to N - 1; s = sigma / alpha, logsnr = -2 log s."""
  low, high, rho = fields
  count = 18
  i = np.arange(count)
  roots = high ** (1 / rho) + i / (count - 1) * (low ** (1 / rho) - high ** (1 / rho))
  t = np.maximum(1 - i / (count - 1), 1e-300)
  with jax.enable_x64(True):
    logsnr = Karras(*fields)(jnp.array(t))
  np.testing.assert_allclose(np.exp(-0.5 * np.array(logsnr)), roots**rho, rtol=1e-9)


def test_with_a_wide_range_cosine_has_alpha_cos_and_sigma_sin():
  t = np.linspace(0.01, 0.99, 99)
  with jax.enable_x64(True):
    logsnr = Cosine(-30.0, 60.0)(jnp.array(t))
    alpha, sigma = jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))
  np.testing.assert_allclose(alpha, np.cos(np.pi * t / 2), atol=2 * math.exp(-15))  # the angle left out
  np.testing.assert_allclose(sigma, np.sin(np.pi * t / 2), atol=2 * math.exp(-15))


@pytest.mark.parametrize(('low', 'high'), [(20.0, -20.0), (5.0, 5.0), (math.nan, 1.0), (-40.0, 20.0)])
def test_cosine_refuses_a_range_that_does_not_rise(low, high):
  with pytest.raises(ValueError, match='logsnr_min'):
    Cosine(low, high)
  with pytest.raises(ValueError, match='logsnr_min'):
    ShiftedCosine(64, 64, low, high)


@pytest.mark.parametrize(('image_size', 'base_size'), [(0, 64), (64, 0), (64, -8)])
def test_shifted_cosine_refuses_an_image_without_pixels(image_size, base_size):
  with pytest.raises(ValueError, match='positive'):
    ShiftedCosine(image_size, base_size)


@pytest.mark.parametrize(
  'betas', [(0.0, 20.0), (-0.1, 20.0), (20.0, 0.1), (0.1, math.inf), (math.nan, 20.0), (0.1, math.nan)]
)
def test_linear_beta_refuses_betas_that_are_not_positive_or_fall(betas):
  with pytest.raises(ValueError, match='beta_min'):
    LinearBeta(*betas)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'s_min': 0.0}, 's_min'),
    ({'s_min': 80.0}, 's_min'),
    ({'s_min': math.nan}, 's_min'),
    ({'s_min': 1e-30}, 's_min'),
    ({'s_max': math.inf}, 's_max'),
    ({'s_max': 1e7}, 's_max'),
    ({'rho': 0.5}, 'rho'),
    ({'rho': math.nan}, 'rho'),
  ],
)
def test_karras_refuses_noise_that_does_not_rise_or_that_float32_cannot_hold(fields, message):
  with pytest.raises(ValueError, match=message):
    Karras(**fields)


@pytest.mark.parametrize('fields', [{'s_max': 9e5}, {'rho': 1.0}, {'rho': 100.0}])
def test_karras_is_finite_up_to_its_bounds(fields):
  ends = Karras(**fields)(jnp.array([1.2e-38, 1.0]))
  assert np.isfinite(ends).all() and (jnp.sqrt(jax.nn.sigmoid(ends)) > 0).all()


@pytest.mark.parametrize('name', SCHEDULES)
def test_equal_schedules_trace_a_jitted_function_once(name):
  traces = []

  def at(schedule, t):
    traces.append(schedule)
    return schedule(t)

  jitted = jax.jit(at, static_argnums=0)
  for _ in range(3):
    jitted(build(name), jnp.float32(0.5))
  assert len(traces) == 1


def test_different_schedules_do_not_share_a_trace():
  jitted = jax.jit(lambda schedule, t: schedule(t), static_argnums=0)
  near, far = (jitted(Cosine(-high, high), jnp.float32(1.0)) for high in (5.0, 10.0))
  np.testing.assert_allclose([near, far], [-5.0, -10.0], rtol=1e-4)


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'beta_max': 200.0}, 'beta_max'),
    ({'logsnr_max': math.nan}, 'logsnr_max'),
    ({'logsnr_max': 1000.0}, 'logsnr_max'),
    ({'logsnr_max': -800.0}, 'logsnr_max'),
  ],
)
def test_linear_beta_refuses_what_float32_cannot_hold(fields, message):
  with pytest.raises(ValueError, match=message):
    LinearBeta(**fields)


@pytest.mark.parametrize('fields', [{'beta_max': 159.0}, {'logsnr_max': 80.0}])
def test_linear_beta_is_finite_up_to_its_bounds(fields):
  ends = LinearBeta(**fields)(jnp.array([1.2e-38, 1.0]))
  alpha = jnp.sqrt(jax.nn.sigmoid(ends))
  assert np.isfinite(ends).all() and (alpha > 0).all()
