"""Classifier-free guidance against truth: classes and their mixture have denoisers in closed form."""

import dataclasses
import itertools
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.diffusion import process, samplers, schedules, times
from diffusion_distillation.diffusion.guidance import NONE, Guidance, make_guidance
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import sampling
from diffusion_distillation.networks.conditioning import Classes
from diffusion_distillation.networks.guidance import Guided, check, guide
from diffusion_distillation.networks.spaces import Pixels
from tests.exact import Gaussian, Mixture

SCHEDULE = schedules.Cosine()
EITHER = Mixture((0.3, 0.7), (-0.4, 0.5), (0.2, 0.3))
LABELS = {'label': np.array([0, 1, -1], np.int32)}


@dataclasses.dataclass(frozen=True)
class Exact:
  """Pixels of class 0 and 1, and of either where the class is not told; asked without one it says `unconditional`."""

  classes: tuple[Gaussian, Gaussian] = (Gaussian(-0.4, 0.2), Gaussian(0.5, 0.3))
  unconditional: Gaussian | Mixture = EITHER
  conditioning: ClassVar = {'label': Classes(2)}
  calls: ClassVar[list] = []

  def __call__(self, params, z, logsnr, cond, rng=None):
    self.calls.append(cond['label'])
    laws = (*self.classes, self.unconditional)
    label = process.widen(cond['label'] % 3, z)
    found = [law(z, logsnr) for law in laws]
    return jax.tree.map(
      lambda *values: jnp.choose(label, jnp.broadcast_arrays(*values), mode='clip'), *found
    )


def drawer(denoise, guidance, sampler=None, clip_x=False):
  given = (denoise, sampler or samplers.DDIM(), SCHEDULE, Pixels(), (2, 2, 1), 8)
  return sampling.Drawer(*given, clip_x=clip_x, guidance=guidance)


def run(draw, grid, z, label):
  """x of noise z, all of one class."""
  keys, cond = jax.random.split(jax.random.key(0), len(z)), {'label': jnp.full(len(z), label, jnp.int32)}
  return np.asarray(sampling.from_noise(draw, None, jnp.asarray(grid), jnp.asarray(z), keys, cond))


def noise(count=5):
  return np.random.default_rng(0).normal(size=(count, 2, 2, 1)).astype(np.float32)


@pytest.mark.slow
def test_the_guided_score_is_that_of_the_class_raised_against_the_mixture():
  """eps = -sigma grad log p(z | c)^(1 + W) / p(z)^W, by differentiation of the densities."""
  exact, weight = Exact(), 1.5

  def log_density(z, logsnr, parts):
    alpha, sigma = process.alpha_sigma(logsnr, z)
    terms = []
    for share, law in parts:
      v = (alpha * law.std) ** 2 + sigma**2
      terms.append(jnp.log(share) - 0.5 * jnp.log(v) - 0.5 * (z - alpha * law.mean) ** 2 / v)
    return jax.nn.logsumexp(jnp.stack(terms), axis=0)

  either = list(zip(exact.unconditional.weights, exact.classes, strict=True))
  z, logsnr = noise(3), jnp.array([-3.0, 0.3, 4.0])
  x, eps = Guided(exact, Guidance(weight))(None, z, logsnr, LABELS)
  for k, parts in enumerate([[(1.0, exact.classes[0])], [(1.0, exact.classes[1])], either]):

    def density(z, parts=parts, k=k):
      at = logsnr[k : k + 1]
      return jnp.sum((1 + weight) * log_density(z, at, parts) - weight * log_density(z, at, either))

    _, sigma = process.alpha_sigma(logsnr[k : k + 1], z[k : k + 1])
    np.testing.assert_allclose(eps[k : k + 1], -sigma * jax.grad(density)(z[k : k + 1]), atol=2e-5)
  np.testing.assert_allclose(process.diffuse(x, eps, logsnr), z, atol=1e-5)


@pytest.mark.parametrize('weight', [0.5, 2.0])
def test_guided_sampling_follows_the_flow_of_the_shifted_law(weight):
  """With one variance for all, guidance moves the mean: m + W (m - m_unconditional)."""
  exact = Exact((Gaussian(0.2, 0.3), Gaussian(0.3, 0.3)), Gaussian(0.1, 0.3))
  z, grid = noise(), times.uniform(64)
  for label, mean in enumerate((0.2, 0.3)):
    expected = Gaussian(mean + weight * (mean - 0.1), 0.3).probability_flow(z, float(SCHEDULE(1.0)))
    found = run(drawer(exact, Guidance(weight), samplers.Heun()), grid, z, label)
    np.testing.assert_allclose(found, expected, atol=2e-3)


def ddim(exact, weight, z, grid, label, is_guided):
  """DDIM in float64, each step with the guidance that `is_guided(sigma / alpha)` says."""
  levels = np.asarray(SCHEDULE(jnp.asarray(grid)), np.float64)[::-1]
  for t, s in itertools.pairwise(levels):
    at = jnp.full(len(z), t, jnp.float32)
    (x, eps), (x_u, eps_u) = (
      law(jnp.asarray(z, jnp.float32), at) for law in (exact.classes[label], exact.unconditional)
    )
    w = weight * is_guided(np.exp(-0.5 * t))
    alpha, sigma = np.sqrt(1 / (1 + np.exp(-s))), np.sqrt(1 / (1 + np.exp(s)))
    z = alpha * np.asarray(x + w * (x - x_u)) + sigma * np.asarray(eps + w * (eps - eps_u))
  return z


@pytest.mark.parametrize('interval', [(), (0.3, 3.0), (0.0, 1.0), (1.0, math.inf), (0.31, 0.32)])
def test_ddim_is_guided_at_the_levels_of_the_interval(interval):
  """The grid has steps at sigma = alpha, which are in (0, 1], and not in (1, inf]."""
  exact, z, grid = Exact(), noise(), times.uniform(8)
  low, high = interval or (0.0, math.inf)
  expected = ddim(exact, 2.0, z, grid, 1, lambda level: low * 1.001 < level <= high * 1.001)
  guidance = make_guidance(2.0, interval)
  np.testing.assert_allclose(run(drawer(exact, guidance), grid, z, 1), expected, atol=1e-4)
  of_one = Guided(exact, guidance)(None, z[:3], jnp.array([4.0, 0.1, -6.0]), LABELS)
  plain = exact(None, z[:3], jnp.array([4.0, 0.1, -6.0]), LABELS)
  inside = [low < np.exp(-0.5 * logsnr) <= high for logsnr in (4.0, 0.1, -6.0)]
  same = [bool((a == b).all()) for a, b in zip(of_one.x, plain.x, strict=True)]
  assert same[:2] == [not held for held in inside[:2]] and same[2]  # the third has no class


def test_a_step_of_several_calls_is_guided_as_a_whole():
  """Heun's second call is at the noise level where the next step starts, whose guidance it does not have."""
  exact, z, grid, guidance = Exact(), noise(), times.uniform(4), Guidance(1.5, 0.9, 1.1)
  levels = SCHEDULE(jnp.asarray(grid))[::-1]
  expected = jnp.asarray(z)
  for i in range(4):
    denoise = Guided(exact, Guidance(1.5)) if i == 2 else exact
    cond = {'label': jnp.zeros(5, jnp.int32)}
    at, to = (jnp.full(5, level) for level in (levels[i], levels[i + 1]))

    def call(z, logsnr, denoise=denoise, cond=cond):
      return denoise(None, z, logsnr, cond)

    expected = samplers.Heun()(None, call, expected, at, to)
  found = run(drawer(exact, guidance, samplers.Heun()), grid, z, 0)
  np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize('name', samplers.SAMPLERS)
def test_network_calls_are_those_that_are_made(name):
  """A guided step makes each call twice, and any other as many as without guidance."""
  sampler, grid = samplers.SAMPLERS[name](), times.uniform(4)
  for guidance in (Guidance(2.0, 0.9, 3.0), Guidance(2.0, 0.2, 0.5)):
    Exact.calls.clear()
    with jax.disable_jit():
      run(drawer(Exact(), guidance, sampler), grid, noise(1), 1)
    assert len(Exact.calls) == guidance.calls(sampler, grid, SCHEDULE)
  plain = NONE.calls(sampler, grid, SCHEDULE)
  assert plain == sampler.calls(4) and Guidance(2.0).calls(sampler, grid, SCHEDULE) == 2 * plain
  of_two = Guidance(2.0, 0.9, 3.0).calls(sampler, grid, SCHEDULE)
  assert of_two == plain + 2 * sampler.calls_per_step


def test_without_weight_nothing_changes_and_no_program_is_another():
  exact = Exact()
  assert guide(exact, NONE) is exact
  assert make_guidance(0.0, (0.3, 3.0)) is NONE and drawer(exact, make_guidance(0.0)) == drawer(
    exact, NONE
  )
  z, grid = noise(), times.uniform(4)
  expected = samplers.sample(
    samplers.DDIM(), exact.classes[1], SCHEDULE, grid, z, jax.random.split(jax.random.key(0), 5)
  )
  Exact.calls.clear()
  np.testing.assert_array_equal(run(drawer(exact, NONE), grid, z, 1), expected)
  assert len(Exact.calls) == 1  # the network is in the program once


def test_x_is_clipped_after_guidance():
  z, grid = noise(), times.uniform(1)
  free = run(drawer(Exact(), Guidance(9.0)), grid, z, 1)
  clipped = run(drawer(Exact(), Guidance(9.0), clip_x=True), grid, z, 1)
  assert (free > 1.2).all() and (np.abs(clipped) <= 1.0).all()
  np.testing.assert_allclose(clipped, np.clip(free, -1, 1), atol=1e-6)


def test_what_cannot_be_guided_is_refused_in_one_line():
  told = Exact.conditioning
  check('--guidance', NONE, {}, 0.0)
  check('--guidance', Guidance(1.0), told, 0.1, [1, -1])
  wrong = [
    (({}, 0.1), 'unconditional'),
    ((told, 0.0), r'without label dropout \(dataset.label_dropout=0\)'),
    ((told, 0.1, [-1]), 'images without a class'),
  ]
  for given, message in wrong:
    with pytest.raises(UserError, match=f'^--guidance=1.5: .*{message}') as error:
      check('--guidance', Guidance(1.5), *given)
    assert '\n' not in str(error.value)
  for given in ((-1.0,), (math.nan,), (math.inf,), (1.0, (2.0, 1.0)), (1.0, (1.0,)), (0.0, (-1.0, 1.0))):
    with pytest.raises(ValueError, match='guidance'):
      make_guidance(*given)
