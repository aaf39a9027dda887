"""Times that training draws, and grids of them that samplers go down."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.discrete import Discrete
from diffusion_distillation.diffusion.schedules import Cosine, Karras, LinearBeta, ShiftedCosine

LAWS = [times.Uniform(), times.Uniform(stratified=True)]
SCHEDULES = [Cosine(), Cosine(-3.0, 7.0), ShiftedCosine(256), LinearBeta(), Karras()]


def draws(law, count, batches, seed=0):
  """(batches, count) times in float64, each batch from its own key."""
  keys = jax.random.split(jax.random.key(seed), batches)
  return np.float64(jax.jit(jax.vmap(lambda key: law(key, count)))(keys))


@pytest.mark.parametrize('law', LAWS, ids=str)
@pytest.mark.parametrize('smallest', [True, False])
def test_no_draw_is_0_and_none_exceeds_1(law, smallest, monkeypatch):
  """Uniform numbers of float32 are multiples of 2^-23 in [0, 1)."""
  extreme = 0.0 if smallest else 1.0 - 2.0**-23
  monkeypatch.setattr(jax.random, 'uniform', lambda key, shape: jnp.full(shape, extreme))
  t = law(jax.random.key(0), 8)
  assert (t > 0.0).all()
  assert (t <= 1.0).all()
  assert (1.0 in t) if smallest else (2.0**-23 in t)


@pytest.mark.parametrize('count', [1, 8, 13, 128])
def test_stratified_draws_hit_each_stratum_once(count):
  """The strata are ((k - 1) / B, k / B]."""
  strata = np.ceil(draws(times.Uniform(stratified=True), count, 200) * count)
  np.testing.assert_array_equal(np.sort(strata, 1), np.tile(np.arange(1, count + 1), (200, 1)))


def test_stratified_draws_are_equally_far_apart():
  t = np.sort(draws(times.Uniform(stratified=True), 13, 200), 1)
  np.testing.assert_allclose(np.diff(t, axis=1), 1 / 13, atol=1e-6)


def test_independent_draws_do_not_hit_each_stratum_once():
  strata = np.ceil(draws(times.Uniform(), 8, 200) * 8)
  hit = np.array([len(set(row)) for row in strata.tolist()])
  mean = 8 * (1 - (7 / 8) ** 8)
  assert hit.mean() == pytest.approx(mean, abs=4 * hit.std() / np.sqrt(200))


@pytest.mark.parametrize('law', LAWS, ids=str)
@pytest.mark.parametrize('place', [0, 5, 7])
def test_each_draw_of_a_batch_is_uniform(law, place):
  assert stats.kstest(draws(law, 8, 4096)[:, place], 'uniform').pvalue > 0.01


@pytest.mark.parametrize('law', LAWS, ids=str)
def test_the_mean_of_a_batch_has_the_variance_of_its_law(law):
  """1 / (12 B) if independent; one offset within a stratum has 1 / (12 B^2)."""
  count, batches = 16, 4096
  means = draws(law, count, batches).mean(1)
  variance, kurtosis = (1 / (12 * count**2), 9 / 5) if law.stratified else (1 / (12 * count), 3.0)
  assert means.var() == pytest.approx(variance, rel=4 * np.sqrt((kurtosis - 1) / batches))


def log_noise(schedule, t):
  """log(sigma / alpha) at t, in float64."""
  return -0.5 * np.float64(schedule(jnp.float32(t)))


@pytest.mark.parametrize('uniform', LAWS, ids=str)
@pytest.mark.parametrize('schedule', [Cosine(), LinearBeta(), Karras()], ids=str)
def test_log_normal_draws_have_noise_levels_with_a_normal_logarithm(schedule, uniform):
  t = draws(times.LogNormal(schedule, -1.0, 1.1, uniform), 16, 256)
  quantiles = stats.norm(-1.0, 1.1).cdf(log_noise(schedule, t))
  assert stats.kstest(quantiles[:, 3], 'uniform').pvalue > 0.01
  if uniform.stratified:
    inner = np.sort(quantiles, 1) * 16 - np.arange(16)
    assert (inner > -1e-3).all() and (inner < 1 + 1e-3).all()


@pytest.mark.parametrize('schedule', SCHEDULES, ids=str)
def test_log_normal_draws_are_cut_to_the_schedule(schedule):
  """To its noisiest time, and to the first after 0 that float32 tells apart beside 1."""
  much, little = (draws(times.LogNormal(schedule, mean), 8, 64) for mean in (60.0, -60.0))
  assert (much == 1.0).all() and (little == 2.0**-23).all()


@pytest.mark.parametrize('schedule', SCHEDULES, ids=str)
@pytest.mark.parametrize('smallest', [True, False])
def test_no_log_normal_draw_is_0_and_none_exceeds_1(schedule, smallest, monkeypatch):
  extreme = 0.0 if smallest else 1.0 - 2.0**-23
  monkeypatch.setattr(jax.random, 'uniform', lambda key, shape: jnp.full(shape, extreme))
  t = times.LogNormal(schedule)(jax.random.key(0), 8)
  assert (t > 0.0).all() and (t <= 1.0).all()


@pytest.mark.parametrize('law', [*LAWS, times.LogNormal(Cosine())], ids=str)
def test_draws_are_a_function_of_the_key(law):
  one, same, other = (law(jax.random.key(seed), 8) for seed in (1, 1, 2))
  np.testing.assert_array_equal(one, same)
  assert not np.isin(one, other).any()


@pytest.mark.parametrize('num_steps', [1, 4, 1024])
def test_an_interval_holds_its_upper_edge_and_not_its_lower(num_steps):
  i = np.arange(1, num_steps + 1)
  edges = jnp.float32(i / num_steps)
  above = jnp.nextafter(edges[:-1], jnp.float32(2.0))
  np.testing.assert_array_equal(times.interval(edges, num_steps), i)
  np.testing.assert_array_equal(times.interval(above, num_steps), i[1:])


@pytest.mark.parametrize('num_steps', [1, 3, 7, 1000])
def test_intervals_run_from_1_to_n(num_steps):
  tiny = jnp.finfo(jnp.float32).tiny
  i = times.interval(jnp.array([1.0, 0.5 / num_steps, 1e-30, tiny]), num_steps)
  np.testing.assert_array_equal(i, [num_steps, 1, 1, 1])
  assert i.dtype == jnp.int32


def test_the_number_of_intervals_may_be_traced():
  t = jnp.array([[0.1, 0.4], [0.6, 1.0]])
  i = jax.jit(times.interval)(t, jnp.array(5))
  np.testing.assert_array_equal(i, [[1, 2], [3, 5]])


@pytest.mark.parametrize('num_steps', [1, 2, 3, 1024])
@pytest.mark.parametrize('schedule', SCHEDULES, ids=str)
def test_grids_have_n_steps_from_0_to_1(num_steps, schedule):
  line = np.arange(num_steps + 1) / num_steps
  expected = {'uniform': line, 'quadratic': line**2, 'karras': None}
  assert (*expected, 'leading', 'leading_to_first') == times.GRIDS
  for name, values in expected.items():
    grid = times.make_grid(name, num_steps, schedule)
    assert (grid[0], grid[-1]) == (0.0, 1.0)
    assert grid.dtype == np.float32 and grid.shape == (num_steps + 1,)
    assert (np.diff(grid) > 0.0).all()
    if values is not None:
      np.testing.assert_allclose(grid, values, rtol=1e-6)


@pytest.mark.parametrize('schedule', SCHEDULES, ids=str)
def test_the_karras_grid_has_edm_s_noise_levels(schedule):
  """Karras et al. 2022, Eq. 5, with rho = 7 from 80 to 0.002 or the schedule's ends; then clean data."""
  count = 18
  grid = times.make_grid('karras', count, schedule)
  least, most = np.exp(log_noise(schedule, [1e-30, 1.0]))
  low, high = max(least, 0.002), min(most, 80.0)
  roots = low ** (1 / 7) + np.arange(count) / (count - 1) * (high ** (1 / 7) - low ** (1 / 7))
  levels = np.exp(log_noise(schedule, grid[1:]))
  np.testing.assert_allclose(levels[:-1], roots[:-1] ** 7, rtol=1e-3)
  assert levels[-1] == most  # all noise, even where the schedule has more than 80


def test_the_karras_grid_of_edm_s_own_schedule_is_uniform_from_its_least_noise_on():
  expected = [0.0, *np.arange(8) / 7]
  np.testing.assert_allclose(times.make_grid('karras', 8, Karras()), expected, atol=2e-6)


@pytest.mark.parametrize('num_steps', [0, -1])
@pytest.mark.parametrize('name', times.GRIDS)
def test_a_grid_of_no_steps_is_refused(name, num_steps):
  with pytest.raises(ValueError, match='at least 1'):
    times.make_grid(name, num_steps, Cosine())


def test_the_leading_grid_is_for_discrete_time_and_for_as_many_steps_as_it_has():
  schedule = Discrete(num_timesteps=10, steps_offset=1)
  steps = times.make_grid('leading', 3, schedule)
  np.testing.assert_allclose(steps, [0.0, 0.2, 0.5, 0.8], rtol=1e-6)  # timesteps 1, 4, 7
  with pytest.raises(ValueError, match='11 steps do not fit into 10 timesteps'):
    times.make_grid('leading', 11, schedule)
  with pytest.raises(ValueError, match='discrete time'):
    times.make_grid('leading', 3, Cosine())


def test_times_of_one_s_own_choice_are_a_grid():
  grid = times.grid((0, 0.01, 0.3, 1))
  assert grid.dtype == np.float32
  np.testing.assert_array_equal(grid, np.float32([0.0, 0.01, 0.3, 1.0]))
  np.testing.assert_array_equal(times.grid([0.0, 1.0]), [0.0, 1.0])


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    ((0.1, 0.5, 1.0), 'begin with 0 and end with 1'),
    ((0.0, 0.5), 'begin with 0 and end with 1'),
    ((1.0, 0.5, 0.0), 'begin with 0 and end with 1'),
    ((0.0, 0.5, 1.5), 'begin with 0 and end with 1'),
    ((0.0,), 'begin with 0 and end with 1'),
    ((), 'begin with 0 and end with 1'),
    (((0.0, 1.0), (0.0, 1.0)), 'begin with 0 and end with 1'),
    ((0.0, 0.5, 0.5, 1.0), 'increase'),
    ((0.0, 0.6, 0.5, 1.0), 'increase'),
    ((0.0, 1.5, 1.0), 'increase'),
    ((0.0, -0.5, 1.0), 'increase'),
    ((0.0, float('nan'), 1.0), 'increase'),
    ((0.0, 1e-60, 1.0), 'increase'),  # 0 in float32
  ],
)
def test_times_that_do_not_rise_from_0_to_1_are_refused(values, message):
  with pytest.raises(ValueError, match=message):
    times.grid(values)


def test_the_leading_grid_may_end_at_the_first_timestep():
  schedule = Discrete(num_timesteps=10, steps_offset=1)
  steps = times.make_grid('leading_to_first', 3, schedule)
  np.testing.assert_allclose(steps, [0.1, 0.2, 0.5, 0.8], rtol=1e-6)  # timesteps 0, then 1, 4, 7
  np.testing.assert_allclose(schedule(jnp.asarray(steps[:1])), schedule.logsnr[:1], rtol=1e-5)
  with pytest.raises(ValueError, match='steps_offset=1'):
    times.make_grid('leading_to_first', 3, Discrete(num_timesteps=10))
  with pytest.raises(ValueError, match='discrete time'):
    times.make_grid('leading_to_first', 3, Cosine())
