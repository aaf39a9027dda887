"""Folders of diffusers that are not models of pixels, that say what cannot be, or that ask for too much."""

import json
import shlex
import shutil

import numpy as np
import pytest
import safetensors.numpy

from configs import default
from diffusion_distillation.errors import UserError
from diffusion_distillation.interop import diffusers
from tests import peers
from tests.interop.diffusers_test import changed
from tests.interop.google_test import refused


@pytest.fixture(scope='module')
def pipeline(tmp_path_factory):
  folder = tmp_path_factory.mktemp('whole') / 'pipeline'
  return peers.write_pipeline(folder, peers.read('unet2d_cifar_form')[0])


def message_of(folder, tmp_path):
  return refused(default.get_config(), folder, tmp_path / 'run', 'diffusers')


@pytest.mark.parametrize('part', ['vae', 'vqvae', 'mel', 'text_encoder', 'image_processor'])
def test_a_pipeline_of_more_than_network_and_schedule_is_refused_by_the_name_of_the_part(
  part, pipeline, tmp_path
):
  folder = changed(pipeline, tmp_path, 'model_index.json', {part: ['diffusers', 'Something']})
  message = message_of(folder, tmp_path)
  assert repr(part) in message and 'only models of pixels' in message
  with pytest.raises(UserError, match=f'a part {part!r}'):
    diffusers.read(folder / 'unet', 5)


def test_parts_that_are_absent_are_no_parts(pipeline, tmp_path, monkeypatch):
  monkeypatch.setattr(diffusers, '_weights', lambda *_: {})
  more = {'vae': [None, None], 'requires_safety_checker': False, 'scheduler': ['diffusers', 'X']}
  folder = changed(pipeline, tmp_path, 'model_index.json', more)
  assert diffusers.read(folder, 5).image_shape[2] == 3


NETWORK = (
  *(('layers_per_block', value) for value in ('2', 2.0, True, 0, -1, [2])),
  *(('attn_norm_num_groups', value) for value in (7, '8')),
  *(('num_class_embeds', value) for value in ('10', -1, 1.5)),
  *(('norm_eps', value) for value in ('x', None, -1.0)),
  *(('time_embedding_dim', value) for value in ('12', 0)),
  *(('in_channels', value) for value in ('3', None)),
  *(('block_out_channels', value) for value in (['a'], [], 32, [32, 0], [[32], [32]])),
  *(('act_fn', value) for value in (['silu'], None)),
  *(('down_block_types', value) for value in (['DownBlock2D', 3], 'DownBlock2D')),
  ('sample_size', True),
  ('sample_size', 10**9),
  ('sample_size', ['a', 'b']),
  ('freq_shift', 'x'),
  ('dropout', 2.0),
  ('_class_name', ['UNet2DModel']),
)
SCHEDULE = (
  *(('beta_schedule', value) for value in (['linear'], {})),
  *(('prediction_type', value) for value in (['epsilon'], 3)),
  *(('num_train_timesteps', value) for value in ('1000', 10**12, 1.5)),
  ('beta_start', '0'),
  ('clip_sample', 'yes'),
  ('variance_type', 'learned'),
)


@pytest.mark.parametrize(
  ('name', 'key', 'value'),
  [('unet/config.json', *case) for case in NETWORK]
  + [('scheduler/scheduler_config.json', *case) for case in SCHEDULE],
)
def test_a_value_of_another_type_is_named_by_its_key(name, key, value, pipeline, tmp_path):
  message = message_of(changed(pipeline, tmp_path, name, {key: value}), tmp_path)
  assert key in message and name in message


@pytest.mark.parametrize(
  ('key', 'value'),
  [
    ('layers_per_block', 90_000),
    ('block_out_channels', [32_000, 96_000]),
    ('time_embedding_dim', 99_000),
    ('num_class_embeds', 99_000),
    ('norm_num_groups', 10**9),
  ],
)
def test_more_than_the_weights_have_is_refused_before_it_is_traced(
  key, value, pipeline, tmp_path, monkeypatch
):
  monkeypatch.setattr('jax.eval_shape', None)
  message = message_of(changed(pipeline, tmp_path, 'unet/config.json', {key: value}), tmp_path)
  assert f'{key}' in message


def renamed(pipeline, tmp_path, *names):
  folder = shutil.copytree(pipeline, tmp_path / "it's a pipeline; touch x")
  weights = folder / 'unet' / diffusers.WEIGHTS
  for name in names:
    shutil.copy(weights, weights.with_name(name))
  weights.unlink()
  return folder


def test_weights_of_another_name_are_found_beside_a_pickle(pipeline, tmp_path):
  names = ('diffusion_pytorch_model.fp16.safetensors', 'diffusion_pytorch_model.bin')
  folder = renamed(pipeline, tmp_path, *names)
  assert diffusers.weights_file(folder / 'unet').name == names[0]


def test_the_command_that_converts_a_pickle_is_one_command(pipeline, tmp_path):
  message = message_of(renamed(pipeline, tmp_path, 'model.bin'), tmp_path)
  words = shlex.split(message.partition('torch is installed: ')[2])
  assert words[:3] == ['cd', str(tmp_path / "it's a pipeline; touch x" / 'unet'), '&&']
  assert words[3:5] == ['python', '-c'] and len(words) == 6
  compile(words[5], 'command', 'exec')


@pytest.mark.parametrize('name', ["a');import os;('.bin", 'a b.bin', '$(touch x).bin', 'ä".bin'])
def test_a_name_that_a_shell_would_take_for_more_is_in_no_command(name, pipeline, tmp_path):
  message = message_of(renamed(pipeline, tmp_path, name), tmp_path)
  assert 'is a pickle' in message and 'python' not in message and 'save_file' in message


@pytest.mark.parametrize(
  ('scheduler', 'clips'),
  [
    ({'_class_name': 'DDPMScheduler'}, True),
    ({'_class_name': 'DDIMScheduler'}, True),
    ({'_class_name': 'PNDMScheduler'}, False),
    ({'_class_name': 'DPMSolverMultistepScheduler'}, False),
    ({'_class_name': 'DDPMScheduler', 'clip_sample': False}, False),
    ({'_class_name': 'PNDMScheduler', 'clip_sample': True}, True),
  ],
)
def test_x_is_clipped_as_the_scheduler_would(scheduler, clips, pipeline, tmp_path, monkeypatch):
  folder = shutil.copytree(pipeline, tmp_path / 'pipeline')
  monkeypatch.setattr(diffusers, '_weights', lambda *_: {})
  path = folder / 'scheduler' / 'scheduler_config.json'
  path.write_text(json.dumps({'beta_schedule': 'linear'} | scheduler))
  assert diffusers.read(folder, 5).clip_x is clips


def test_json_without_end_is_one_line(pipeline, tmp_path):
  folder = shutil.copytree(pipeline, tmp_path / 'pipeline')
  (folder / 'unet' / 'config.json').write_text('[' * 200_000)
  assert 'is not JSON' in message_of(folder, tmp_path)


def test_a_tensor_without_numbers_shows_no_width(pipeline, tmp_path):
  folder = changed(pipeline, tmp_path, 'unet/config.json', {'time_embedding_dim': 99_000})
  path = folder / 'unet' / diffusers.WEIGHTS
  state = safetensors.numpy.load_file(path) | {'wide': np.zeros((0, 100_000), np.float32)}
  safetensors.numpy.save_file(state, path)
  assert 'time_embedding_dim (99000)' in message_of(folder, tmp_path)
