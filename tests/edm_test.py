"""EDM's teachers and sampler (Karras et al. 2022) in the paper's own coordinates, y = x + s n with s = sigma / alpha."""

import dataclasses
import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from diffusion_distillation.diffusion import samplers, times
from diffusion_distillation.diffusion.process import alpha_sigma, diffuse, from_edm, from_x
from diffusion_distillation.diffusion.schedules import Cosine, Karras, LinearBeta, ShiftedCosine
from diffusion_distillation.diffusion.weightings import Edm
from diffusion_distillation.methods import Denoising
from diffusion_distillation.networks.denoiser import Bound, Denoiser
from diffusion_distillation.networks.unet import TIME_INPUTS
from diffusion_distillation.run import run
from tests import tiny
from tests.exact import Gaussian, scales

DATA = 0.5  # sigma_data
LEVELS = np.geomspace(0.002, 80.0, 13)  # s, from EDM's least noise to its most
LOGSNR = -2.0 * np.log(LEVELS)


class Table1:
  """Karras et al. 2022, Table 1, the column "Ours"; s as (B, 1, 1, 1)."""

  def __init__(self, s):
    self.skip = DATA**2 / (s**2 + DATA**2)
    self.out = s * DATA / np.sqrt(s**2 + DATA**2)
    self.input = 1 / np.sqrt(s**2 + DATA**2)
    self.noise = np.log(s) / 4
    self.weight = (s**2 + DATA**2) / (s * DATA) ** 2


@dataclasses.dataclass(frozen=True)
class Network:
  """F in place of the U-Net: tanh(params * input) + cos(time input), so that what it is given shows."""

  dropout = 0.0

  def apply(self, variables, z, logsnr, cond, deterministic, rngs=None):
    time = 1000.0 * TIME_INPUTS['c_noise'](logsnr)[:, None, None, None]
    return jnp.tanh(variables['params'] * z) + jnp.cos(3.0 * time)


@pytest.fixture(scope='module')
def drawn():
  """x, eps and z = alpha x + sigma eps at each of LEVELS, in float64."""
  rng = np.random.default_rng(0)
  x, eps = DATA * rng.normal(size=(13, 3, 2, 1)), rng.normal(size=(13, 3, 2, 1))
  alpha, sigma = (scale[:, None, None, None] for scale in scales(LOGSNR))
  return x, eps, alpha * x + sigma * eps


def test_the_denoiser_is_the_paper_s_d_of_y_and_s(drawn):
  """D = c_skip y + c_out F(c_in y; c_noise): Eq. 7."""
  _, _, z = drawn
  s, (alpha, sigma) = LEVELS[:, None, None, None], scales(LOGSNR)
  alpha, sigma = alpha[:, None, None, None], sigma[:, None, None, None]
  table, y = Table1(s), z / alpha
  np.testing.assert_allclose(sigma / alpha, s, rtol=1e-12)
  expected = table.skip * y + table.out * (np.tanh(0.7 * table.input * y) + np.cos(3.0 * table.noise))
  with jax.enable_x64(True):
    x, eps = Denoiser(Network(), 'edm')(0.7, jnp.array(z), jnp.array(LOGSNR), None)
    np.testing.assert_allclose(x, expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(alpha * x + sigma * eps, z, rtol=1e-9, atol=1e-12)
  single = Denoiser(Network(), 'edm')(0.7, jnp.float32(z), jnp.float32(LOGSNR), None)
  np.testing.assert_allclose(single.x, expected, atol=3e-6)
  np.testing.assert_allclose(alpha * single.x + sigma * single.eps, z, atol=3e-6)


def test_the_denoiser_is_that_of_edm_s_code():
  """EDMPrecond around a DDPM++ network (NVlabs/edm): what its F made of four noisy images, a corner of 4x4 pixels each."""
  case = dict(np.load(pathlib.Path(__file__).parent / 'parity' / 'edm.npz'))
  logsnr = -2 * np.log(case['sigma'])
  z = scales(logsnr)[0][:, None, None, None] * case['x']
  x, _ = from_edm(jnp.float32(z), jnp.float32(logsnr), case['F'])
  np.testing.assert_allclose(x, case['D'], atol=1e-5 * np.abs(case['D']).max())
  told = 1000 * TIME_INPUTS['c_noise'](jnp.float32(logsnr))
  np.testing.assert_allclose(told, case['c_noise'], rtol=1e-6)


def test_the_weight_of_the_error_in_f_is_one_at_every_noise_level():
  """lambda c_out^2 = 1, the last line of Table 1."""
  table = Table1(LEVELS)
  with jax.enable_x64(True):
    weight = np.array(Edm()(jnp.array(LOGSNR)))
  np.testing.assert_allclose(weight, table.weight, rtol=1e-9)
  np.testing.assert_allclose(weight * table.out**2, 1.0, rtol=1e-9)


def test_base_training_has_the_paper_s_loss(drawn):
  """Eq. 8: |F - (x - c_skip y) / c_out|^2, as mean over pixels, under EDM's own schedule."""
  x, eps, z = drawn
  with jax.enable_x64(True):
    t = np.array(Karras().inverse(jnp.array(LOGSNR)))
  t[0] = 1e-30  # LEVELS begins where the schedule does
  alpha, table = scales(LOGSNR)[0][:, None, None, None], Table1(LEVELS[:, None, None, None])
  y = z / alpha
  wanted = (x - table.skip * y) / table.out
  raw = np.tanh(0.7 * table.input * y) + np.cos(3.0 * table.noise)
  batch = {'x': x, 'eps': eps, 't': t, 'cond': None}
  with jax.enable_x64(True):
    method = Denoising(Karras(), Edm())
    batch = {k: v if v is None else jnp.array(v) for k, v in batch.items()}
    losses = method.losses(Bound(Denoiser(Network(), 'edm'), 0.7), batch)
  np.testing.assert_allclose(losses, np.mean((raw - wanted) ** 2, (1, 2, 3)), rtol=1e-8)


SCHEDULES = [Cosine(), ShiftedCosine(32), LinearBeta(), Karras()]


@pytest.mark.parametrize('stratified', [False, True])
@pytest.mark.parametrize('schedule', SCHEDULES, ids=lambda schedule: type(schedule).__name__)
def test_drawn_noise_levels_are_log_normal(schedule, stratified):
  """P_mean = -1.2, P_std = 1.2. The empirical law of n draws is sqrt(ln(2/d) / 2n) off with probability d at most
  (Dvoretzky-Kiefer-Wolfowitz), d = 1e-4; that of one stratified batch 1/n for certain, and rounding of float32."""
  count = 8192
  t = times.LogNormal(schedule, uniform=times.Uniform(stratified))(jax.random.key(3), count)
  assert (t > 0.0).all() and (t <= 1.0).all()
  logarithms = -0.5 * np.float64(schedule(t))
  apart = stats.kstest(logarithms, stats.norm(-1.2, 1.2).cdf).statistic
  # The schedules end at 4 standard deviations or further: 3e-5 of all draws are cut.
  assert apart < (1 / count + 2e-4 if stratified else np.sqrt(np.log(2e4) / (2 * count)))
  error = 1.2 / np.sqrt(count)
  assert logarithms.mean() == pytest.approx(-1.2, abs=4 * error)
  assert logarithms.std() == pytest.approx(1.2, abs=4 * error / np.sqrt(2))


def test_edm_s_schedule_runs_between_its_noise_levels_and_back():
  schedule, t = Karras(), jnp.float32(np.linspace(0.01, 1.0, 100))
  ends = np.exp(-0.5 * np.float64(schedule(jnp.array([1e-30, 1.0], jnp.float32))))
  np.testing.assert_allclose(ends, [0.002, 80.0], rtol=1e-5)
  np.testing.assert_allclose(schedule.inverse(schedule(t)), t, atol=1e-5)
  assert schedule(jnp.float32(0.0)) == jnp.inf


@pytest.mark.parametrize('count', [2, 5, 18, 40])
@pytest.mark.parametrize('schedule', [Karras(), Cosine()], ids=['karras', 'cosine'])
def test_the_grid_is_eq_5(schedule, count):
  """s_i = (s_max^(1/7) + i / (N - 1) (s_min^(1/7) - s_max^(1/7)))^7, then 0; the first is t = 1 under any schedule."""
  grid = times.make_grid('karras', count, schedule)
  assert len(grid) == count + 1 and (grid[0], grid[-1]) == (0.0, 1.0)
  i = np.arange(count)
  levels = (80 ** (1 / 7) + i / (count - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7
  found = np.exp(-0.5 * np.float64(schedule(jnp.float32(np.maximum(grid[:0:-1], 1e-30)))))
  tolerance = 3e-5  # the least noise is at t = 1e-6, not 0
  if isinstance(schedule, Cosine):  # which goes on to s = exp(10)
    found, levels, tolerance = found[1:], levels[1:], 2e-3  # of float32's t, 1e-7 beside 1e-4
  np.testing.assert_allclose(found, levels, rtol=tolerance)


@pytest.mark.parametrize('sampler', [samplers.Heun(), samplers.EdmHeun()], ids=['heun', 'edm_heun'])
def test_heun_on_the_grid_converges_to_the_flow_of_gaussian_data_at_second_order(sampler):
  """Where it ends, s falls from 0.002 to 0 in one step, with an error that does not show."""
  data, schedule, nums = Gaussian(0.1, 0.5), Karras(), np.array([32, 64, 128])
  with jax.enable_x64(True):
    z = jnp.linspace(-2.0, 2.0, 9)[:, None, None, None]
    keys = jax.random.split(jax.random.key(0), 9)
    run = jax.jit(lambda grid: samplers.sample(sampler, data, schedule, grid, z, keys))
    exact = data.probability_flow(z, float(schedule(jnp.array(1.0))))
    errors = []
    for n in nums:
      levels = np.float64(np.arange(n)) / (n - 1)  # uniform in t under this schedule
      np.testing.assert_allclose(times.make_grid('karras', n, schedule)[1:], levels, atol=2e-6)
      grid = np.pad(np.float64(times.make_grid('karras', n, schedule)), (128 - n, 0))
      errors.append(np.sqrt(np.mean((run(grid) - exact) ** 2)))
  slope = np.polyfit(np.log(nums), np.log(errors), 1)[0]
  assert slope == pytest.approx(-2.0, abs=0.15) and errors[-1] < 1e-3


def two_peaks(y, s, tanh=np.tanh):
  """E[x | y] where x is drawn from N(0.4, 0.3^2) or N(-0.4, 0.3^2)."""
  variance = 0.3**2 + s**2
  return (s**2 * 0.4 * tanh(0.4 * y / variance) + 0.3**2 * y) / variance


def algorithm_1(denoise, noise, levels):
  """Karras et al. 2022, algorithm 1, in its symbols; returns x_N, and every level at which `denoise` was called."""
  x, t, asked = levels[0] * noise, levels, []

  def slope(x, level):
    asked.append(level)
    return (x - denoise(x, level)) / level

  for i in range(len(t) - 1):
    d = slope(x, t[i])
    x_next = x + (t[i + 1] - t[i]) * d
    if t[i + 1] != 0:
      d_next = slope(x_next, t[i + 1])
      x_next = x + (t[i + 1] - t[i]) * (d / 2 + d_next / 2)
    x = x_next
  return x, asked


@pytest.mark.parametrize('schedule', [Karras(), Cosine()], ids=['karras', 'cosine'])
def test_edm_s_sampler_is_algorithm_1_with_as_many_calls_in_the_compiled_program(schedule):
  """35 in 18 steps, by a grid that is padded; from s = 80 also where the schedule begins at 22026."""
  asked = []

  def denoise(z, logsnr):
    jax.debug.callback(lambda at: asked.append(np.exp(-0.5 * at[0])), logsnr)
    alpha, sigma = alpha_sigma(logsnr, z)
    return from_x(z, logsnr, two_peaks(z / alpha, sigma / alpha, jnp.tanh))

  z = np.linspace(-2.0, 2.0, 9)[:, None, None, None]
  noise = z * np.sqrt(1 + 80.0**-2)  # 80 times that is z / alpha
  with jax.enable_x64(True):
    step, keys = samplers.EdmHeun(), jax.random.split(jax.random.key(0), 9)
    run = jax.jit(lambda grid: samplers.sample(step, denoise, schedule, grid, z, keys))
    for count in (18, 4, 1):
      levels = [80.0]
      if count > 1:
        levels = (
          80 ** (1 / 7) + np.arange(count) / (count - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))
        ) ** 7
      inner = schedule.inverse(jnp.array(-2.0 * np.log(levels[1:])))[::-1]
      grid = np.array([*np.zeros(20 - count), 0.0, *np.maximum(inner, 1e-12), 1.0])
      asked.clear()
      found = run(grid)
      jax.effects_barrier()
      expected, calls = algorithm_1(two_peaks, noise, [*levels, 0.0])
      assert len(asked) == len(calls) == 2 * count - 1 == step.calls(count)
      np.testing.assert_allclose(asked, calls, rtol=1e-9)
      np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


METHOD = {
  'methods': ('dmd',),
  'model__ch_mult': (1,),
  'model__output': 'edm',
  'model__time_input': 'c_noise',
  'schedule__name': 'karras',
  'weighting': 'edm',
  'time__law': 'lognormal',
  'distill__start_steps': 3,
  'evaluation__samplers': ('edm_heun',),
  'evaluation__grid': 'karras',
  'pairs__num_pairs': 32,
  'pairs__batch_size': 32,
  'pairs__sampler': 'edm_heun',
  'pairs__num_steps': 3,
  'pairs__grid': 'karras',
  'dmd__num_updates': 4,
  'dmd__batch_size': 16,
}


@pytest.mark.slow
def test_an_edm_teacher_is_trained_measured_on_its_grid_and_distilled(finished, tmp_path):
  shutil.copy(finished / 'extractor.safetensors', tmp_path)
  run.run(tiny.config(**METHOD), tmp_path)
  results = json.loads((tmp_path / 'results.json').read_text())
  rows = [(row['stage'], row['sampler'], row['grid'], row['nfe']) for row in results['rows']]
  assert rows == [
    ('base', 'edm_heun', 'karras', 5),
    ('base', 'edm_heun', 'karras', 1),
    ('dmd', 'ddim', 'uniform', 1),
  ]
  assert all(np.isfinite(row['value']) for row in results['rows'])
  base, dmd = (json.loads((tmp_path / name / 'stage.json').read_text()) for name in ('base', 'dmd'))
  for lineage in (base, dmd):
    assert lineage['output'] == 'edm' and lineage['network']['time_input'] == 'c_noise'
    assert lineage['schedule'] == {'name': 'Karras', 's_min': 0.002, 's_max': 80.0, 'rho': 7.0}
  assert dmd['parent']['digest'] == base['digest'] != dmd['digest']
  described = json.loads((tmp_path / 'pairs' / 'pairs.json').read_text())
  assert (described['sampler'], described['grid']) == ('EdmHeun', 'karras')
  assert described['teacher']['digest'] == base['digest']


def test_the_law_is_the_base_s_and_the_weighting_the_fake_score_s_too():
  base, dmd = tiny.plan(**METHOD)[0]
  assert base.recipe.method.law == times.LogNormal(Karras(), -1.2, 1.2, times.Uniform())
  for method in (base.recipe.method, dmd.recipe.method):
    assert method.weighting == Edm() and method.schedule == Karras()
  assert diffuse(jnp.ones((1, 1)), jnp.zeros((1, 1)), base.schedule(jnp.ones(1))) == pytest.approx(
    1 / np.sqrt(1 + 80.0**2), rel=1e-5
  )


def test_the_fake_score_is_trained_evenly_over_all_times_whatever_the_law_of_the_base():
  """Under EDM's log-normal law few times lie above t = 0.5, where half of the scores are compared."""
  s = Karras().s_min ** (1 / 7) / 2 + Karras().s_max ** (1 / 7) / 2  # at t = 0.5
  of_base = stats.norm.sf((7 * np.log(s) + 1.2) / 1.2)
  assert of_base == pytest.approx(0.038, abs=1e-3)
  for changes, expected in (({}, 0.5), ({'dmd__fake_law': 'base'}, of_base)):
    dmd = tiny.plan(**METHOD, **changes)[0][-1].recipe.method
    drawn = dmd.draw(jax.random.key(0), (4000, 1, 1, 1))
    spread = np.sqrt(expected * (1 - expected) / 4000)
    assert np.mean(drawn['fake_t'] > 0.5) == pytest.approx(expected, abs=4 * spread)
