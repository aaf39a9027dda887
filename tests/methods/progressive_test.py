"""Progressive distillation: one step of the student is two of the teacher, or more."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.process import Prediction, from_eps, from_x
from diffusion_distillation.diffusion.samplers import DDIM, sample
from diffusion_distillation.diffusion.schedules import Cosine
from diffusion_distillation.diffusion.weightings import WEIGHTINGS, Constant, Snr, SnrTrunc
from diffusion_distillation.methods.progressive import Progressive
from diffusion_distillation.networks.denoiser import Bound
from tests.exact import Gaussian, Mixture
from tests.methods.methods_test import nets

SCHEDULE = Cosine()
GAUSSIAN = Gaussian(mean=0.3, std=0.5)
MIXTURE = Mixture(weights=(0.5, 0.2, 0.3), means=(-0.6, 0.1, 0.8), stds=(0.15, 0.1, 0.2))
KEY = jax.random.key(0)


def grid_index(num_steps, logsnr):
  """The i in 1..N with schedule(i / N) = logsnr (B,), by the inverse of logsnr(t) = -2 log tan(a t + b)."""
  b = np.arctan(np.exp(-10.0))
  a = np.arctan(np.exp(10.0)) - b
  return jnp.round(num_steps * (jnp.arctan(jnp.exp(-0.5 * logsnr)) - b) / a)


def teacher_and_student(data, method):
  """A denoiser whose `params` None are the exact teacher, and else the perfect student plus `params`."""

  def denoise(params, z, logsnr, cond, rng=None):
    if params is None:
      return data(z, logsnr)
    i = grid_index(method.num_steps, logsnr)
    return from_x(z, logsnr, method.target_x(Bound(denoise, None), z, i, cond) + params)

  return denoise


def batch(method, size=512):
  shape = (size, 1, 1, 1)
  return {'x': jax.random.uniform(KEY, shape, minval=-1.0), 'cond': None} | method.draw(KEY, shape)


@pytest.mark.parametrize('factor', [2, 3, 4])
@pytest.mark.parametrize('data', [GAUSSIAN, MIXTURE], ids=['gaussian', 'mixture'])
def test_a_perfect_student_lands_in_n_steps_where_its_teacher_does_in_factor_times_n(data, factor):
  z = jax.random.normal(KEY, (64, 1, 1, 1))

  @jax.jit
  def run(method, teacher_times, student_times):
    denoise = teacher_and_student(data, method)

    def drawn(params, grid):
      def bound(z, logsnr):
        return denoise(params, z, logsnr, None)

      return sample(DDIM(), bound, SCHEDULE, grid, z, jax.random.split(KEY, 64))

    return drawn(None, teacher_times), drawn(0.0, student_times), drawn(None, student_times)

  for n in (1, 2, 4):
    grids = [jnp.pad(jnp.array(times.uniform(m)), (4 * factor - m, 0)) for m in (factor * n, n)]
    teacher, student, teacher_in_n = run(Progressive(n, SCHEDULE, Constant(), factor), *grids)
    np.testing.assert_allclose(student, teacher, atol=1e-5)
    assert np.abs(teacher - teacher_in_n).max() > 0.01  # n steps of the teacher's own are not enough


def test_loss_and_gradient_are_zero_at_the_target_and_grow_away_from_it():
  @jax.jit
  @jax.jacfwd
  def slopes(shift):
    return losses(shift)

  @jax.jit
  def losses(shift):
    values = []
    for weighting in WEIGHTINGS.values():
      method = Progressive(4, SCHEDULE, weighting())
      denoise = teacher_and_student(GAUSSIAN, method)
      held = nets(method, {'student': shift}, student=denoise)
      values.append(method.loss(held, batch(method), None, 0)[0])
    return jnp.stack(values)

  assert (losses(0.1) > 1e-3).all()
  assert (slopes(0.1) > 1e-2).all()
  assert (losses(0.0) < 1e-6 * losses(0.1)).all()
  assert (jnp.abs(slopes(0.0)) < 1e-3 * slopes(0.1)).all()
  of_constant = list(WEIGHTINGS).index('constant')
  np.testing.assert_allclose(losses(0.1)[of_constant], 0.1**2, rtol=1e-4)


def shifted(params, z, logsnr, cond, rng=None):
  x, eps = GAUSSIAN(z, logsnr)
  return Prediction(x + params, eps - params)


def test_no_gradient_flows_into_the_teacher():
  method = Progressive(4, SCHEDULE, SnrTrunc())

  def loss(student, teacher):
    held = nets(method, {'student': student, 'teacher': teacher}, student=shifted)
    return method.loss(held, batch(method), None, 0)[0]

  by_student, by_teacher = jax.jit(jax.grad(loss, argnums=(0, 1)))(0.1, -0.2)
  assert by_teacher == 0.0
  assert abs(by_student) > 0.01


def test_rounds_share_one_trace():
  traces = []

  def plain(method):
    held = nets(method, {'student': 0.1, 'teacher': 0.0}, student=shifted)
    return method.loss(held, batch(method), None, 0)[0]

  @jax.jit
  def loss(method):
    traces.append(method)
    return plain(method)

  many, few = (loss(Progressive(n, SCHEDULE, SnrTrunc())) for n in (4, 1))
  assert len(traces) == 1
  alone = jax.jit(lambda: plain(Progressive(1, SCHEDULE, SnrTrunc())))()
  np.testing.assert_allclose(few, alone, rtol=1e-5)
  assert abs(many - few) > 1e-3 * few


def test_the_only_leaf_of_the_method_is_its_number_of_steps():
  assert jax.tree.leaves(Progressive(4, SCHEDULE, SnrTrunc())) == [4]


def recorded(method):
  """What the loss asks of student and teacher: (z, logsnr, cond, rng) of each call."""
  calls = {'student': [], 'teacher': []}

  def recording(name, z, logsnr, cond, rng=None):
    calls[name].append((z, logsnr, cond, rng))
    return GAUSSIAN(z, logsnr)

  data = batch(method) | {'cond': {'label': jnp.arange(512) % 7}}
  method.loss(nets(method, {name: name for name in calls}, student=recording), data, KEY, 0)
  return calls


@pytest.mark.parametrize('num_steps', [1, 3, 8])
@pytest.mark.parametrize('factor', [2, 3, 4])
def test_the_student_is_trained_at_i_nths_and_the_teacher_asked_in_equal_steps_from_there(
  factor, num_steps
):
  calls = recorded(Progressive(num_steps, SCHEDULE, SnrTrunc(), factor))
  ((z, logsnr, _, _),), asked = calls['student'], calls['teacher']
  i = grid_index(num_steps, logsnr)
  assert set(i.tolist()) == set(range(1, num_steps + 1))
  np.testing.assert_allclose(logsnr, SCHEDULE(i / num_steps), rtol=1e-5, atol=1e-5)
  np.testing.assert_array_equal(asked[0][0], z)
  np.testing.assert_array_equal(asked[0][1], logsnr)
  assert len(asked) == factor
  for k, (_, at, _, _) in enumerate(asked):
    np.testing.assert_allclose(at, SCHEDULE((i - k / factor) / num_steps), rtol=1e-5, atol=1e-5)


def test_the_teacher_goes_on_from_where_it_has_come_by_ddim_steps():
  asked = recorded(Progressive(4, SCHEDULE, SnrTrunc(), factor=3))['teacher']
  for (z, at, *_), (z_next, to, *_) in itertools.pairwise(asked):
    expected = DDIM()(None, GAUSSIAN, z, at, to)
    np.testing.assert_allclose(z_next, expected, atol=1e-5)


def test_steps_are_drawn_evenly():
  n, size = 4, 512
  counts = np.bincount(batch(Progressive(n, SCHEDULE, SnrTrunc()))['i'], minlength=n + 1)
  assert counts[0] == 0
  assert (np.abs(counts[1:] - size / n) < 4 * np.sqrt(size / n * (1 - 1 / n))).all()


def test_stratified_steps_have_their_exact_share():
  method = Progressive(4, SCHEDULE, SnrTrunc(), law=times.Uniform(stratified=True))
  np.testing.assert_array_equal(np.bincount(batch(method)['i']), [0, 128, 128, 128, 128])


def test_losses_are_those_of_each_example():
  """An error of k / 10 in x costs its square, under a constant weighting where the noise is strong."""
  method = Progressive(1, SCHEDULE, Constant())
  denoise = teacher_and_student(GAUSSIAN, method)
  shift = jnp.arange(4.0)[:, None, None, None] / 10
  held = nets(method, {'student': shift}, student=denoise)
  losses = method.losses(held, batch(method, 4))
  np.testing.assert_allclose(losses, (np.arange(4) / 10) ** 2, rtol=1e-4, atol=1e-6)


def test_the_student_may_have_dropout_and_the_teacher_never():
  calls = recorded(Progressive(4, SCHEDULE, SnrTrunc()))
  assert [rng for _, _, _, rng in calls['teacher']] == [None, None]
  assert [rng is None for _, _, _, rng in calls['student']] == [False]


def test_labels_reach_student_and_teacher():
  calls = recorded(Progressive(4, SCHEDULE, SnrTrunc()))
  for _, _, cond, _ in calls['student'] + calls['teacher']:
    np.testing.assert_array_equal(cond['label'], np.arange(512) % 7)


def test_an_error_in_eps_at_t_1_counts_once_under_snr_and_explodes_under_the_truncated_weighting():
  """By 1 / alpha^2 = e^20: why rounds of eps are trained under `snr`, and other students are refused."""
  z_like = jnp.zeros((4, 2, 2, 1))

  def teach(z, logsnr, cond, rng=None):
    return from_x(z, logsnr, jnp.full_like(z, 0.5))

  def off(z, logsnr, cond, rng=None):
    return from_eps(z, logsnr, teach(z, logsnr, cond).eps + 0.1)

  for weighting, expected in ((Snr(), 0.01), (SnrTrunc(), 0.01 * np.exp(20.0))):
    one = Progressive(1, SCHEDULE, weighting)
    batch = {'x': z_like, 'cond': None} | one.draw(jax.random.key(0), z_like.shape)
    losses = one.losses({'teacher': teach, 'student': off}, batch)
    np.testing.assert_allclose(losses, expected, rtol=5e-3)
