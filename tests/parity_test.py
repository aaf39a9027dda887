"""Our numbers are those of the code released with Salimans & Ho (2022).

In tests/parity: a small network with random weights, inputs, and what the released code made of them in
float32. Errors are relative, to the largest number of an array and in its norm.
"""

import dataclasses
import functools
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.core import FrozenDict

from diffusion_distillation.diffusion import process, samplers, times
from diffusion_distillation.diffusion.schedules import Cosine
from diffusion_distillation.diffusion.weightings import WEIGHTINGS, SnrTrunc
from diffusion_distillation.interop import google
from diffusion_distillation.methods import Denoising, Progressive
from diffusion_distillation.networks.denoiser import Bound, Denoiser
from diffusion_distillation.networks.spaces import Pixels
from diffusion_distillation.networks.unet import UNet
from diffusion_distillation.training import step as update
from diffusion_distillation.training.optimizers import Adam, LearningRate
from diffusion_distillation.training.recipe import Recipe

DATA = pathlib.Path(__file__).parent / 'parity'
INPUTS, RECORDED = (dict(np.load(DATA / f'{name}.npz')) for name in ('inputs', 'outputs_f32'))
X = INPUTS['img'] / np.float32(127.5) - 1
SCHEDULE = Cosine()
LOSSES = {'constant': 'constant', 'snr': 'snr', 'snr_trunc': 'snr_trunc', 'snr_plus_one': 'v_mse'}
GAMMAS = {'fixed_small': 0.0, 'fixed_medium_0.5': 0.5, 'fixed_large': 1.0}


def network():
  """The sample's network, as its config.json describes it."""
  c = json.loads((DATA / 'config.json').read_text())
  same = ('out_ch', 'ch', 'emb_ch', 'num_res_blocks', 'num_heads', 'head_dim', 'resblock_resample')
  return UNet(
    **{name: c[name] for name in same},
    ch_mult=tuple(c['ch_mult']),
    attn_resolutions=tuple(c['attn_resolutions']),
    time_input=c['logsnr_input_type'],
  )


OURS = Denoiser(network(), 'both')


@functools.cache
def params(name):
  """Of the 'student' or the 'teacher'."""
  path = DATA / f'checkpoint_{name}'
  expected = jax.eval_shape(lambda rng: OURS.init(rng, (8, 8, 3)), jax.random.key(0))
  return google.fit(google.read(path).ema_params, expected, path)


# Compiled as for users, not as quickly as for most tests: that rounds otherwise.
AS_USERS_DO = {'xla_cpu_use_fusion_emitters': True}
DENOISE = jax.jit(OURS)
APPLY = jax.jit(OURS.network.apply, compiler_options=AS_USERS_DO)
CLIPS = {False: None, True: Pixels().clip}


def bound(name):
  """The compiled denoiser with those parameters."""
  return Bound(DENOISE, params(name))


def error(found, recorded):
  found, recorded = np.asarray(found, np.float64), np.asarray(recorded, np.float64)
  assert found.shape == recorded.shape
  difference = found - recorded
  largest = np.abs(difference).max() / np.abs(recorded).max()
  return max(largest, np.linalg.norm(difference) / np.linalg.norm(recorded))


def check(name, found, limit):
  """Asserts that `found` is what is recorded under `name`, and prints how nearly."""
  worst = error(found, RECORDED[name])
  print(f'{name}: {worst:.1e} < {limit:.0e}')
  assert worst < limit, name


def test_the_schedule():
  with np.load(DATA / 'schedule.npz') as recorded:
    u, logsnr = jnp.maximum(recorded['u'], np.finfo(np.float32).tiny), recorded['logsnr']
  assert error(SCHEDULE(u), logsnr) < 1e-6


@pytest.mark.parametrize(
  ('recorded', 'time_input'),
  [
    ('student', 'inv_cos'),
    ('teacher', 'inv_cos'),
    ('student_sigmoid', 'sigmoid'),
    ('student_linear', 'linear'),
  ],
)
def test_the_network(recorded, time_input):
  net = dataclasses.replace(network(), time_input=time_input)
  variables = {'params': params(recorded.split('_')[0])}
  output = jax.jit(net.apply)(variables, INPUTS['unet_x'], INPUTS['unet_logsnr'])
  check(f'unet/out_{recorded}', output, 1e-5)


@pytest.mark.parametrize('clip', [False, True])
def test_the_predictions_of_x_and_eps_and_v(clip):
  """As a sampler sees them, for the recorded output of the network."""
  z, logsnr, output = INPUTS['unet_x'], INPUTS['unet_logsnr'], RECORDED['unet/out_student']
  denoise = samplers.clipped(lambda z, logsnr: process.from_both(z, logsnr, output), CLIPS[clip])
  prediction = denoise(z, logsnr)
  v = process.velocity(prediction, logsnr)
  for name, found in (('x', prediction.x), ('eps', prediction.eps), ('v', v)):
    check(f'heads/clip{clip:d}/model_{name}', found, 1e-5)


def noised(group, logsnr):
  """z at `logsnr`, and checks that z and logsnr are those of the group."""
  z = process.diffuse(X, INPUTS['eps'], logsnr)
  check(f'{group}/logsnr', logsnr, 1e-6)
  check(f'{group}/z', z, 1e-6)
  return z


@pytest.mark.parametrize('weighting', LOSSES)
@pytest.mark.parametrize('num_steps', [0, 8])
def test_base_losses(num_steps, weighting):
  group = f'base_disc{num_steps}' if num_steps else 'base_cont'
  t = (RECORDED[f'{group}/i'] + 1) / np.float32(8) if num_steps else INPUTS['u_cont']
  logsnr = SCHEDULE(jnp.maximum(t, np.finfo(np.float32).tiny))
  z = noised(group, logsnr)
  output = APPLY({'params': params('student')}, z, logsnr)
  check(f'{group}/net_out', output, 1e-5)
  method = Denoising(SCHEDULE, WEIGHTINGS[weighting](), num_steps=num_steps)
  batch = {'x': X, 'eps': INPUTS['eps'], 't': t, 'cond': None}
  losses = method.losses(bound('student'), batch)
  check(f'{group}/loss_{LOSSES[weighting]}', losses, 1e-4)


@pytest.mark.parametrize('num_steps', [1, 2, 4, 512])
def test_distillation_targets(num_steps):
  group = f'distill{num_steps}'
  i = jnp.asarray(RECORDED[f'{group}/i'] + 1)
  logsnr = SCHEDULE(i / num_steps)
  z = noised(group, logsnr)
  x = Progressive(num_steps, SCHEDULE, SnrTrunc()).target_x(bound('teacher'), z, i, None)
  target = process.from_x(z, logsnr, x)
  # x follows from the difference of two z that are an angle of pi / 2N apart, which multiplies their rounding errors. For 512
  # steps, the recorded values and ours are each a third of this limit away from the same formula in float64.
  limit = max(1e-4, 10 * 2**-24 / math.sin(math.pi / (2 * num_steps)))
  check(f'{group}/x_target', target.x, limit)
  check(f'{group}/eps_target', target.eps, limit)
  check(f'{group}/v_target', process.velocity(target, logsnr), limit)


@pytest.mark.parametrize('weighting', LOSSES)
@pytest.mark.parametrize('num_steps', [1, 2, 4, 512])
def test_distillation_losses(num_steps, weighting):
  group = f'distill{num_steps}'
  method = Progressive(num_steps, SCHEDULE, WEIGHTINGS[weighting]())
  i = jnp.asarray(RECORDED[f'{group}/i'] + 1)
  batch = {'x': X, 'eps': INPUTS['eps'], 'i': i, 'cond': None}
  losses = method.losses({name: bound(name) for name in ('student', 'teacher')}, batch)
  # At t = 1 two eps differ by alpha = 5e-5 times what two x do, and are rounded by 2^-23: 0.3 % of that
  # in each of 192 numbers. The released code subtracts them nevertheless; ours looks at the x there.
  limit = 5e-4 if (num_steps, weighting) == (1, 'snr') else 1e-4
  check(f'{group}/loss_{LOSSES[weighting]}', losses, limit)


def student(z, logsnr):
  """The student as samplers call it."""
  return DENOISE(params('student'), z, logsnr, None)


def trajectory(sampler, num_steps, clip, monkeypatch):
  """z after each step, from the recorded noise; the step from time (i + 1) / n adds `noise8[i]`."""
  logsnr = SCHEDULE(jnp.asarray(times.uniform(num_steps)))
  z, states = jnp.asarray(INPUTS['init']), []
  for i in reversed(range(num_steps)):
    monkeypatch.setattr(samplers, 'normal', lambda rng, shape, i=i: INPUTS['noise8'][i])
    at, to = jnp.full(6, logsnr[i + 1]), jnp.full(6, logsnr[i])
    z = sampler('unused', samplers.clipped(student, CLIPS[clip]), z, at, to)
    states.append(z)
  return jnp.stack(states)


@pytest.mark.parametrize('clip', [False, True])
@pytest.mark.parametrize('num_steps', [1, 2, 4, 8])
def test_ddim_samples(num_steps, clip, monkeypatch):
  states = trajectory(samplers.DDIM(), num_steps, clip, monkeypatch)
  check(f'ddim/clip{clip:d}/N{num_steps}', states[-1], 1e-4)
  if num_steps == 4 and clip:
    check('ddim/clip1/traj_N4', states, 1e-4)


@pytest.mark.parametrize('clip', [False, True])
@pytest.mark.parametrize('variance', GAMMAS)
@pytest.mark.parametrize('num_steps', [1, 2, 4, 8])
def test_ancestral_samples(num_steps, variance, clip, monkeypatch):
  sampler = samplers.Ancestral(gamma=GAMMAS[variance])
  states = trajectory(sampler, num_steps, clip, monkeypatch)
  check(f'noisy/clip{clip:d}/{variance}/N{num_steps}', states[-1], 1e-4)


def test_the_loop_over_all_steps(monkeypatch):
  denoise = samplers.clipped(student, Pixels().clip)
  keys, grid = jax.random.split(jax.random.key(0), 6), jnp.asarray(times.uniform(8))
  x = samplers.sample(samplers.DDIM(), denoise, SCHEDULE, grid, jnp.asarray(INPUTS['init']), keys)
  check('ddim/clip1/N8', x, 1e-4)


@pytest.mark.parametrize(
  ('kind', 'method', 'learning_rate'),
  [('base', Denoising, 2e-4), ('distill', functools.partial(Progressive, 4), 5e-5)],
)
@pytest.mark.slow
def test_three_updates_in_a_row(kind, method, learning_rate, monkeypatch):
  """Both start from the student; the learning rates are those of the released configs for CIFAR-10."""
  loss = method(SCHEDULE, SnrTrunc())
  recipe = Recipe(
    networks=FrozenDict(loss.networks(OURS, OURS)),
    method=loss,
    optimizer=Adam(),
    learning_rate={'student': LearningRate(learning_rate, 50_000)},
    ema_decay=(0.0,),
    seed=0,
    space=Pixels(),
    shape=INPUTS['train_img'][0].shape,
  )

  @jax.jit
  def step(state, teacher, batch, drawn):
    monkeypatch.setattr(type(recipe.method), 'draw', lambda *_: drawn)
    return update.train_step(recipe, state, {'teacher': teacher}, batch)

  state, found = recipe.create_state(params('student')), []
  for k in range(3):
    t = RECORDED[f'train_{kind}/u'][k].astype(np.float32)
    drawn = {'eps': RECORDED[f'train_{kind}/eps'][k]}
    drawn |= {'t': t} if kind == 'base' else {'i': np.round(4 * t).astype(np.int32)}
    batch = {'image': INPUTS['train_img'][k], 'cond': None}
    state, metrics = step(state, params('teacher'), batch, drawn)
    found.append([metrics['loss'], metrics['grad_norm']])
  loss, norm = np.array(found).T
  # Without clipping, or with another eps or b1 in Adam, they would differ by 4e-5 and more.
  check(f'train_{kind}/loss', loss, 3e-5)
  check(f'train_{kind}/gnorm', norm, 3e-5)
