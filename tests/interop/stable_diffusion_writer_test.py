"""Models of texts that are exported for diffusers are imported again without the change of a bit."""

import dataclasses
import json

import numpy as np
import pytest
import safetensors.numpy

import diffusion_distillation
from diffusion_distillation.diffusion import times
from diffusion_distillation.errors import StorageError, UserError
from diffusion_distillation.interop import (
  exporting,
  importing,
  stable_diffusion,
  stable_diffusion_writer,
)
from diffusion_distillation.networks.spaces import Pixels
from diffusion_distillation.stages import model
from tests.interop.stable_diffusion_import_test import CASES, config, write

STUDENT = {'stage': 'dmd', 'method': 'dmd', 'updates': 3}
STUDENT |= {'parent': {'stage': 'base', 'weights': 'ema', 'digest': 'abcdef' * 10}}


@pytest.fixture(scope='module', params=CASES)
def case(request, tmp_path_factory):
  """(the imported folder, a workdir with its base and a student in one step, the model of the base)."""
  pipeline = write(tmp_path_factory.mktemp('peer') / 'pipeline', request.param)
  run = tmp_path_factory.mktemp('run') / 'run'
  importing.from_stable_diffusion(config(), config(), pipeline, run)
  base = diffusion_distillation.load(run / 'base').stored
  student = dataclasses.replace(base, num_steps=1, times='uniform', provenance=STUDENT)
  model.write(run / 'dmd' / 'model', student)
  return pipeline, run, base


def read_json(path):
  return json.loads(path.read_text())


@pytest.mark.slow
def test_an_exported_base_is_imported_again_bit_by_bit(case, tmp_path):
  pipeline, run, base = case
  line = exporting.export(run, 'base', tmp_path / 'out', 'diffusers')
  assert line.endswith(
    "exported as diffusers, 5 network calls per image; its weights, timesteps and tokens are the model's"
  )
  found = stable_diffusion.read(tmp_path / 'out', 5)
  assert model.describe(found) | {'provenance': 0} == model.describe(base) | {'provenance': 0}
  assert found.text == base.text and found.space == base.space
  np.testing.assert_array_equal(found.text.tokens(['a red circle']), base.text.tokens(['a red circle']))
  for part in ('unet', 'vae', 'text_encoder'):
    theirs, ours = (read_json(folder / part / 'config.json') for folder in (pipeline, tmp_path / 'out'))
    own = ('sample_size', 'bos_token_id', 'pad_token_id')
    same = {key: value for key, value in ours.items() if key in theirs and key not in own}
    assert same == {key: theirs[key] for key in same} and len(same) > 8
  assert ours['bos_token_id'] == base.text.tokens([''])[0, 0]  # of the tokenizer here, not of the case
  settings = read_json(tmp_path / 'out' / 'scheduler' / 'scheduler_config.json')
  assert settings['timestep_spacing'] == 'leading' and settings['steps_offset'] == 1
  assert settings['set_alpha_to_one'] is (base.times == 'leading')


@pytest.mark.slow
def test_a_student_in_one_step_starts_from_the_last_timestep_and_ends_at_clean_data(case, tmp_path):
  _, run, base = case
  exporting.export(run, 'dmd', tmp_path / 'out', 'diffusers')
  settings = read_json(tmp_path / 'out' / 'scheduler' / 'scheduler_config.json')
  assert settings['_class_name'] == 'DDIMScheduler' and settings['timestep_spacing'] == 'trailing'
  assert settings['set_alpha_to_one'] is True and settings['clip_sample'] is False
  found = stable_diffusion.read(tmp_path / 'out', 1)
  assert (found.times, model.digest(found.params)) == ('uniform', model.digest(base.params))
  card = (tmp_path / 'out' / 'README.md').read_text()
  assert 'num_inference_steps=1, guidance_scale=0)' in card and 'pipeline_tag: text-to-image' in card
  assert 'samples.png' not in card and not (tmp_path / 'out' / 'samples.png').exists()
  exporting.export(run, 'base', tmp_path / 'base', 'diffusers')
  assert 'num_inference_steps=5, guidance_scale=7.5)' in (tmp_path / 'base' / 'README.md').read_text()


def test_students_that_add_noise_between_steps_have_the_scheduler_of_latent_consistency(case):
  _, _, base = case
  several = dataclasses.replace(
    base, num_steps=4, times='uniform', sampler='multistep_consistency', provenance=STUDENT
  )
  settings = stable_diffusion_writer._scheduler(several)
  assert settings['_class_name'] == 'LCMScheduler' and settings['original_inference_steps'] == 4
  one = stable_diffusion_writer._scheduler(dataclasses.replace(several, num_steps=1))
  assert one['_class_name'] == 'DDIMScheduler'
  with pytest.raises(UserError, match='LCMScheduler cannot represent a grid that is not uniform'):
    stable_diffusion_writer._scheduler(dataclasses.replace(several, times='leading'))


def test_a_student_that_takes_the_weight_is_refused_before_anything_is_written(case):
  base = case[2]
  network = base.denoise.network.clone(guidance=(0.0, 4.0))
  student = dataclasses.replace(base, denoise=dataclasses.replace(base.denoise, network=network))
  (problem,) = stable_diffusion_writer._problems(student)
  assert 'takes the weight of guidance as an input' in problem


def test_the_tokenizer_states_its_number_of_tokens(case):
  text = case[2].text
  assert stable_diffusion_writer._tokenizer(text)['vocab.json'] == text.tokenizer['vocab.json']
  given = {'tokenizer_config.json': b'{"pad_token": "!", "model_max_length": 5}'}
  for files in ({}, given):
    found = stable_diffusion_writer._tokenizer(dataclasses.replace(text, tokenizer=files))
    settings = json.loads(found['tokenizer_config.json'])
    assert settings['model_max_length'] == text.network.max_position_embeddings
    assert settings.get('pad_token') == ('!' if files else None)


def test_published_names_are_written(case, tmp_path):
  """Versions 4 and 5 of transformers read the text encoder's names with the prefix."""
  stable_diffusion_writer.write(case[2], tmp_path)
  state = safetensors.numpy.load_file(tmp_path / 'text_encoder' / 'model.safetensors')
  assert all(name.startswith('text_model.') for name in state) and len(state) > 20


REFUSED = {
  'grid': ({'times': 'quadratic', 'num_steps': 4}, 'DDIMScheduler cannot represent its 4 steps'),
  'steps': ({'times': 'uniform', 'num_steps': 3}, 'DDIMScheduler cannot represent its 3 steps'),
  'sampler': ({'sampler': 'heun'}, 'the sampler heun is neither DDIM nor multistep_consistency'),
  'text': ({'text': None}, 'the model has no text encoder with a tokenizer'),
  'space': ({'space': Pixels()}, 'the space has no AutoencoderKL'),
}


@pytest.mark.parametrize('what', REFUSED)
def test_what_the_pipeline_lacks_is_refused_in_one_line(case, what, tmp_path):
  changes, words = REFUSED[what]
  with pytest.raises(UserError) as caught:
    stable_diffusion_writer.write(dataclasses.replace(case[2], **changes), tmp_path)
  assert str(caught.value).startswith('--format=diffusers: ') and words in str(caught.value)
  assert not list(tmp_path.iterdir())


def test_other_formats_do_not_take_texts_and_classes_beside_texts_are_refused(case, tmp_path):
  _, run, base = case
  for name in ('jax', 'onnx'):
    with pytest.raises(UserError, match=r"takes 'text' as an input, which only --format=diffusers sup"):
      exporting.export(run, 'base', tmp_path / 'out', name)
  network = base.denoise.network.clone(num_classes=3)
  denoise = dataclasses.replace(base.denoise, network=network)
  with pytest.raises(UserError, match='the network takes classes beside texts'):
    stable_diffusion_writer.write(dataclasses.replace(base, denoise=denoise), tmp_path)
  assert not list(tmp_path.iterdir())


def test_files_that_differ_from_the_model_are_not_kept(case, tmp_path, monkeypatch):
  _, run, _ = case
  monkeypatch.setattr(
    stable_diffusion_writer.keys,
    'UNET_FIELDS',
    {'cross_attention_dim': 0, 'block_out_channels': 0}
    | {key: 0 for key in stable_diffusion_writer.keys.UNET_FIELDS if key != 'freq_shift'},
  )
  base = diffusion_distillation.load(run / 'base').stored
  other = dataclasses.replace(
    base, denoise=dataclasses.replace(base.denoise, network=base.denoise.network.clone(freq_shift=1))
  )
  model.write(tmp_path / 'run' / 'base' / 'model', other)
  with pytest.raises(StorageError, match=r'differ from the model \(config of the unet\); nothing was'):
    exporting.export(tmp_path / 'run', 'base', tmp_path / 'out', 'diffusers')
  assert not (tmp_path / 'out').exists()


def test_other_timesteps_are_noticed(case, tmp_path):
  _, _, base = case
  stable_diffusion_writer.write(base, tmp_path)
  found = stable_diffusion.read(tmp_path, 5)
  other = dataclasses.replace(found, times='uniform')
  with pytest.raises(StorageError, match=r'\(timesteps\)'):
    stable_diffusion_writer._compare(base, other)
  assert times.make_grid(found.times, 5, found.schedule)[0] == (0.0 if base.times == 'leading' else 1e-3)
