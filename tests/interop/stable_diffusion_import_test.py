"""A folder of Stable Diffusion is imported, draws what diffusers draws, and is refused if it is not one."""

import json
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

import diffusion_distillation
from configs import stable_diffusion as config_file
from diffusion_distillation.diffusion import samplers, times
from diffusion_distillation.diffusion.guidance import make_guidance
from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.evaluation import elsewhere, sampling
from diffusion_distillation.evaluation.loading import LoadedModel, batch_size
from diffusion_distillation.interop import importing, stable_diffusion
from diffusion_distillation.stages import model, plan, workdir
from diffusion_distillation.system.checkpoints import digest
from tests import peers, tiny
from tests.interop.google_test import refused

CASES = ('sd15_tiny', pytest.param('sd21_tiny', marks=pytest.mark.slow))


def config(**changes):
  c = config_file.get_config()
  c.distill.start_steps = 5
  c.update_from_flattened_dict(changes)
  return c


def write(folder, name):
  """A case as a pipeline folder, and a tokenizer."""
  described, _ = peers.read(name)
  peers.write_stable_diffusion(folder, described)
  return pathlib.Path(
    shutil.copytree(
      peers.ROOT / 'clip_tokenizer',
      folder / 'tokenizer',
      ignore=shutil.ignore_patterns('tokenizer.json', 'recorded.json'),
    )
  ).parent


@pytest.fixture(scope='module', params=CASES)
def case(request, tmp_path_factory):
  """(description, arrays, the model in the imported folder)."""
  described, arrays = peers.read(request.param)
  folder = write(tmp_path_factory.mktemp('peer') / 'pipeline', request.param)
  run = tmp_path_factory.mktemp('run') / 'run'
  importing.from_stable_diffusion(config(), config(), folder, run)
  shutil.move(run / 'base' / 'model', moved := tmp_path_factory.mktemp('moved') / 'model')
  return described, arrays, diffusion_distillation.load(moved)


def prompts_of(arrays):
  """The embeddings of two prompts and of the empty one, (2, T, D) each."""
  text = arrays['out/text_last_hidden_state']
  found = arrays.get('in/prompt_embeds', text[:2])
  return found, arrays.get('in/negative_prompt_embeds', np.broadcast_to(text[2:], found.shape))


@pytest.mark.slow
def test_each_guided_step_lands_where_theirs_does(case):
  """One program draws the first i steps for every i: a grid may end at any time."""
  described, arrays, loaded = case
  stored, (text, no_text) = loaded.stored, prompts_of(arrays)
  grid = times.make_grid(stored.times, stored.num_steps, stored.schedule)
  np.testing.assert_array_equal(np.round(grid[:0:-1] * 1000) - 1, arrays['out/sample_timesteps'])
  weight = described.get('guidance_scale', 7.5) - 1.0
  draw = loaded.drawer(samplers.DDIM(), stored.clip_x, 2, make_guidance(weight))
  run = jax.jit(lambda *args: sampling.from_noise(draw, *args))
  z, keys = jnp.asarray(arrays['in/latents_nhwc']), jax.random.split(jax.random.key(0), 2)
  theirs = arrays.get('out/sample_trajectory_nhwc')
  if theirs is None:
    theirs = arrays['out/sample_trajectory'].transpose(0, 1, 3, 4, 2)
  for i, expected in enumerate(theirs):
    some = np.pad(grid[-(i + 2) :], (8 - i, 0), mode='edge')
    x = run(stored.params, some, z, keys, {'text': text, 'no_text': no_text})
    peers.assert_close(described, 'sample_trajectory', x, expected)
  vae, image = stored.space.vae, arrays['out/sample_image_nhwc']
  decode = jax.jit(lambda h: vae.apply({'params': stored.space.weights()}, h, method='decode'))
  decoded = decode(vae.unscaled(x))
  peers.assert_close(described, 'sample_decoded', decoded, arrays['out/sample_decoded_nhwc'])
  peers.assert_close(described, 'sample_image_nhwc', np.clip(decoded / 2 + 0.5, 0.0, 1.0), image)
  off = np.asarray(stored.space.decode(x), np.float64) - 255.0 * image
  assert np.abs(off).max() < 0.51


@pytest.mark.slow
def test_the_model_is_the_unet_alone_given_the_text(case):
  described, arrays, loaded = case
  z, t = arrays['in/latent_in_nhwc'], (arrays['in/timesteps'] + 1) / 1000
  logsnr = loaded.stored.schedule(jnp.asarray(t, jnp.float32))
  found = loaded.denoise(z, logsnr, {'text': arrays['in/context']})
  expected = arrays['out/unet_nhwc']
  alpha, sigma = (np.sqrt(jax.nn.sigmoid(s * logsnr))[:, None, None, None] for s in (1.0, -1.0))
  output = found.eps if loaded.stored.denoise.output == 'eps' else alpha * found.eps - sigma * found.x
  peers.assert_close(described, 'unet', output, expected)
  with pytest.raises(ValueError, match=r"this network needs cond\['text'\]"):
    loaded.denoise(z, logsnr)


@pytest.mark.slow
def test_prompts_are_drawn_in_turn_and_guided(case):
  _, _, loaded = case
  two = loaded.sample(prompts=['a red circle', 'blue'], seed=3, guidance=2.0, steps=2)
  height, width = loaded.stored.image_shape[:2]
  assert two.shape == (2, height, width, 3) and two.dtype == np.uint8
  again = loaded.sample(3, prompts=['a red circle', 'blue'], seed=3, guidance=2.0, steps=2)
  np.testing.assert_array_equal(again[:2], two)
  other = loaded.sample(prompts=['a red circle', 'a red circle'], seed=3, guidance=2.0, steps=2)
  np.testing.assert_array_equal(other[0], two[0])
  assert (other[1] != two[1]).any()


def test_a_text_model_without_prompts_is_one_line(case):
  _, _, loaded = case
  with pytest.raises(UserError, match='draws what a text says'):
    loaded.sample(2)
  drawer = loaded.drawer(samplers.DDIM(), False, 2)
  with pytest.raises(UserError, match='draws what a text says'):
    drawer.draw(loaded.stored.params, times.uniform(1), 2, 0)


def test_where_texts_cannot_be_given_one_line_says_so_before_anything_is_drawn(
  case, tmp_path, monkeypatch
):
  stored = case[2].stored
  model.write(tmp_path / 'model', stored)
  with pytest.raises(UserError, match=r'draws what a text says; name evaluation\.prompts'):
    elsewhere.measure_model(tiny.config(), case[2], tmp_path / 'model', tmp_path / 'x.json')
  monkeypatch.setattr(workdir, 'find_origin', lambda path: workdir.origin_of(stored))
  for planned in (workdir.plan_for, workdir.described_plan):
    with pytest.raises(UserError, match=r'dataset\.name=digits: .* has no captions'):
      planned(tmp_path / 'run', tiny.config(methods=()))


def test_large_images_are_drawn_a_few_at_a_time(case):
  stored = case[2].stored
  large = model.dataclasses.replace(stored, image_shape=(512, 512, 3))
  assert batch_size(stored, 256, 1000) == 256
  assert batch_size(large, 256, 1000) == 4 and batch_size(large, 256, 3) == 3


def test_a_folder_that_misses_a_network_or_holds_another_is_damaged(case, tmp_path):
  folder = tmp_path / 'model'
  model.write(folder, case[2].stored)
  again = diffusion_distillation.load(folder)
  assert (again.stored.space, again.stored.text) == (case[2].stored.space, case[2].stored.text)
  path = folder / 'vae.safetensors'
  state = safetensors.numpy.load_file(path)
  state['decoder/conv_out/bias'] += 1.0
  safetensors.numpy.save_file(state, path)
  with pytest.raises(DamagedError, match=r'vae\.safetensors does not match'):
    again.stored.space.decode(jnp.zeros((1, 8, 8, 4)))
  state['decoder/conv_out/bias'] = np.zeros(5, np.float32)
  safetensors.numpy.save_file(state, path)
  described = json.loads((folder / 'model.json').read_text())
  made = digest(traverse_util.unflatten_dict(state, sep='/'))
  described['space']['arguments']['digest'] = made
  (folder / 'model.json').write_text(json.dumps(described))
  with pytest.raises(DamagedError, match=r"weight 'decoder/conv_out/bias' .* has another shape"):
    diffusion_distillation.load(folder).stored.space.decode(jnp.zeros((1, 8, 8, 4)))
  path.unlink()
  with pytest.raises(DamagedError, match=r'vae\.safetensors is missing'):
    diffusion_distillation.load(folder)


def test_latents_are_not_mirrored_and_need_an_imported_autoencoder(case):
  origin = workdir.origin_of(case[2].stored)
  with pytest.raises(UserError, match=r'dataset\.random_flip=True: the latents of a mirrored image'):
    mirrored = config(methods=('dmd',), **{'dataset.random_flip': True})
    plan.plan(mirrored, origin.image_shape, 0, origin)
  with pytest.raises(UserError, match=r'model\.space=latents is only for imported models'):
    tiny.plan(model__space='latents')


@pytest.fixture(scope='module')
def pipeline(tmp_path_factory):
  return write(tmp_path_factory.mktemp('whole') / 'pipeline', 'sd15_tiny')


UNET, VAE, TEXT = 'unet/config.json', 'vae/config.json', 'text_encoder/config.json'
SCHEDULER, INDEX = 'scheduler/scheduler_config.json', 'model_index.json'
REFUSED = {
  'xl': (INDEX, {'text_encoder_2': ['transformers', 'CLIPTextModelWithProjection']}, 'text_encoder_2'),
  'pixels': (INDEX, {'vae': [None, None]}, 'no vae'),
  'unet class': (UNET, {'_class_name': 'UNet2DModel'}, "_class_name='UNet2DModel'"),
  'inpainting': (UNET, {'in_channels': 9}, 'in_channels=9'),
  'lcm': (UNET, {'time_cond_proj_dim': 256}, 'time_cond_proj_dim=256'),
  'added': (UNET, {'addition_embed_type': 'text_time'}, "addition_embed_type='text_time'"),
  'new': (UNET, {'rotary': 3}, "'rotary'"),
  'heads': (UNET, {'attention_head_dim': 7}, 'attention_head_dim=7'),
  'list of heads': (UNET, {'attention_head_dim': [8, 8, 8]}, 'attention_head_dim has 3 entries'),
  'no heads': (UNET, {'attention_head_dim': '8'}, 'attention_head_dim'),
  'block': (UNET, {'down_block_types': ['AttnDownBlock2D', 'DownBlock2D']}, 'AttnDownBlock2D'),
  'middle': (UNET, {'mid_block_type': 'UNetMidBlock2D'}, 'mid_block_type'),
  'deep': (UNET, {'layers_per_block': 99_999}, 'asks for more than the weights have'),
  'wide': (UNET, {'time_embedding_dim': 99_999}, 'asks for more than the weights have'),
  'narrow': (UNET, {'time_embedding_dim': 64}, 'which config.json does not describe'),
  'width': (UNET, {'cross_attention_dim': 16}, 'cross_attention_dim=16'),
  'other latents': (VAE, {'latent_channels': 8}, 'latent_channels=8'),
  'vae class': (VAE, {'_class_name': 'AutoencoderTiny'}, "_class_name='AutoencoderTiny'"),
  'vae means': (VAE, {'latents_mean': [0.0] * 4}, 'latents_mean'),
  'vae block': (VAE, {'up_block_types': ['AttnUpDecoderBlock2D', 'UpDecoderBlock2D']}, 'AttnUpDecoder'),
  'vae scale': (VAE, {'scaling_factor': 0}, 'scaling_factor=0'),
  'vae levels': (VAE, {'block_out_channels': [32]}, 'down_block_types has 2 entries'),
  'vae groups': (VAE, {'norm_num_groups': 7}, 'norm_num_groups=7'),
  'text class': (TEXT, {'architectures': ['CLIPModel']}, "architectures=['CLIPModel']"),
  'text type': (TEXT, {'model_type': 't5'}, "model_type='t5'"),
  'text act': (TEXT, {'hidden_act': 'relu'}, "hidden_act='relu'"),
  'text heads': (TEXT, {'num_attention_heads': 5}, 'num_attention_heads=5'),
  'text deep': (TEXT, {'num_hidden_layers': 10_000}, 'asks for more than the weights have'),
  'prediction': (SCHEDULER, {'prediction_type': 'flow'}, "prediction_type='flow'"),
  'betas': (SCHEDULER, {'beta_schedule': 'sigmoid'}, "beta_schedule='sigmoid'"),
}


@pytest.mark.parametrize('what', REFUSED)
def test_what_is_not_supported_is_named_in_one_line(what, pipeline, tmp_path):
  name, values, words = REFUSED[what]
  folder = pathlib.Path(shutil.copytree(pipeline, tmp_path / 'pipeline'))
  path = folder / name
  path.write_text(json.dumps(json.loads(path.read_text()) | values))
  assert words in refused(config(), folder, tmp_path / 'run', 'stable_diffusion')


SPOILED = {
  'no unet': (UNET, None, 'config.json'),
  'no index': (INDEX, None, INDEX),
  'no scheduler': (SCHEDULER, None, SCHEDULER),
  'not JSON': (VAE, b'{', 'is not JSON'),
  'truncated': ('vae/diffusion_pytorch_model.safetensors', b'\xff' * 20, 'damaged or not a safetensors'),
  'no weights': ('text_encoder/model.safetensors', None, 'there is no model.safetensors'),
}


@pytest.mark.parametrize('what', SPOILED)
def test_files_that_are_missing_or_damaged_are_refused_in_one_line(what, pipeline, tmp_path):
  name, content, words = SPOILED[what]
  folder = pathlib.Path(shutil.copytree(pipeline, tmp_path / 'pipeline'))
  (folder / name).unlink()
  if content is not None:
    (folder / name).write_bytes(content)
  assert words in refused(config(), folder, tmp_path / 'run', 'stable_diffusion')


@pytest.mark.parametrize(
  ('part', 'pickled', 'name'),
  [
    ('unet', 'diffusion_pytorch_model.bin', 'diffusion_pytorch_model.safetensors'),
    ('text_encoder', 'pytorch_model.bin', 'model.safetensors'),
  ],
)
def test_a_pickle_is_refused_with_the_command_that_converts_it(part, pickled, name, pipeline, tmp_path):
  folder = pathlib.Path(shutil.copytree(pipeline, tmp_path / 'pipeline'))
  (folder / part / peers.STABLE_DIFFUSION[part]).rename(folder / part / pickled)
  message = refused(config(), folder, tmp_path / 'run', 'stable_diffusion')
  assert f"torch.load('{pickled}'" in message and f"weights_only=True), '{name}')" in message


def test_the_schedule_is_the_pipeline_s(tmp_path, caplog):
  def read(**settings):
    path = tmp_path / 'scheduler_config.json'
    path.write_text(json.dumps({'beta_start': 0.00085, 'beta_end': 0.012} | settings))
    return stable_diffusion._schedule(path)

  caplog.clear()
  schedule, output, grid = read(_class_name='PNDMScheduler', beta_schedule='scaled_linear')
  assert (schedule.steps_offset, schedule.betas, output) == (1, 'scaled_linear', 'eps')
  assert grid == 'leading_to_first'
  assert read(_class_name='DDIMScheduler', prediction_type='v_prediction')[1:] == ('v', 'leading')
  assert read(_class_name='DDIMScheduler', set_alpha_to_one=False)[2] == 'leading_to_first'
  assert not caplog.text
  assert read(timestep_spacing='trailing', rescale_betas_zero_snr=True)[2] == 'uniform'
  for wrong in ({'timestep_spacing': 'other'}, {'set_alpha_to_one': 'no'}):
    with pytest.raises(UserError, match=f'{next(iter(wrong))}=.* is not supported; supported: '):
      read(**wrong)


def test_more_steps_than_timesteps_are_refused_before_anything_is_written(pipeline, tmp_path):
  many = config(**{'distill.start_steps': 1001})
  with pytest.raises(UserError, match=r'^distill\.start_steps=1001: 1001 steps do not fit'):
    importing.from_stable_diffusion(many, config(), pipeline, tmp_path / 'run')
  assert not (tmp_path / 'run').exists()


def test_a_model_without_a_text_encoder_takes_embeddings_only(pipeline):
  stored = stable_diffusion.read(pipeline, 5)
  with pytest.raises(UserError, match='no text encoder'):
    LoadedModel(model.dataclasses.replace(stored, text=None)).sample(prompts=['a'])


@pytest.mark.slow
def test_a_pipeline_is_imported_and_sampled_by_its_commands(pipeline, tmp_path):
  flags = ('--config=configs/stable_diffusion.py', f'--workdir={tmp_path / "run"}')
  source = ('--mode=import', '--source=stable_diffusion', f'--checkpoint={pipeline}')
  code, out, err = tiny.run_cli(*flags, *source)
  assert code == 0 and 'base: imported, for 50 steps' in out, err
  sample = ('--mode=sample', flags[1], '--steps=2', '--guidance=6.5', f'--out={tmp_path / "x.npz"}')
  code, out, err = tiny.run_cli(*sample, '--prompts=a red circle, large', '--prompts=blue')
  assert code == 0 and '2 images of base in 2 ddim steps, 4 network calls each' in out, err
  images = np.load(tmp_path / 'x.npz')['images']
  loaded = diffusion_distillation.load(tmp_path / 'run')
  expected = loaded.sample(prompts=['a red circle, large', 'blue'], steps=2, guidance=6.5)
  np.testing.assert_array_equal(images, expected)
  code, _, err = tiny.run_cli(*sample)
  assert code == 2 and '--prompts: this model draws what a text says' in err
  code, _, err = tiny.run_cli('--mode=export', flags[1], f'--out={tmp_path / "exported"}')
  assert code == 2 and "it takes 'text' as an input, which only --format=diffusers supports" in err
  code, _, err = tiny.run_cli(*flags, "--config.methods=('dmd',)")
  assert code == 2 and 'stage dmd is trained on texts, and dataset.name=none has none' in err
