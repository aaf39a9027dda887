"""Weightings: the identities that relate errors in x, eps, v and EDM's F."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.diffusion.process import OUTPUTS, Prediction, output_channels
from diffusion_distillation.diffusion.weightings import WEIGHTINGS, weighted_mse
from tests.diffusion.process_test import edm, edm_output
from tests.exact import scales

LOGSNR = np.linspace(-20.0, 20.0, 41)


def mean_square(a, b):
  return np.mean(np.square(a - b), axis=(1, 2, 3))


def errors():
  """Two explanations of the same z, in float64; they differ by O(1) in whichever of x, eps is the vaguer.

  The strong signal leaves eps unsure and pins x down, so that x - x^ = -(sigma / alpha) (eps - eps^).
  """
  rng = np.random.default_rng(0)
  x, eps, wrong = rng.normal(size=(3, len(LOGSNR), 4, 4, 3))
  alpha, sigma = (s[:, None, None, None] for s in scales(LOGSNR))
  strong = (LOGSNR > 0)[:, None, None, None]
  x_error = np.where(strong, -(sigma / alpha) * wrong, wrong)
  eps_error = np.where(strong, wrong, -(alpha / sigma) * wrong)
  return Prediction(x, eps), Prediction(x + x_error, eps + eps_error), alpha, sigma


def definition(name, target, prediction, alpha, sigma):
  """The loss each weighting stands for, as an error in x, eps, v or F."""
  x_mse = mean_square(target.x, prediction.x)
  eps_mse = mean_square(target.eps, prediction.eps)
  v_mse = mean_square(
    alpha * target.eps - sigma * target.x, alpha * prediction.eps - sigma * prediction.x
  )
  z, logsnr = alpha * target.x + sigma * target.eps, 2 * np.log(alpha / sigma).ravel()
  f_mse = mean_square(edm_output(target.x, z, logsnr), edm_output(prediction.x, z, logsnr))
  return {
    'constant': x_mse,
    'snr': eps_mse,
    'snr_trunc': np.maximum(x_mse, eps_mse),
    'snr_plus_one': v_mse,
    'edm': f_mse,
  }[name]


@pytest.mark.parametrize('name', WEIGHTINGS)
def test_weight_times_x_mse_is_the_error_it_is_named_after(name):
  target, prediction, alpha, sigma = errors()
  with jax.enable_x64(True):
    weight = np.asarray(WEIGHTINGS[name]()(jnp.array(LOGSNR)))
  np.testing.assert_allclose(
    weight * mean_square(target.x, prediction.x),
    definition(name, target, prediction, alpha, sigma),
    rtol=1e-9,  # x + x_error has lost 5 of float64's 16 digits where x_error is e^-10
  )


@pytest.mark.parametrize('name', WEIGHTINGS)
def test_weighted_mse_in_float32_is_its_definition_in_float64(name):
  target, prediction, alpha, sigma = errors()
  as_float32 = [Prediction(*(jnp.float32(a) for a in p)) for p in (target, prediction)]
  loss = weighted_mse(WEIGHTINGS[name](), jnp.float32(LOGSNR), *as_float32)
  assert loss.shape == LOGSNR.shape
  assert loss.dtype == jnp.float32
  expected = definition(name, target, prediction, alpha, sigma)
  np.testing.assert_allclose(np.float64(loss), expected, rtol=1e-4)


@pytest.mark.parametrize('name', WEIGHTINGS)
def test_each_example_has_its_own_weight_even_where_batch_and_channels_agree(name):
  logsnr = jnp.array([-3.0, 0.5, 2.0])
  keys = jax.random.split(jax.random.key(0), 4)
  x, eps, x_hat, eps_hat = (jax.random.normal(key, (3, 4, 4, 3)) for key in keys)
  together = weighted_mse(WEIGHTINGS[name](), logsnr, Prediction(x, eps), Prediction(x_hat, eps_hat))
  alone = [
    weighted_mse(
      WEIGHTINGS[name](),
      logsnr[k : k + 1],
      Prediction(x[k : k + 1], eps[k : k + 1]),
      Prediction(x_hat[k : k + 1], eps_hat[k : k + 1]),
    )[0]
    for k in range(3)
  ]
  np.testing.assert_allclose(together, alone, rtol=1e-6)


MODERATE = np.array([-4.0, -1.0, 0.5, 3.0])


def truth():
  """x, eps, z of the same shape, alpha and sigma to multiply them, and every true output, in float64."""
  x, eps = np.random.default_rng(0).normal(size=(2, len(MODERATE), 2, 2, 2))
  alpha, sigma = (s[:, None, None, None] for s in scales(MODERATE))
  v, both, z = alpha * eps - sigma * x, np.concatenate([x, eps], -1), alpha * x + sigma * eps
  outputs = {'x': x, 'eps': eps, 'v': v, 'both': both, 'edm': edm_output(x, z, MODERATE)}
  return x, eps, z, alpha, sigma, outputs


@pytest.mark.parametrize('name', WEIGHTINGS)
@pytest.mark.parametrize('output', OUTPUTS)
def test_the_loss_of_any_output_is_its_definition(output, name):
  """What the output says of x, and of eps by z = alpha x + sigma eps, in float64."""
  x, eps, z, alpha, sigma, _ = truth()
  shape = (*x.shape[:-1], output_channels(output, 2))
  y = np.random.default_rng(1).normal(size=shape)
  first, second = y[..., :2], y[..., -2:]  # of 'both'
  c_skip, c_out, _ = edm(MODERATE)
  x_hat = {
    'x': first,
    'eps': (z - sigma * first) / alpha,
    'v': alpha * z - sigma * first,
    'both': sigma**2 * first + alpha * (z - sigma * second),
    'edm': c_skip * z / alpha + c_out * first,
  }[output]
  prediction = Prediction(x_hat, (z - alpha * x_hat) / sigma)
  as_float32 = OUTPUTS[output](*(jnp.float32(a) for a in (z, MODERATE, y)))
  target = Prediction(jnp.float32(x), jnp.float32(eps))
  loss = weighted_mse(WEIGHTINGS[name](), jnp.float32(MODERATE), target, as_float32)
  expected = definition(name, Prediction(x, eps), prediction, alpha, sigma)
  np.testing.assert_allclose(np.float64(loss), expected, rtol=1e-4)


@pytest.mark.parametrize('name', WEIGHTINGS)
@pytest.mark.parametrize('output', OUTPUTS)
def test_gradient_at_the_true_output_is_zero_and_a_step_away_in_any_channel_points_back(output, name):
  x, eps, z, _, _, outputs = truth()

  @jax.jit
  @jax.grad
  def gradient(y):
    prediction = OUTPUTS[output](jnp.array(z), jnp.array(MODERATE), y)
    return weighted_mse(WEIGHTINGS[name](), jnp.array(MODERATE), Prediction(x, eps), prediction).sum()

  with jax.enable_x64(True):
    optimum = np.array(gradient(jnp.array(outputs[output])))
    for channel in range(optimum.shape[-1]):
      step = np.eye(optimum.shape[-1])[channel][None, None, None]
      away = np.array(gradient(jnp.array(outputs[output] + step)))[..., channel]
      assert (away > 1e-5).all()
      assert (np.abs(optimum[..., channel]) <= 1e-12 * away).all()
