"""Noise schedules against their closed form."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.schedules import SCHEDULES, Cosine

RANGES = [(-20.0, 20.0), (-12.0, 7.5), (-3.0, 15.0)]


@pytest.mark.parametrize('name', SCHEDULES)
def test_clean_data_has_infinite_logsnr_and_no_other_time_has(name):
  t = jnp.array([0.0, 1e-30, 1e-6, 0.5, 1.0])
  assert np.isposinf(SCHEDULES[name]()(t)).tolist() == [True, False, False, False, False]


@pytest.mark.parametrize('name', SCHEDULES)
def test_shape_of_t_is_kept(name):
  assert SCHEDULES[name]()(jnp.full((2, 3), 0.5)).shape == (2, 3)
  assert SCHEDULES[name]()(jnp.float32(0.5)).shape == ()


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
  assert (np.diff(SCHEDULES[name]()(jnp.arange(1025) / 1024)) < 0).all()


def test_with_a_wide_range_cosine_has_alpha_cos_and_sigma_sin():
  t = np.linspace(0.01, 0.99, 99)
  with jax.enable_x64(True):
    logsnr = Cosine(-60.0, 60.0)(jnp.array(t))
    alpha, sigma = jnp.sqrt(jax.nn.sigmoid(logsnr)), jnp.sqrt(jax.nn.sigmoid(-logsnr))
  np.testing.assert_allclose(alpha, np.cos(np.pi * t / 2), rtol=1e-9)
  np.testing.assert_allclose(sigma, np.sin(np.pi * t / 2), rtol=1e-9)


@pytest.mark.parametrize(('low', 'high'), [(20.0, -20.0), (5.0, 5.0), (math.nan, 1.0)])
def test_cosine_refuses_a_range_that_does_not_rise(low, high):
  with pytest.raises(ValueError, match='logsnr_min'):
    Cosine(low, high)


@pytest.mark.parametrize('name', SCHEDULES)
def test_equal_schedules_trace_a_jitted_function_once(name):
  traces = []

  def at(schedule, t):
    traces.append(schedule)
    return schedule(t)

  jitted = jax.jit(at, static_argnums=0)
  for _ in range(3):
    jitted(SCHEDULES[name](), jnp.float32(0.5))
  assert len(traces) == 1


def test_different_schedules_do_not_share_a_trace():
  jitted = jax.jit(lambda schedule, t: schedule(t), static_argnums=0)
  near, far = (jitted(Cosine(-high, high), jnp.float32(1.0)) for high in (5.0, 10.0))
  np.testing.assert_allclose([near, far], [-5.0, -10.0], rtol=1e-4)
