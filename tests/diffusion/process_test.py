"""The algebra of z = alpha x + sigma eps: identities, to rounding error."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.diffusion import process
from diffusion_distillation.diffusion.samplers import DDIM
from tests.exact import scales

LOGSNR = np.array([-18.0, -4.0, -0.3, 0.0, 2.0, 6.0, 19.0], np.float32)
MODERATE = np.array([-5.0, -1.0, -0.3, 0.0, 1.0, 2.5, 5.0], np.float32)


def images(seed, shape=(7, 4, 4, 2)):
  return jax.random.normal(jax.random.key(seed), shape)


def output_like(output, seed):
  """What a network with that output might say of `images`."""
  return images(seed, (7, 4, 4, process.output_channels(output, 2)))


def per_example(function, *arguments):
  """What `function` says of each example on its own, put together again."""
  rows = [function(*(a[k : k + 1] for a in arguments)) for k in range(len(arguments[0]))]
  return jax.tree.map(lambda *parts: jnp.concatenate(parts), *rows)


def edm(logsnr):
  """c_skip, c_out and c_in of Karras et al. 2022, Table 1, at s = sigma / alpha, in float64; to multiply images."""
  alpha, sigma = (scale[:, None, None, None] for scale in scales(logsnr))
  s, data = sigma / alpha, 0.5
  total = s**2 + data**2
  return data**2 / total, s * data / np.sqrt(total), 1 / np.sqrt(total)


def edm_output(x, z, logsnr):
  """The F of x, given z; in float64."""
  c_skip, c_out, _ = edm(logsnr)
  alpha = scales(logsnr)[0][:, None, None, None]
  return (np.float64(x) - c_skip * np.float64(z) / alpha) / c_out


def test_scales_are_those_of_the_definition():
  """alpha^2 / sigma^2 = exp(logsnr) and alpha^2 + sigma^2 = 1, for every image on its own."""
  alpha, sigma = process.alpha_sigma(jnp.array(LOGSNR), images(0))
  assert alpha.shape == sigma.shape == (7, 1, 1, 1)
  alpha, sigma = np.float64(alpha).ravel(), np.float64(sigma).ravel()
  np.testing.assert_allclose(alpha**2 + sigma**2, 1.0, rtol=1e-6)
  np.testing.assert_allclose(2 * (np.log(alpha) - np.log(sigma)), LOGSNR, rtol=1e-6, atol=1e-6)


def test_infinite_logsnr_is_clean():
  alpha, sigma = process.alpha_sigma(jnp.array([jnp.inf]), images(0)[:1])
  assert (float(alpha.squeeze()), float(sigma.squeeze())) == (1.0, 0.0)
  x, eps = images(1)[:1], images(2)[:1]
  np.testing.assert_array_equal(process.diffuse(x, eps, jnp.array([jnp.inf])), x)


def test_diffused_noise_has_the_variance_of_the_schedule():
  eps = images(0)
  z = process.diffuse(jnp.zeros_like(eps), eps, jnp.array(LOGSNR))
  np.testing.assert_allclose(
    jnp.mean(z**2, (1, 2, 3)) / jnp.mean(eps**2, (1, 2, 3)), 1 / (1 + np.exp(LOGSNR)), rtol=1e-5
  )


@pytest.mark.parametrize('output', process.OUTPUTS)
def test_the_true_output_gives_back_x_and_eps(output):
  """Rounding of z is magnified by at most alpha / sigma or sigma / alpha: e^2.5 here."""
  x, eps, logsnr = images(1), images(2), jnp.array(MODERATE)
  truth = process.Prediction(x, eps)
  both = jnp.concatenate([x, eps], -1)
  z = process.diffuse(x, eps, logsnr)
  outputs = {'x': x, 'eps': eps, 'v': process.velocity(truth, logsnr), 'both': both}
  outputs['edm'] = jnp.float32(edm_output(x, z, MODERATE))
  prediction = process.OUTPUTS[output](z, logsnr, outputs[output])
  np.testing.assert_allclose(prediction.x, x, atol=1e-5)
  np.testing.assert_allclose(prediction.eps, eps, atol=1e-5)


@pytest.mark.parametrize('output', process.OUTPUTS)
def test_every_parameterization_is_read_back_from_the_others(output):
  """Any output, true or not, gives an (x, eps) from which each output gives the same (x, eps)."""
  z, wrong, logsnr = images(1), output_like(output, 2), jnp.array(MODERATE)
  x, eps = prediction = process.OUTPUTS[output](z, logsnr, wrong)
  v = process.velocity(prediction, logsnr)
  for other in (
    process.from_x(z, logsnr, x),
    process.from_eps(z, logsnr, eps),
    process.from_v(z, logsnr, v),
    process.from_both(z, logsnr, jnp.concatenate([x, eps], -1)),
    process.from_edm(z, logsnr, jnp.float32(edm_output(x, z, MODERATE))),
  ):
    scale = float(jnp.max(jnp.abs(jnp.stack(prediction))))
    np.testing.assert_allclose(other.x, x, atol=1e-5 * scale)
    np.testing.assert_allclose(other.eps, eps, atol=1e-5 * scale)


def test_every_output_explains_z():
  z, logsnr = images(1), jnp.array(MODERATE)
  for output, read in process.OUTPUTS.items():
    x, eps = read(z, logsnr, output_like(output, 2))
    np.testing.assert_allclose(process.diffuse(x, eps, logsnr), z, atol=1e-5)


def test_both_is_sure_of_eps_where_there_is_noise_and_of_x_where_there_is_not():
  """x^ = sigma^2 x~ + alpha (z - sigma eps~) and eps^ = (z - alpha x^) / sigma, in float64."""
  z, x, eps = np.random.default_rng(0).normal(size=(3, 7, 4, 4, 2))
  alpha, sigma = (s[:, None, None, None] for s in scales(LOGSNR))
  expected = sigma**2 * x + alpha * (z - sigma * eps)
  with jax.enable_x64(True):
    output = jnp.concatenate([jnp.array(x), jnp.array(eps)], -1)
    got_x, got_eps = map(np.array, process.from_both(jnp.array(z), jnp.float64(LOGSNR), output))
  np.testing.assert_allclose(got_x, expected, rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(sigma * got_eps, z - alpha * expected, rtol=1e-9, atol=1e-9)


def test_both_is_the_eps_output_without_noise_and_the_x_output_without_signal():
  """Of (x~, eps~), x^ is read where the other says nothing."""
  z, x, eps = images(1), images(2), images(3)
  output, signal, noise = jnp.concatenate([x, eps], -1), jnp.full(7, 20.0), jnp.full(7, -20.0)
  np.testing.assert_array_equal(process.from_both(z, noise, output).x, x)
  expected = process.from_eps(z, signal, eps).x
  np.testing.assert_allclose(process.from_both(z, signal, output).x, expected, rtol=1e-6, atol=1e-6)


def test_both_magnifies_no_error_of_the_network_at_any_logsnr():
  """x^ moves by sigma^2 or alpha sigma, eps^ by alpha^2 or alpha sigma, for 1 in either output.

  Here logsnr is 19 at most: eps^ has the rounding of x^, some 2^-24, over sigma = e^-9.5.
  """
  z, output, logsnr = images(1), output_like('both', 2), jnp.array(LOGSNR)
  base = process.from_both(z, logsnr, output)
  for wrong in (jnp.array([1.0, 1.0, 0.0, 0.0]), jnp.array([0.0, 0.0, 1.0, 1.0])):
    moved = process.from_both(z, logsnr, output + wrong[None, None, None])
    for part, before in zip(moved, base, strict=True):
      assert np.abs(part - before).max() <= 1.0 + 8 * 2**-24 * np.exp(9.5)


def test_edm_is_its_preconditioning_at_any_logsnr():
  """x^ = c_skip y + c_out F and eps^ = (z - alpha x^) / sigma, of a network that is given c_in y; y = z / alpha."""
  z, output = np.random.default_rng(0).normal(size=(2, 7, 4, 4, 2))
  alpha, sigma = (s[:, None, None, None] for s in scales(LOGSNR))
  c_skip, c_out, c_in = edm(LOGSNR)
  x = c_skip * z / alpha + c_out * output
  with jax.enable_x64(True):
    at = jnp.float64(LOGSNR)
    got_x, got_eps = map(np.array, process.from_edm(jnp.array(z), at, jnp.array(output)))
    given = np.array(process.edm_input(jnp.array(z), at))
  np.testing.assert_allclose(got_x, x, rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(sigma * got_eps, z - alpha * x, rtol=1e-9, atol=1e-9)
  np.testing.assert_allclose(given, c_in * z / alpha, rtol=1e-9)


def test_edm_s_network_is_given_and_has_to_say_what_has_unit_variance():
  """For data of standard deviation 0.5, at any logsnr: to four standard deviations of the mean of n squares."""
  n = 100_000
  x, eps = np.random.default_rng(0).normal(size=(2, 7, n, 1, 1)) * np.reshape(
    [0.5, 1.0], (2, 1, 1, 1, 1)
  )
  alpha, sigma = (s[:, None, None, None] for s in scales(LOGSNR))
  with jax.enable_x64(True):
    z = alpha * x + sigma * eps
    given = np.array(process.edm_input(jnp.array(z), jnp.float64(LOGSNR)))
  for values in (given, edm_output(x, z, LOGSNR)):
    np.testing.assert_allclose(np.mean(values**2, (1, 2, 3)), 1.0, atol=4 * np.sqrt(2 / n))


def test_edm_magnifies_no_error_of_the_network_at_any_logsnr():
  """x^ moves by 0.5 sigma / r < 1 and eps^ by 0.5 alpha / r <= 1 for 1 in F: in float32, everywhere."""
  z, output, logsnr = images(1), images(2), jnp.array(LOGSNR)
  base, moved = (process.from_edm(z, logsnr, output + wrong) for wrong in (0.0, 1.0))
  for part, before in zip(moved, base, strict=True):
    assert np.abs(part - before).max() <= 1.0 + 1e-5
  np.testing.assert_allclose(process.diffuse(*base, logsnr), z, atol=5e-6)


def test_for_data_of_unit_variance_edm_is_v_with_its_sign_changed(monkeypatch):
  monkeypatch.setattr(process, 'SIGMA_DATA', 1.0)
  z, output, logsnr = images(1), images(2), jnp.array(LOGSNR)
  for part, of_v in zip(
    process.from_edm(z, logsnr, output), process.from_v(z, logsnr, -output), strict=True
  ):
    np.testing.assert_allclose(part, of_v, atol=2e-6)
  np.testing.assert_allclose(process.edm_input(z, logsnr), z, rtol=1e-6)


@pytest.mark.parametrize('output', process.OUTPUTS)
def test_a_network_has_the_channels_of_what_it_says(output):
  channels = {'x': 3, 'eps': 3, 'v': 3, 'both': 6, 'edm': 3}[output]
  assert process.output_channels(output, 3) == channels


def test_velocity_inverts_from_v_at_any_logsnr():
  """(x, eps) to (z, v) is a rotation: nothing is magnified, wherever on the schedule."""
  z, v, logsnr = images(1), images(2), jnp.array(LOGSNR)
  prediction = process.from_v(z, logsnr, v)
  np.testing.assert_allclose(process.velocity(prediction, logsnr), v, atol=2e-6)
  np.testing.assert_allclose(process.diffuse(*prediction, logsnr), z, atol=2e-6)


def test_implied_x_is_the_inverse_of_a_ddim_step():
  x, z_t = images(1), images(2)
  logsnr_t, logsnr_s = jnp.array(MODERATE), jnp.array(MODERATE) + 2.0

  def denoise(z, logsnr):
    return process.from_x(z, logsnr, x)

  z_s = DDIM()(None, denoise, z_t, logsnr_t, logsnr_s)
  np.testing.assert_allclose(process.implied_x(z_t, z_s, logsnr_t, logsnr_s), x, atol=1e-5)


def test_implied_x_of_a_step_to_clean_data_is_what_it_lands_on():
  z_t, z_s = images(1), images(2)
  x = process.implied_x(z_t, z_s, jnp.array(LOGSNR), jnp.full(7, jnp.inf))
  np.testing.assert_array_equal(x, z_s)


def test_each_image_has_its_own_logsnr_even_where_batch_and_channels_agree():
  a, b = images(1, (3, 4, 4, 3)), images(2, (3, 4, 4, 3))
  at, to = jnp.array([-2.0, 0.5, 3.0]), jnp.array([-1.0, 2.0, jnp.inf])
  cases = [
    (process.diffuse, a, b, at),
    (process.from_x, a, at, b),
    (process.from_eps, a, at, b),
    (process.from_v, a, at, b),
    (process.from_both, a, at, jnp.concatenate([b, -b], -1)),
    (process.from_edm, a, at, b),
    (process.edm_input, a, at),
    (lambda x, eps, logsnr: process.velocity(process.Prediction(x, eps), logsnr), a, b, at),
    (process.implied_x, a, b, at, to),
  ]
  for function, *arguments in cases:
    together, alone = function(*arguments), per_example(function, *arguments)
    jax.tree.map(lambda t, o: np.testing.assert_allclose(t, o, rtol=1e-6, atol=1e-6), together, alone)
