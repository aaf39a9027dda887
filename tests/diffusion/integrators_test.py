"""Samplers of the probability-flow ODE: their order of convergence, and their steps by definition."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.samplers import (
  DDIM,
  MIDPOINT,
  MILNE,
  RK4,
  DDIMKeepEps,
  DPMSolver2M,
  EdmHeun,
  Euler,
  Heun,
  sample,
)
from diffusion_distillation.diffusion.schedules import LinearBeta
from tests.diffusion.samplers_test import (
  BIMODAL,
  GAUSSIAN,
  MIXTURE,
  SCHEDULE,
  by_hand,
  deterministic_samplers,
  keys,
  padded,
  slope,
  unlimited,
)
from tests.exact import Gaussian, scales

ORDERS = {DDIM: 1, DDIMKeepEps: 1, Euler: 1, Heun: 2, EdmHeun: 2, DPMSolver2M: 2, RK4: 4}


def flow_errors(step, data, schedule, grid, nums):
  """Root mean square distance in float64 of where `sample` lands from the probability flow, for each N."""
  with jax.enable_x64(True):
    z = jnp.linspace(-2.0, 2.0, 9)[:, None, None, None]
    run = jax.jit(lambda grid: sample(step, data, schedule, grid, z, keys(9)))
    exact = data.probability_flow(z, float(schedule(jnp.array(1.0))))
    xs = [run(padded(np.float64(grid(n)), max(nums))) for n in nums]
    return np.array([np.sqrt(np.mean((x - exact) ** 2)) for x in xs])


def test_every_deterministic_sampler_has_an_order_to_be_tested():
  assert {type(step) for step in deterministic_samplers()} == set(ORDERS)


@pytest.mark.parametrize('data', [GAUSSIAN, BIMODAL], ids=['gaussian', 'mixture'])
@pytest.mark.parametrize('cls', ORDERS)
def test_samplers_converge_to_the_probability_flow_at_their_order_by_a_quadratic_grid(cls, data):
  nums = (128, 256, 512)
  errors = flow_errors(unlimited(cls()), data, LinearBeta(), times.quadratic, nums)
  assert slope(nums, errors) == pytest.approx(-ORDERS[cls], abs=0.06)
  assert errors[-1] < 0.01


@pytest.mark.parametrize('data', [GAUSSIAN, BIMODAL], ids=['gaussian', 'mixture'])
@pytest.mark.parametrize('cls', [cls for cls in ORDERS if cls is not EdmHeun])
def test_samplers_converge_to_the_probability_flow_at_their_order_by_a_uniform_grid(cls, data):
  """DPM-Solver's steps in logsnr do not shrink at the ends of this schedule: log N / N^2. EDM's sampler has a grid of
  its own, on which tests/edm_test.py looks at it: here its first step is as long as all the others, at any N."""
  nums = (512, 1024, 2048) if cls is DPMSolver2M else (128, 256, 512)
  errors = flow_errors(cls(), data, SCHEDULE, times.uniform, nums)
  logarithm = np.log(nums) if cls is DPMSolver2M else 1.0
  assert slope(nums, errors / logarithm) == pytest.approx(-ORDERS[cls], abs=0.15)
  assert errors[-1] < 0.01


@pytest.mark.parametrize('data', [GAUSSIAN, MIXTURE], ids=['gaussian', 'mixture'])
def test_ddim_converges_in_float32_as_well(data):
  z = jnp.linspace(-2.0, 2.0, 9)[:, None, None, None]
  run = jax.jit(lambda grid: sample(DDIM(), data, SCHEDULE, grid, z, keys(9)))
  exact = data.probability_flow(z, float(SCHEDULE(jnp.float32(1.0))))
  nums = np.array([32, 64, 128, 256])
  errors = [np.sqrt(np.mean((run(padded(times.uniform(n), 256)) - exact) ** 2)) for n in nums]
  assert slope(nums, errors) == pytest.approx(-1.0, abs=0.05)
  assert errors[-1] < 0.01


def order(tableau):
  """The order of a Runge-Kutta method, up to 4, by the conditions on its tableau (Butcher)."""
  a, b, c = tableau.arrays()
  conditions = [
    [(b.sum(), 1)],
    [(b @ c, 1 / 2)],
    [(b @ c**2, 1 / 3), (b @ a @ c, 1 / 6)],
    [(b @ c**3, 1 / 4), (b @ (c * (a @ c)), 1 / 8), (b @ a @ c**2, 1 / 12), (b @ a @ a @ c, 1 / 24)],
  ]
  met = [np.allclose(*np.transpose(group), atol=1e-12) for group in conditions]
  return [*met, False].index(False)


@pytest.mark.parametrize(
  ('tableau', 'expected'),
  [(Euler.tableau, 1), (Heun.tableau, 2), (MIDPOINT, 2), (MILNE, 3), (RK4.tableau, 4)],
  ids=['euler', 'heun', 'midpoint', 'milne', 'rk4'],
)
def test_tableaus_meet_the_order_conditions(tableau, expected):
  a, b, c = tableau.arrays()
  np.testing.assert_array_equal(np.triu(a), 0.0)  # explicit
  np.testing.assert_array_equal(c, a.sum(1))
  assert [tuple(row[:k]) for k, row in enumerate(a)] == list(tableau.a)
  assert tuple(b) == tableau.b
  assert order(tableau) == expected


@pytest.mark.parametrize('cls', [Euler, Heun, RK4])
def test_the_last_step_of_a_runge_kutta_sampler_is_open_and_at_most_one_order_less(cls):
  *_, c = cls.last.arrays()
  assert max(c) < 1.0
  assert len(cls.last.b) == len(cls.tableau.b) == cls.calls_per_step
  assert order(cls.last) >= ORDERS[cls] - 1


def euler(v, p, z, h):
  return z + h * v(p, z)


def heun(v, p, z, h):
  k1 = v(p, z)
  k2 = v(p + h, z + h * k1)
  return z + h * (k1 + k2) / 2


def midpoint(v, p, z, h):
  return z + h * v(p + h / 2, z + h / 2 * v(p, z))


def runge_kutta_4(v, p, z, h):
  k1 = v(p, z)
  k2 = v(p + h / 2, z + h / 2 * k1)
  k3 = v(p + h / 2, z + h / 2 * k2)
  k4 = v(p + h, z + h * k3)
  return z + h * (k1 + 2 * k2 + 2 * k3 + k4) / 6


def milne(v, p, z, h):
  k1 = v(p, z)
  k2 = v(p + h / 4, z + h / 4 * k1)
  k3 = v(p + h / 2, z + h / 2 * k2)
  k4 = v(p + 3 * h / 4, z + h / 4 * k2 + h / 2 * k3)
  return z + h * (2 * k2 - k3 + 2 * k4) / 3


@pytest.mark.parametrize(
  ('cls', 'usual', 'last'), [(Euler, euler, euler), (Heun, heun, midpoint), (RK4, runge_kutta_4, milne)]
)
def test_runge_kutta_steps_follow_dz_dphi_equal_to_v(cls, usual, last):
  """tan phi = sigma / alpha; v = E[alpha eps - sigma x | z] of Gaussian data, by NumPy."""
  m, s = GAUSSIAN.mean, GAUSSIAN.std

  def v(phi, z):
    alpha, sigma = np.cos(phi), np.sin(phi)
    return alpha * sigma * (1 - s**2) * (z - alpha * m) / (alpha**2 * s**2 + sigma**2) - sigma * m

  z = np.linspace(-2.0, 2.0, 5)
  phi_t = np.array([1.5, 1.2, 0.9, 0.5, 0.1])
  for to, formula in ((phi_t * [0.9, 0.1, 0.5, 0.8, 0.3], usual), (0.0 * phi_t, last)):
    with np.errstate(divide='ignore'):
      at, to_logsnr = -2 * np.log(np.tan(phi_t)), -2 * np.log(np.tan(to))
    with jax.enable_x64(True):
      step = cls()
      got = by_hand(step, None, GAUSSIAN, jnp.array(z)[:, None], jnp.array([at, to_logsnr]))
    np.testing.assert_allclose(got[:, 0], formula(v, phi_t, z, to - phi_t), rtol=1e-11, atol=1e-11)


def test_dpm_solver_steps_are_those_of_its_algorithm():
  """Lu et al. 2022, algorithm 2, in its own symbols, by NumPy."""
  t = np.array([1.0, 0.85, 0.55, 0.5, 0.2, 0.0])
  with jax.enable_x64(True):
    logsnr = np.array(SCHEDULE(jnp.array(t)))
    z = jnp.linspace(-2.0, 2.0, 5)[:, None]
    got = by_hand(DPMSolver2M(), None, MIXTURE, z, jnp.tile(logsnr[:, None], (1, 5)))
    x = []
    (alpha, sigma), lamb = scales(logsnr), logsnr / 2
    for i in range(1, 6):
      x.append(np.array(MIXTURE(z, jnp.full(5, logsnr[i - 1])).x))
      h = lamb[i] - lamb[i - 1]
      d = x[-1]
      if 1 < i < 5:
        r = (lamb[i - 1] - lamb[i - 2]) / h
        d = (1 + 1 / (2 * r)) * x[-1] - 1 / (2 * r) * x[-2]
      z = sigma[i] / sigma[i - 1] * z - alpha[i] * np.expm1(-h) * d
  np.testing.assert_allclose(got, z, rtol=1e-11, atol=1e-11)


def test_the_first_step_of_dpm_solver_is_ddim_s_and_the_second_is_not():
  with jax.enable_x64(True):
    z = jnp.linspace(-2.0, 2.0, 5)[:, None]
    logsnr = jnp.tile(jnp.array([-3.0, -1.0, 1.0])[:, None], (1, 5))
    (one, one_ddim), (two, two_ddim) = (
      [by_hand(cls(), None, MIXTURE, z, logsnr[:n]) for cls in (DPMSolver2M, DDIM)] for n in (2, 3)
    )
  np.testing.assert_allclose(one, one_ddim, rtol=1e-12, atol=1e-12)
  assert np.abs(two - two_ddim).max() > 0.01


def test_ddim_on_a_gaussian_multiplies_deviations_by_a_known_factor_a_step():
  """A step from angle p to q (tan = sigma / alpha) scales (z - alpha m) by cos(p - q) if s = 1."""
  data, n = Gaussian(mean=0.3, std=1.0), 4
  z = jnp.linspace(-2.0, 2.0, 9)[:, None, None, None]
  x = sample(DDIM(), data, SCHEDULE, jnp.array(times.uniform(n)), z, keys(9))
  alpha, sigma = scales(SCHEDULE(jnp.arange(n + 1) / n))
  factor = np.prod(np.cos(np.diff(np.arctan2(sigma, alpha))))
  np.testing.assert_allclose(x, 0.3 + factor * (z - alpha[-1] * 0.3), atol=1e-5)
