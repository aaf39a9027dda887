"""Consistency distillation against the exact consistency function of Gaussian data, and its sampler."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.process import Prediction
from diffusion_distillation.diffusion.samplers import DDIM, Euler, Heun, MultistepConsistency, sample
from diffusion_distillation.diffusion.schedules import Cosine
from diffusion_distillation.diffusion.weightings import Snr
from diffusion_distillation.methods import Consistency, distances
from diffusion_distillation.networks.denoiser import Bound
from tests.exact import Gaussian, scales
from tests.methods.methods_test import nets

SCHEDULE = Cosine()
GAUSSIAN = Gaussian(mean=0.3, std=0.5)
KEY = jax.random.key(0)
SIZE = 16


def denoise(params, z, logsnr, cond, rng=None):
  """The exact denoiser, where `params` is None; else the exact consistency function plus `params`."""
  if params is None:
    return GAUSSIAN(z, logsnr)
  return Prediction(GAUSSIAN.consistency(z, logsnr) + params, z)


def method(intervals, **fields):
  return Consistency(100, intervals, intervals, SCHEDULE, **fields)


def batch(t, dtype=jnp.float32):
  """The same few images and noises at each of the times `t`."""
  x, eps = jnp.linspace(-1.0, 1.0, SIZE, dtype=dtype), jnp.cos(jnp.arange(SIZE, dtype=dtype))
  x, eps = (jnp.tile(a, len(t))[:, None, None, None] for a in (x, eps))
  return {'x': x, 'eps': eps, 't': jnp.repeat(jnp.array(t, dtype), SIZE), 'cond': None}


def bound(at, student, average=0.0, denoise=denoise):
  """The networks of the loss: student and average with these parameters, and the exact teacher."""
  return nets(at, {'student': student, 'average': average, 'teacher': None}, student=denoise)


@pytest.mark.parametrize(
  ('solver', 'order'),
  [(DDIM, 1), (Euler, 1), (Heun, 2)],
  ids=lambda p: getattr(p, '__name__', p),
)
def test_the_exact_consistency_function_is_a_fixed_point_up_to_the_solvers_error(solver, order):
  """Of one step of 1 / N, from the same times: the root of the loss goes as N^-(order + 1)."""
  nums = np.array([16, 32, 64])
  with jax.enable_x64(True):
    data = batch([0.25, 0.5, 0.75], jnp.float64)

    @jax.jit
    def losses(intervals):
      dynamic = Consistency(100, intervals, intervals, SCHEDULE, solver=solver())
      return dynamic.losses(bound(dynamic, 0.0), data, None, 0)

    errors = [np.sqrt(np.mean(losses(n))) for n in nums]
  assert np.polyfit(np.log(nums), np.log(errors), 1)[0] == pytest.approx(-(order + 1), abs=0.1)


def test_an_error_of_the_student_costs_its_square_and_one_that_its_target_shares_nothing():
  """Away from t = 0, where the target is the teacher's: a constant is consistent with itself."""
  data, at = batch([0.5, 1.0]), method(200, solver=Heun())
  apart, shared = (at.losses(bound(at, 0.1, average), data, None, 0) for average in (0.0, 0.1))
  np.testing.assert_allclose(apart, 0.1**2, rtol=1e-3)
  np.testing.assert_allclose(shared, 0.0, atol=1e-8)


def test_in_the_first_interval_the_target_is_the_teachers_image_and_the_network_is_not_asked_there():
  """However wrong the average is, and with no infinite logsnr."""

  def finite(params, z, logsnr, cond, rng=None):
    unknown = jnp.where(jnp.isfinite(logsnr), 0.0, jnp.nan)[:, None, None, None]
    return Prediction(*(part + unknown for part in denoise(params, z, logsnr, cond)))

  for at, t in ((method(8, solver=Heun()), [0.01, 0.125]), (method(1), [0.2, 1.0])):
    data, logsnr = batch(t), SCHEDULE(jnp.full(len(t) * SIZE, 1.0 / at.end_intervals))
    with jax.disable_jit():
      assert all(np.isfinite(asked).all() for _, _, asked, _ in recorded(at, data)[0])

    @jax.jit
    def losses(student, at=at, data=data):
      return at.losses(bound(at, student, 1e6, finite), data, None, 0)

    alpha, sigma = scales(logsnr[0])
    z = np.float32(alpha * data['x'] + sigma * data['eps'])
    image = at.solver(None, GAUSSIAN, z, logsnr, jnp.full_like(logsnr, jnp.inf))
    expected = np.square(GAUSSIAN.consistency(z, logsnr) + 0.1 - image)[:, 0, 0, 0]
    np.testing.assert_allclose(losses(0.1), expected, rtol=1e-3, atol=1e-6)
    slopes = jax.jacfwd(losses)(0.1)
    assert np.isfinite(slopes).all() and np.abs(slopes).max() > 0.01


def recorded(at, data, rng=None):
  """(network, z, logsnr, rng) of every call that the loss makes, and the loss of each example."""
  calls = []

  def recording(name, z, logsnr, cond, rng=None):
    calls.append((name, z, logsnr, rng))
    return GAUSSIAN(z, logsnr)

  named = {name: Bound(recording, name) for name in ('student', 'average', 'teacher')}
  return calls, at.losses(bound(at, None) | named, data, rng, 0)


@pytest.mark.parametrize('follower', ['average', 'student'])
def test_who_is_asked_what(follower):
  """Teacher and student at the end of the interval, whom it follows at its beginning; no x is clipped."""
  data = batch([0.26, 0.5, 0.51, 1.0])
  data['x'] *= 10.0
  at = method(4, follows_average=follower == 'average')
  calls, losses = recorded(at, data, KEY)
  ends, begins = (np.repeat(np.array(i) / 4, SIZE) for i in ([2, 2, 3, 4], [1, 1, 2, 3]))
  assert [name for name, *_ in calls] == ['teacher', follower, 'student']
  for (_, _, logsnr, _), t in zip(calls, (ends, begins, ends), strict=True):
    np.testing.assert_allclose(logsnr, SCHEDULE(jnp.array(t)), rtol=1e-5, atol=1e-5)
  assert [rng is not None for *_, rng in calls] == [False, False, True]
  teacher, follows, student = (GAUSSIAN(z, logsnr) for _, z, logsnr, _ in calls)
  assert np.abs(teacher.x).max() > 1.5
  alpha, sigma = (a[:, None, None, None] for a in scales(calls[1][2]))
  np.testing.assert_allclose(calls[1][1], alpha * teacher.x + sigma * teacher.eps, atol=1e-5)
  expected = np.square(student.x - follows.x)[:, 0, 0, 0]
  np.testing.assert_allclose(losses, expected, rtol=1e-4, atol=1e-7)


def test_the_weight_is_that_of_the_end_of_the_interval_and_the_distance_is_the_one_given():
  data = batch([0.3, 0.9])
  methods = (
    method(4),
    method(4, weighting=Snr()),
    method(4, distance=distances.PseudoHuber(0.2)),
  )
  plain, weighted, huber = (at.losses(bound(at, 0.1), data, None, 0) for at in methods)
  snr = np.exp(SCHEDULE(jnp.repeat(jnp.array([0.5, 1.0]), SIZE)))
  np.testing.assert_allclose(weighted, snr * plain, rtol=1e-5)
  np.testing.assert_allclose(huber, np.sqrt(plain + 0.2**2) - 0.2, rtol=1e-3)


@pytest.mark.parametrize(('start', 'end'), [(2, 150), (10, 1280), (1, 2), (18, 18), (1, 1)])
def test_the_number_of_intervals_over_a_stage(start, end):
  """ceil(sqrt(k/K ((s_1 + 1)^2 - s_0^2) + s_0^2) - 1) + 1, by integers, and s_1 at most."""
  total = 500
  at = Consistency(total, start, end, SCHEDULE)
  got = np.array(jax.vmap(at.num_intervals)(jnp.arange(total + 1)))
  squares = [k * ((end + 1) ** 2 - start**2) + total * start**2 for k in range(total + 1)]
  exact = [min(end, math.isqrt(-(-square // total) - 1) + 1) for square in squares]
  np.testing.assert_array_equal(got, exact)
  assert got[0] == start and got[-1] == end and (np.diff(got) >= 0).all()
  loss, metrics = at.loss(bound(at, 0.1), batch([0.5]), None, jnp.array(total // 2))
  assert metrics == {'intervals': got[total // 2]} and np.isfinite(loss)


def test_numbers_are_leaves_so_that_stages_share_a_program():
  assert jax.tree.leaves(Consistency(100, 2, 150, SCHEDULE)) == [100, 2, 150]


def drawn(function, num_steps, size=4000):
  """Samples by multistep consistency sampling, and the state at each time on the way."""
  keys = jax.vmap(lambda k: jax.random.fold_in(KEY, k))(jnp.arange(size))
  seen = []

  def recording(z, logsnr):
    seen.append((float(logsnr[0]), np.ravel(z)))
    return function(z, logsnr)

  z = jax.random.normal(jax.random.key(1), (size, 1, 1, 1))
  with jax.disable_jit():
    x = sample(
      MultistepConsistency(),
      recording,
      SCHEDULE,
      jnp.array(times.uniform(num_steps)),
      z,
      keys,
    )
  assert len(seen) == num_steps
  return np.ravel(x), seen


def test_samples_of_a_single_image_pass_through_its_noised_law():
  x, seen = drawn(Gaussian(mean=0.6, std=0.0), 4)
  np.testing.assert_allclose(x, 0.6, rtol=1e-5)
  noises = [
    (z - alpha * 0.6) / sigma for (logsnr, z), (alpha, sigma) in ((s, scales(s[0])) for s in seen)
  ]
  for noise in noises:
    assert stats.kstest(noise, 'norm').pvalue > 0.01
  apart = np.corrcoef(noises) - np.eye(4)
  assert np.abs(apart).max() < 4 / np.sqrt(len(x))  # new noise at every step


@pytest.mark.parametrize('num_steps', [1, 2, 4])
def test_samples_of_the_exact_consistency_function_have_the_law_of_the_data(num_steps):
  """At the end and, noised, on the way."""

  def exact(z, logsnr):
    return Prediction(GAUSSIAN.consistency(z, logsnr), z)

  x, seen = drawn(exact, num_steps)
  assert stats.kstest(x, 'norm', (0.3, 0.5)).pvalue > 0.01
  for logsnr, z in seen:
    law = (scales(logsnr)[0] * 0.3, np.sqrt(GAUSSIAN.variance(logsnr)))
    assert stats.kstest(z, 'norm', law).pvalue > 0.01
