"""Models that diffusers saved give here what they give there."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy

import diffusion_distillation
from configs import default
from diffusion_distillation.diffusion import process, samplers, times
from diffusion_distillation.diffusion.discrete import Discrete
from diffusion_distillation.interop import diffusers
from diffusion_distillation.networks.layers import GroupNorm
from tests import peers, tiny
from tests.interop.google_test import refused

CASES = ('unet2d_cifar_form', 'unet2d_class_scale_shift', 'unet2d_learned')


@pytest.fixture(scope='module', params=CASES)
def case(request, tmp_path_factory):
  """(description, arrays, what was read)."""
  described, arrays = peers.read(request.param)
  folder = peers.write_pipeline(tmp_path_factory.mktemp('peer') / 'pipeline', described)
  return described, arrays, diffusers.read(folder, 5)


@pytest.fixture(scope='module')
def denoise(case):
  """The model as a compiled denoiser, `denoise(z, logsnr, labels)`."""
  _, _, model = case

  def call(z, logsnr, labels):
    return model.denoise(model.params, z, logsnr, None if labels is None else {'label': labels})

  return jax.jit(call)


def test_the_network_predicts_what_is_recorded(case, denoise):
  described, arrays, model = case
  for kind in ('', '_flat'):
    x, steps = arrays[f'in/x{kind}_nhwc'], arrays[f'in/timesteps{kind}']
    labels = arrays.get('in/class_labels', np.zeros(0, int))[: len(x)]
    logsnr = model.schedule(jnp.asarray((steps + 1) / 1000, jnp.float32))
    x_eps = denoise(x, logsnr, labels if len(labels) else None)
    alpha, sigma = (np.asarray(factor) for factor in process.alpha_sigma(logsnr, x_eps.x))
    predicted = {'eps': x_eps.eps, 'v': alpha * x_eps.eps - sigma * x_eps.x}[model.denoise.output]
    peers.assert_close(described, f'net{kind}', predicted, arrays[f'out/net{kind}_nhwc'])


@pytest.mark.parametrize('kind', ['noclip', 'clip', 'clip_corrected'])
def test_each_ddim_step_lands_where_theirs_does(case, denoise, kind):
  described, arrays, model = case
  grid = times.make_grid('leading', 5, model.schedule)
  np.testing.assert_array_equal(np.round(grid[:0:-1] * 1000) - 1, arrays['out/ddim5_timesteps'])
  logsnr = model.schedule(jnp.asarray(grid[::-1]))
  labels = arrays.get('in/sampler_labels')
  step = samplers.DDIMKeepEps() if kind == 'clip' else samplers.DDIM()
  clip = None if kind == 'noclip' else model.space.clip
  bound = samplers.clipped(lambda z, at: denoise(z, at, labels), clip, step.keeps_eps)
  theirs = arrays[f'out/ddim5_{kind}_trajectory_nhwc']
  starts = [arrays['in/noise_nhwc'], *theirs[:-1]]
  for i, (z, expected) in enumerate(zip(starts, theirs, strict=True)):
    at, to = (jnp.full(len(z), logsnr[k]) for k in (i, i + 1))
    ours = step(None, bound, jnp.asarray(z), at, to)
    peers.assert_close(described, f'ddim5_{kind}_single_step', ours, expected)


def test_alphas_are_the_recorded_ones(case):
  _, arrays, model = case
  np.testing.assert_allclose(model.schedule.alpha_bar, arrays['out/alphas_cumprod'], rtol=1e-6)


def test_the_older_names_and_shapes_of_attention_are_the_same_network(case, tmp_path):
  described, _, model = case
  folder = peers.write_pipeline(tmp_path / 'pipeline', described)
  path = folder / 'unet' / diffusers.WEIGHTS
  old = {}
  for name, value in peers.state_dict(described).items():
    for new, before in (
      ('to_q', 'query'),
      ('to_k', 'key'),
      ('to_v', 'value'),
      ('to_out.0', 'proj_attn'),
    ):
      if f'attentions.0.{new}.' in name:
        name = name.replace(new, before)
        value = value[:, :, None, None] if value.ndim == 2 else value
    old[name] = value
  safetensors.numpy.save_file(old, path)
  found = diffusers.read(folder, 5)
  jax.tree.map(np.testing.assert_array_equal, found.params, model.params)


def test_a_network_folder_by_itself_finds_its_scheduler_beside_it(case, tmp_path, caplog):
  described, _, model = case
  folder = peers.write_pipeline(tmp_path / 'pipeline', described)
  assert diffusers.read(folder / 'unet', 5).schedule == model.schedule and not caplog.messages
  alone = shutil.copytree(folder / 'unet', tmp_path / 'alone')
  assert (
    diffusers.read(alone, 5).schedule == Discrete() and 'scheduler_config.json is missing' in caplog.text
  )


def test_settings_of_a_sampler_that_do_not_apply_are_told(pipeline, tmp_path, caplog):
  told = {'clip_sample_range': 2.0, 'set_alpha_to_one': False}
  diffusers.read(changed(pipeline, tmp_path, 'scheduler/scheduler_config.json', told), 5)
  for key in told:
    assert f'{key}' in caplog.text
  assert caplog.text.count('not apply') == 2


def test_timesteps_come_back_from_logsnr_exactly():
  for schedule in (
    Discrete(),
    Discrete('scaled_linear', 1000, 0.00085, 0.012),
    Discrete('squaredcos_cap_v2'),
  ):
    k = np.arange(1000)
    t = jnp.asarray((k + 1) / 1000, jnp.float32)
    np.testing.assert_array_equal(schedule.timestep(schedule(t)), k)
    np.testing.assert_allclose(schedule.inverse(schedule(t)), t, rtol=1e-6)
    assert jnp.isinf(schedule(jnp.zeros(()))) and (np.diff(schedule(t)) < 0).all()
  between = schedule(jnp.asarray([0.5005]))
  assert 499.4 < float(schedule.timestep(between)[0]) < 499.6


def test_the_cosine_betas_have_their_closed_form():
  """alpha-bar is cos^2 of a straight line, but for the last betas, which are capped."""
  t = (np.arange(1000) + 1) / 1000
  line = (np.stack([t, np.zeros_like(t)]) + 0.008) / 1.008 * np.pi / 2
  expected = np.square(np.cos(line[0]) / np.cos(line[1]))
  np.testing.assert_allclose(Discrete('squaredcos_cap_v2').alpha_bar[:-1], expected[:-1], rtol=2e-4)


def test_zero_terminal_snr_leaves_no_signal_at_the_end():
  """Lin et al. 2023; 2.28e-6 is what diffusers' float32 arithmetic leaves a timestep before."""
  schedule, plain = Discrete('squaredcos_cap_v2', zero_snr=True), Discrete('squaredcos_cap_v2')
  assert schedule.alpha_bar[-1] == 0.0 and schedule.alpha_bar[-2] == pytest.approx(2.28e-6, rel=2e-3)
  assert schedule.alpha_bar[0] == pytest.approx(plain.alpha_bar[0], rel=1e-6)
  logsnr = schedule(jnp.ones(()))
  assert jnp.isfinite(logsnr) and float(jax.nn.sigmoid(-logsnr)) == 1.0


def test_equal_steps_of_t_are_the_trailing_timesteps():
  schedule = Discrete()
  logsnr = schedule(jnp.asarray(times.make_grid('uniform', 5, schedule)[:0:-1]))
  assert schedule.timestep(logsnr).tolist() == [999, 799, 599, 399, 199]


def test_a_nearly_constant_input_keeps_the_digits_of_its_variance():
  x = 5.0 + 1e-3 * np.random.default_rng(0).standard_normal((2, 4, 4, 8)).astype(np.float32)
  wide = x.astype(np.float64).reshape(2, 16, 2, 4)
  apart = wide - wide.mean((1, 3), keepdims=True)
  expected = apart / np.sqrt(np.square(apart).mean((1, 3), keepdims=True) + 1e-6)
  norm = GroupNorm(2, shifted=True)
  found = norm.apply({'params': {'scale': jnp.ones(8), 'bias': jnp.zeros(8)}}, jnp.asarray(x))
  np.testing.assert_allclose(np.asarray(found).reshape(wide.shape), expected, atol=2e-3)


# What is changed in which file of a pipeline, and what the message says.
REFUSED = {
  'text': (
    'unet/config.json',
    {'_class_name': 'UNet2DConditionModel'},
    "_class_name='UNet2DConditionModel'",
  ),
  'fourier': ('unet/config.json', {'time_embedding_type': 'fourier'}, 'time_embedding_type=fourier'),
  'block': (
    'unet/config.json',
    {'down_block_types': ['SkipDownBlock2D', 'AttnDownBlock2D']},
    "down_block_types: 'SkipDownBlock2D'",
  ),
  'ada': (
    'unet/config.json',
    {'resnet_time_scale_shift': 'ada_group'},
    "resnet_time_scale_shift='ada_group'",
  ),
  'activation': ('unet/config.json', {'act_fn': 'snake'}, "act_fn='snake'"),
  'variance': ('unet/config.json', {'out_channels': 6}, 'predicts a variance'),
  'levels': ('unet/config.json', {'block_out_channels': [32]}, 'down_block_types has 2 entries'),
  'heads': ('unet/config.json', {'attention_head_dim': 48}, 'attention_head_dim=48 does not divide'),
  'size': ('unet/config.json', {'sample_size': None}, 'sample_size=None'),
  'odd': ('unet/config.json', {'sample_size': 15}, 'sides are divisible by 2'),
  'groups': ('unet/config.json', {'norm_num_groups': None}, 'norm_num_groups'),
  'learned': (
    'scheduler/scheduler_config.json',
    {'variance_type': 'learned_range'},
    "variance_type='learned_range'",
  ),
  'prediction': (
    'scheduler/scheduler_config.json',
    {'prediction_type': 'flow'},
    "prediction_type='flow'",
  ),
  'betas': ('scheduler/scheduler_config.json', {'beta_schedule': 'sigmoid'}, "beta_schedule='sigmoid'"),
  'trained': ('scheduler/scheduler_config.json', {'trained_betas': [0.1, 0.2]}, 'trained_betas'),
  'no trained': ('scheduler/scheduler_config.json', {'trained_betas': []}, 'trained_betas'),
  'noiseless': (
    'scheduler/scheduler_config.json',
    {'trained_betas': [1e-9, 0.1], 'num_train_timesteps': 2},
    'the first beta is too small for float32',
  ),
  'rows': (
    'unet/config.json',
    {'time_embedding_type': 'learned', 'num_train_timesteps': 10},
    'num_train_timesteps=10 is less than the 1000 timesteps',
  ),
  'range': ('scheduler/scheduler_config.json', {'beta_end': 2.0}, 'beta_end (2.0)'),
}


@pytest.fixture(scope='module')
def pipeline(tmp_path_factory):
  return peers.write_pipeline(tmp_path_factory.mktemp('whole') / 'pipeline', peers.read(CASES[0])[0])


def changed(pipeline, tmp_path, name, values):
  folder = shutil.copytree(pipeline, tmp_path / 'pipeline')
  path = folder / name
  path.write_text(json.dumps(json.loads(path.read_text()) | values))
  return folder


@pytest.mark.parametrize('what', REFUSED)
def test_what_is_not_supported_is_named_by_its_key(what, pipeline, tmp_path):
  name, values, words = REFUSED[what]
  folder = changed(pipeline, tmp_path, name, values)
  message = refused(default.get_config(), folder, tmp_path / 'run', 'diffusers')
  assert words in message and name in message


def rewrite(change):
  def spoil(path):
    state = safetensors.numpy.load_file(path)
    change(state)
    safetensors.numpy.save_file(state, path)

  return spoil


SPOILED = {
  'truncated': (
    lambda path: path.write_bytes(path.read_bytes()[:1000]),
    'damaged or not a safetensors file',
  ),
  'empty': (lambda path: path.write_bytes(b''), 'damaged or not a safetensors file'),
  'huge header': (
    lambda path: path.write_bytes(b'\xff' * 8 + b'{}'),
    'damaged or not a safetensors file',
  ),
  'missing': (rewrite(lambda state: state.pop('conv_in.bias')), 'conv_in.bias is missing'),
  'too many': (
    rewrite(lambda state: state.update(more=np.zeros(3, np.float32))),
    'more is not a weight',
  ),
  'shape': (
    rewrite(lambda state: state.update({'conv_in.weight': np.zeros((32, 3, 1, 1), np.float32)})),
    'conv_in.weight has shape (32, 3, 1, 1)',
  ),
  'nan': (
    rewrite(lambda state: state.update({'conv_in.bias': np.full(32, np.nan, np.float32)})),
    'conv_in.bias is not finite',
  ),
  'pickle': (lambda path: path.rename(path.with_suffix('.bin')), 'is a pickle'),
  'nothing': (lambda path: path.unlink(), 'there is no diffusion_pytorch_model.safetensors'),
}


@pytest.mark.parametrize('what', SPOILED)
def test_weights_that_do_not_fit_are_refused_in_one_line(what, pipeline, tmp_path):
  spoil, words = SPOILED[what]
  folder = shutil.copytree(pipeline, tmp_path / 'pipeline')
  spoil(folder / 'unet' / diffusers.WEIGHTS)
  message = refused(default.get_config(), folder, tmp_path / 'run', 'diffusers')
  assert words in message


SMALL = {
  'sample_size': 8,
  'in_channels': 1,
  'out_channels': 1,
  'block_out_channels': [8],
  'norm_num_groups': 4,
  'layers_per_block': 1,
  'down_block_types': ['AttnDownBlock2D'],
  'up_block_types': ['AttnUpBlock2D'],
}


def small_pipeline(folder):
  """A pipeline of a small network for the digits, with random weights."""
  case = peers.read(CASES[0])[0] | {'parameters': []}
  case['config'] = case['config'] | SMALL
  peers.write_pipeline(folder, case)
  network = diffusers._network(folder, case['config'], Discrete())
  params = network.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1))['params']
  safetensors.numpy.save_file(diffusers.state_dict(params), folder / 'unet' / diffusers.WEIGHTS)
  return folder, params


@pytest.mark.slow
def test_a_pipeline_is_imported_distilled_by_rounds_and_by_dmd_and_sampled(finished, tmp_path):
  folder, params = small_pipeline(tmp_path / 'pipeline')
  workdir = tmp_path / 'run'
  arguments = tiny.flags(
    methods=('progressive', 'dmd'),
    distill__end_steps=2,
    dmd__num_updates=2,
    dmd__batch_size=16,
    dmd__warmup=0,
    pairs__num_pairs=32,
    pairs__num_steps=2,
    evaluation__samplers=('ddim',),
    evaluation__grid='leading',
  )
  source = ('--mode=import', '--source=diffusers', f'--checkpoint={folder}')
  code, _, err = tiny.run_cli(*arguments, *source, f'--workdir={workdir}')
  assert code == 0, err
  shutil.copy(finished / 'extractor.safetensors', workdir)
  code, _, err = tiny.run_cli(*arguments, f'--workdir={workdir}')
  assert code == 0, err
  rows = json.loads((workdir / 'results.json').read_text())['rows']
  assert {row['stage'] for row in rows} == {'base', 'progressive_0002', 'dmd'}
  jax.tree.map(
    np.testing.assert_array_equal, diffusion_distillation.load(workdir / 'base').stored.params, params
  )
  assert diffusion_distillation.load(workdir / 'dmd').sample(3).shape == (3, 8, 8, 1)


def test_a_state_dict_is_the_one_that_was_read(case):
  described, _, model = case
  expected = peers.state_dict(described)
  found = diffusers.state_dict(model.params)
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_array_equal(found[name], value)
