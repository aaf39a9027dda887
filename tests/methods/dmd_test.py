"""DMD where generator and scores are Gaussian: its gradient, where it leads, and what it draws."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict
from scipy import stats

from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.process import Prediction
from diffusion_distillation.diffusion.schedules import Cosine
from diffusion_distillation.diffusion.weightings import SnrTrunc
from diffusion_distillation.methods import DMD, DMD2, Gan
from diffusion_distillation.networks.denoiser import Bound
from diffusion_distillation.networks.spaces import Pixels
from diffusion_distillation.training import step as update
from diffusion_distillation.training.optimizers import Adam, LearningRate
from diffusion_distillation.training.recipe import Recipe
from tests.exact import Gaussian, quadrature, scales

SCHEDULE = Cosine()
KEY = jax.random.key(0)
GAN = Gan(width=8, generator_weight=1.0, fake_weight=1.0)
DATA = {'mean': jnp.array(0.3), 'std': jnp.array(0.5)}


def denoise(params, z, logsnr, cond, rng=None):
  """A linear generator x = scale z + shift, or the exact denoiser of Gaussian data."""
  if 'scale' in params:
    return Prediction(params['scale'] * z + params['shift'], z)
  return Gaussian(**params)(z, logsnr)


denoise.conditioning = {}


def generator(scale, shift):
  return {'scale': jnp.array(scale), 'shift': jnp.array(shift)}


def scores(fake, teacher=DATA):
  """Fake score and teacher, bound."""
  return {'fake_score': Bound(denoise, fake), 'teacher': Bound(denoise, teacher)}


def numbers(params):
  return {name: float(value) for name, value in params.items()}


def law(student):
  """That of its images, as the parameters of a denoiser."""
  return {'mean': student['shift'], 'std': jnp.abs(student['scale'])}


def method(**fields):
  return DMD(SCHEDULE, SnrTrunc(), **{'regression': 0.0} | fields)


def divergence(student, logsnr):
  """KL(fake || real) of one noised pixel."""
  alpha, sigma = scales(logsnr)
  (m, v), (m_real, v_real) = (
    (alpha * of['mean'], alpha**2 * of['std'] ** 2 + sigma**2) for of in (law(student), DATA)
  )
  return 0.5 * (jnp.log(v_real / v) + (v + (m - m_real) ** 2) / v_real - 1.0)


@jax.jit
def slopes(student, fake, t):
  """d losses / d parameter (n,) for each parameter; losses, sizes and images; at the nodes of quadrature."""
  z, eps, _ = quadrature()
  batch = {'t': jnp.full(len(z), t), 'eps': eps, 'z': z, 'cond': None}

  def losses(student):
    x = method().generate(Bound(denoise, student), batch, None)
    losses, sizes = method().matching_losses(scores(fake), x, batch)
    return losses, (losses, sizes, x)

  return jax.jacfwd(losses, has_aux=True)(student)


TIMES = [0.02, 0.3, 0.7, 0.98]
ELSEWHERE = [(0.8, -0.2), (0.2, 0.9), (-0.6, 0.25)]


@pytest.mark.parametrize('student', ELSEWHERE, ids=str)
@pytest.mark.parametrize('t', TIMES)
def test_the_gradient_is_that_of_the_divergence_up_to_the_weight_of_each_image(student, t):
  """Of two pixels' loss: (alpha / sigma)^2 mean|x - mu_real| is what it has been divided by (Eq. 8)."""
  with jax.enable_x64(True):
    student, logsnr = generator(*student), SCHEDULE(jnp.array(t, jnp.float64))
    by_parameter, (_, _, x) = slopes(student, law(student), t)
    z, eps, weights = quadrature()
    alpha, sigma = scales(logsnr)
    real = denoise(DATA, alpha * x + sigma * eps, jnp.full(len(z), logsnr), None).x
    scale = np.mean(np.abs(x - real), axis=(1, 2, 3))
    got = {
      name: np.sum(weights * scale * (alpha / sigma) ** 2 * slope)
      for name, slope in by_parameter.items()
    }
    exact = jax.grad(divergence)(student, logsnr)
    assert got == pytest.approx(numbers(exact), rel=1e-6)


@pytest.mark.parametrize('student', ELSEWHERE, ids=str)
def test_the_gradient_is_zero_where_the_fake_score_is_the_real_one_whatever_the_images(student):
  by_parameter, (losses, sizes, _) = slopes(generator(*student), DATA, 0.5)
  for values in (*by_parameter.values(), losses, sizes):
    np.testing.assert_array_equal(values, 0.0)


@pytest.mark.parametrize('t', TIMES)
@pytest.mark.parametrize(
  ('off', 'name', 'sign'),
  [
    ({'shift': 0.5}, 'shift', 1),
    ({'shift': 0.1}, 'shift', -1),
    ({'scale': 0.6}, 'scale', 1),
    ({'scale': 0.4}, 'scale', -1),
    ({'scale': -0.6}, 'scale', -1),
    ({'scale': -0.4}, 'scale', 1),
  ],
)
def test_the_gradient_points_the_right_way_weights_and_all(off, name, sign, t):
  """A generator of the right law but for one parameter: to the right law along it."""
  student = jax.tree.map(jnp.array, {'scale': 0.5, 'shift': 0.3} | off)
  by_parameter, _ = slopes(student, law(student), t)
  weights = quadrature()[2]
  assert sign * np.sum(weights * by_parameter[name]) > 0
  if name == 'shift':  # for every image
    assert (sign * by_parameter[name] > 0).all()


def test_the_loss_is_half_the_mean_square_of_the_gradient_and_the_size_its_root():
  student = generator(0.8, -0.2)
  _, (losses, sizes, _) = slopes(student, law(student), 0.5)
  np.testing.assert_allclose(losses, 0.5 * np.square(sizes), rtol=1e-5)
  assert (sizes > 0.01).all()


def test_images_that_the_teacher_believes_in_already_have_a_finite_gradient():
  """x = mu_real in every pixel: the weight has an end."""
  point = {'mean': jnp.array(0.3), 'std': jnp.array(0.0)}
  x, eps = jnp.full((4, 2, 2, 1), 0.3), jax.random.normal(KEY, (4, 2, 2, 1))
  batch = {'t': jnp.full(4, 0.5), 'eps': eps, 'cond': None}
  losses, _ = method().matching_losses(scores(DATA, point), x, batch)
  assert np.isfinite(losses).all()


@functools.cache
def training(dmd, num_periods, pairs=None):
  """A function: from a generator to it and its fake score after training by `train_step`."""
  shape, rate = (64, 2, 2, 1), LearningRate(0.02, num_periods * dmd.period, decay='linear')
  recipe = Recipe(
    networks=FrozenDict(dmd.networks(denoise, denoise)),
    method=dmd,
    optimizer=Adam(b1=0.0, b2=0.9, clip_norm=1e3),
    learning_rate=dict.fromkeys(('student', 'fake_score'), rate),
    ema_decay=(0.0,),
    seed=0,
    space=Pixels(),
    shape=shape,
  )
  frozen = {'teacher': DATA, 'distance': None}

  def period(k, state):
    batch = {'cond': None}
    if pairs is not None:
      batch['pairs'] = pairs(jax.random.fold_in(KEY, k), shape)

    def step(k, state):
      return update.train_step(recipe.at(k), state, frozen, batch)[0]

    state = jax.lax.fori_loop(0, dmd.period - 1, lambda _, state: step(0, state), state)
    return step(dmd.period - 1, state)

  run = jax.jit(lambda state: jax.lax.fori_loop(0, num_periods, period, state).params)

  def train(student):
    params = run(recipe.create_state(student, DATA))
    return numbers(params['student']), numbers(params['fake_score'])

  return train


@pytest.mark.parametrize('student', [(1.0, -0.5), (-0.2, 0.8)], ids=str)
def test_a_linear_generator_converges_to_the_law_of_the_data_by_its_scores_alone(student):
  """The fake score is trained meanwhile, five times as often; the scale keeps its sign. No image is given."""
  found, fake_score = training(method(fake_updates=5), 300)(generator(*student))
  assert found == pytest.approx({'scale': np.copysign(0.5, student[0]), 'shift': 0.3}, abs=0.01)
  assert fake_score == pytest.approx({'std': 0.5, 'mean': 0.3}, abs=0.02)


def exact_pairs(key, shape):
  """Noise and where the probability flow of the data takes it."""
  noise = jax.random.normal(key, shape)
  image = Gaussian(**DATA).consistency(noise, SCHEDULE(jnp.ones(len(noise))))
  return {'noise': noise, 'image': image, 'cond': None}


@pytest.mark.parametrize('student', [(1.0, -0.5), (-0.05, 0.8)], ids=str)
def test_with_pairs_it_converges_to_the_teachers_own_map(student):
  """Which noise belongs to which image is known: the scale is positive now."""
  found, fake_score = training(method(regression=1.0), 600, exact_pairs)(generator(*student))
  assert found == pytest.approx({'scale': 0.5, 'shift': 0.3}, abs=0.01)
  assert fake_score == pytest.approx({'std': 0.5, 'mean': 0.3}, abs=0.02)


def asked(dmd, params, size=4000):
  """What the generator is asked of: inputs and logsnr (size,), with the batch that was drawn."""
  shape = (size, 1, 1, 1)
  batch = {'x': jnp.full(shape, 0.7), 'cond': None} | dmd.draw(KEY, shape)
  calls = []

  def recording(params, z, logsnr, cond, rng=None):
    calls.append((z[:, 0, 0, 0], logsnr))
    return denoise(params, z, logsnr, cond)

  dmd.generate(Bound(recording, params), batch, None)
  return *calls[-1], batch


def test_inputs_of_several_steps_have_the_law_of_what_the_earlier_ones_leave():
  """x^ = scale z + shift, noised again: a linear chain, from N(0, 1) down."""
  count, student = 4, generator(0.25, 0.2)
  inputs, logsnr, batch = asked(method(num_steps=count), student)
  mean, variance = 0.0, 1.0
  for step in range(count, 0, -1):
    t = step / count
    chosen = np.array(batch['step'] == step)
    assert stats.kstest(inputs[chosen], 'norm', (mean, np.sqrt(variance))).pvalue > 0.01
    np.testing.assert_allclose(logsnr[chosen], SCHEDULE(jnp.array(t)), rtol=1e-5, atol=1e-5)
    alpha, sigma = scales(SCHEDULE(jnp.array(t - 1 / count)))
    mean = alpha * (0.25 * mean + 0.2)
    variance = alpha**2 * 0.25**2 * variance + sigma**2


def test_inputs_of_several_steps_are_those_of_data_where_the_generator_knows_them_exactly():
  """A single image: whatever it is asked, it says that one; and so does noised data."""
  point = {'mean': jnp.array(0.7), 'std': jnp.array(0.0)}
  for simulated in (True, False):
    inputs, logsnr, batch = asked(method(num_steps=3, simulated=simulated), point)
    alpha, sigma = scales(logsnr)
    noise = (inputs - np.where(batch['step'] == 3, 0.0, 0.7 * alpha)) / np.where(
      batch['step'] == 3, 1.0, sigma
    )
    for step in (1, 2, 3):
      assert stats.kstest(noise[batch['step'] == step], 'norm').pvalue > 0.01
    np.testing.assert_array_equal(inputs[batch['step'] == 3], batch['z'][batch['step'] == 3, 0, 0, 0])


def test_no_gradient_reaches_the_earlier_steps():
  """d x / d scale is the input itself, for every image, though the input came of the same scale."""
  dmd, student = method(num_steps=4), generator(0.25, 0.2)
  inputs, _, batch = asked(dmd, student, 64)
  slope = jax.jacfwd(lambda student: dmd.generate(Bound(denoise, student), batch, None))(student)
  np.testing.assert_allclose(slope['scale'][:, 0, 0, 0], inputs, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(slope['shift'], 1.0)


def test_x_is_clipped_between_the_steps_and_never_at_the_end():
  """A generator that says 5 whatever it is asked: what it is asked next is made of 1, and what it draws is 5."""
  dmd, student = method(num_steps=2, clip=Pixels().clip), generator(0.0, 5.0)
  inputs, logsnr, batch = asked(dmd, student)
  alpha, sigma = scales(logsnr)
  assert stats.kstest(((inputs - alpha) / sigma)[batch['step'] == 1], 'norm').pvalue > 0.01
  np.testing.assert_array_equal(dmd.generate(Bound(denoise, student), batch, None), 5.0)


@pytest.mark.parametrize(
  ('fields', 'needs'),
  [
    ({}, {'labels'}),
    ({'regression': 0.25}, {'labels', 'pairs'}),
    ({'gan': GAN}, {'labels', 'images'}),
    ({'num_steps': 4}, {'labels'}),
    ({'num_steps': 4, 'simulated': False}, {'labels', 'images'}),
  ],
)
def test_images_are_needed_by_a_gan_and_by_inputs_of_data_and_pairs_by_the_regression(fields, needs):
  """One step by scores alone needs no images; see also where it converges, without any."""
  assert method(**fields).needs == needs
  assert DMD2(SCHEDULE, SnrTrunc(), **{'regression': 0.0} | fields).needs == needs


def test_one_step_begins_with_noise_at_the_end_of_time():
  inputs, logsnr, batch = asked(method(), generator(0.5, 0.3), 64)
  np.testing.assert_array_equal(inputs, batch['z'][:, 0, 0, 0])
  np.testing.assert_array_equal(logsnr, np.full(64, SCHEDULE(jnp.array(1.0))))


def test_times_and_noise_that_are_drawn():
  size = 4000
  dmd = method(first_t=0.1, last_t=0.6, num_steps=4, gan=GAN.replace(first_t=0.3, last_t=0.9))
  drawn = dmd.draw(KEY, (size, 1, 1, 1))
  for name, first, width in (('t', 0.1, 0.5), ('gan_t', 0.3, 0.6)):
    assert stats.kstest(drawn[name], 'uniform', (first, width)).pvalue > 0.01
  assert stats.kstest(drawn['fake_t'], 'uniform').pvalue > 0.01
  noises = np.array([drawn[name].ravel() for name in ('z', 'eps', 'fake_eps', 'gan_eps')])
  for noise in noises:
    assert stats.kstest(noise, 'norm').pvalue > 0.01
  columns = np.concatenate([noises, [drawn[name] for name in ('t', 'fake_t', 'gan_t', 'step')]])
  assert np.abs(np.corrcoef(columns) - np.eye(len(columns))).max() < 4.5 / np.sqrt(size)
  counts = np.bincount(drawn['step'], minlength=5)
  assert counts[0] == 0 and np.abs(counts[1:] - size / 4).max() < 4 * np.sqrt(size * 3 / 16)
  assert len(np.unique(jax.random.key_data(drawn['keys']), axis=0)) == size


def test_the_fake_score_is_trained_at_times_of_the_law_given():
  law = times.Uniform(stratified=True)
  drawn = method(law=law).draw(KEY, (64, 1, 1, 1))
  np.testing.assert_array_equal(np.sort(np.ceil(64 * drawn['fake_t'] - 1e-4)), np.arange(64) + 1)


def test_the_generator_has_its_turn_at_the_end_of_each_period():
  dmd = method(fake_updates=3)
  assert dmd.period == 3
  turns = [dmd.at(step).trained for step in range(6)]
  assert turns == 2 * [('fake_score',), ('fake_score',), ('student', 'fake_score')]
  assert [method().at(step) for step in range(3)] == 3 * [method()]
  assert dataclasses.replace(dmd.at(0), generator_turn=True) == dmd.at(2) == dmd


@pytest.mark.parametrize(
  ('fields', 'message'),
  [
    ({'first_t': 0.0}, 'first_t=0.0'),
    ({'first_t': 0.5, 'last_t': 0.5}, 'last_t=0.5'),
    ({'last_t': 1.1}, 'last_t=1.1'),
    ({'num_steps': 2, 'regression': 0.25}, 'regression must be 0'),
  ],
)
def test_what_it_cannot_do_is_refused(fields, message):
  with pytest.raises(ValueError, match=message):
    method(**fields)
