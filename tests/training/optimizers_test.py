"""Learning rates and Adam against their definitions."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_distillation.training.optimizers import DECAYS, Adam, LearningRate

PARAMS = {'a': jnp.array([[1.0, -2.0], [0.5, 3.0]]), 'b': jnp.array([-1.0, 0.0, 2.0])}
GRADS = {'a': jnp.array([[0.3, -1e-3], [-2.0, 5.0]]), 'b': jnp.array([1e-2, -4.0, 0.7])}
NORM = float(np.sqrt(sum(np.sum(np.square(g)) for g in GRADS.values())))


def updates_of(adam, *gradients, params=PARAMS):
  """What `adam` makes of these gradients, one after the other, at the same parameters."""
  transform = adam.transform()
  state, updates = transform.init(params), []
  for gradient in gradients:
    scale = adam.scales({'student': optax.tree.norm(gradient)})['student']
    update, state = transform.update(optax.tree.scale(scale, gradient), state, params)
    updates.append(update)
  return updates


def assert_close(got, expected, **tolerance):
  jax.tree.map(lambda g, e: np.testing.assert_allclose(g, e, **tolerance), got, expected)


@pytest.mark.parametrize(
  ('rate', 'expected'),
  [
    (LearningRate(0.5, 4), [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
    (LearningRate(0.5, 4, warmup=1), [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]),
    (LearningRate(0.5, 2, warmup=4), [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]),
    (LearningRate(0.5, 5, decay='linear'), [0.5, 0.4, 0.3, 0.2, 0.1, 0.0]),
    (LearningRate(0.5, 4, decay='linear'), [0.5, 0.375, 0.25, 0.125, 0.0, 0.0]),
    (LearningRate(0.5, 4, warmup=2, decay='linear'), [0.25, 0.375, 0.25, 0.125, 0.0, 0.0]),
    (LearningRate(0.5, 3, decay='cosine'), [0.5, 0.375, 0.125, 0.0, 0.0, 0.0]),
    (LearningRate(0.5, 3, warmup=2, decay='cosine'), [0.25, 0.375, 0.125, 0.0, 0.0, 0.0]),
  ],
)
def test_learning_rate_of_the_first_updates(rate, expected):
  np.testing.assert_allclose(
    [rate(jnp.array(step)) for step in range(6)], expected, rtol=1e-6, atol=1e-8
  )


@pytest.mark.parametrize('warmup', [0, 1, 7, 40])
@pytest.mark.parametrize('decay', ['none', 'linear', 'cosine'])
def test_learning_rates_of_a_whole_stage_are_warm_up_times_decay(decay, warmup):
  """Written out in float64: min(1, (k + 1) / warmup), times the share that is left of the peak."""
  assert list(DECAYS) == ['none', 'linear', 'cosine']
  k = np.arange(20)
  left = {'none': np.ones(20), 'linear': 1 - k / 20, 'cosine': np.cos(np.pi * k / 40) ** 2}[decay]
  warm = np.minimum(1.0, (k + 1) / warmup) if warmup else np.ones(20)
  got = jax.vmap(LearningRate(3e-4, 20, warmup, decay))(jnp.arange(20))
  np.testing.assert_allclose(got, 3e-4 * warm * left, rtol=2e-6)


def test_learning_rates_of_all_lengths_share_a_trace_for_each_decay():
  traces = []

  @jax.jit
  def at(rate, step):
    traces.append(rate)
    return rate(step)

  numbers = [(1.0, 10, 0), (0.5, 5, 4), (0.1, 20, 2)]
  expected = {'none': [1.0, 0.25, 0.1], 'linear': [0.9, 0.2, 0.095]}
  for decay, values in expected.items():
    rates = [LearningRate(*fields, decay) for fields in numbers]
    np.testing.assert_allclose([at(rate, jnp.array(1)) for rate in rates], values, rtol=1e-6)
  assert [rate.decay for rate in traces] == ['none', 'linear']


def test_first_update_is_the_sign_of_the_gradient():
  (update,) = updates_of(Adam(clip_norm=1e6), GRADS)
  assert_close(update, jax.tree.map(jnp.sign, GRADS), rtol=2e-5)  # |g| / (|g| + eps), |g| >= 1e-3


def test_a_zero_gradient_gives_a_zero_update():
  (update,) = updates_of(Adam(), jax.tree.map(jnp.zeros_like, GRADS))
  assert_close(update, jax.tree.map(jnp.zeros_like, GRADS), rtol=0)


def test_updates_are_adams():
  """Kingma & Ba 2015, algorithm 1, with bias correction; in float64."""
  adam = Adam(b1=0.7, b2=0.8, eps=1e-2, clip_norm=1e6)
  gradients = np.random.default_rng(0).normal(size=(5, 3))
  got = updates_of(adam, *jnp.float32(gradients), params=jnp.zeros(3))
  m, v = np.zeros(3), np.zeros(3)
  for k, gradient in enumerate(gradients):
    m, v = 0.7 * m + 0.3 * gradient, 0.8 * v + 0.2 * gradient**2
    m_hat, v_hat = m / (1 - 0.7 ** (k + 1)), v / (1 - 0.8 ** (k + 1))
    np.testing.assert_allclose(got[k], m_hat / (np.sqrt(v_hat) + 1e-2), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('clip_norm', [0.1, 1.0, 100.0])
def test_gradients_are_scaled_down_together_to_the_norm_that_they_are_clipped_to(clip_norm):
  """A large eps shows the gradient's length, which Adam else cancels: g / (|g| + 1)."""
  (update,) = updates_of(Adam(eps=1.0, clip_norm=clip_norm), GRADS)
  scale = min(1.0, clip_norm / NORM)
  assert (scale < 1.0) == (clip_norm < 10.0)
  expected = jax.tree.map(lambda g: scale * g / (scale * jnp.abs(g) + 1.0), GRADS)
  assert_close(update, expected, rtol=1e-5)


def test_weight_decay_is_added_after_adam_to_every_parameter():
  """Decoupled: neither clipped nor divided by the gradient's moments, nor part of them."""
  gradients = [GRADS, jax.tree.map(jnp.negative, GRADS), GRADS]
  decayed = updates_of(Adam(weight_decay=0.1), *gradients)
  plain = updates_of(Adam(), *gradients)
  for with_decay, without in zip(decayed, plain, strict=True):
    assert_close(with_decay, jax.tree.map(lambda u, p: u + 0.1 * p, without, PARAMS), atol=1e-6)


def test_weight_decay_alone_shrinks_parameters_where_there_is_no_gradient():
  (update,) = updates_of(Adam(weight_decay=0.1), jax.tree.map(jnp.zeros_like, GRADS))
  assert_close(update, jax.tree.map(lambda p: 0.1 * p, PARAMS), rtol=1e-6)


def test_equal_optimizers_are_equal_static_arguments():
  assert Adam(weight_decay=0.1) == Adam(weight_decay=0.1)
  assert hash(Adam(weight_decay=0.1)) == hash(Adam(weight_decay=0.1))
  assert Adam(weight_decay=0.1) != Adam()
