"""The format `diffusers`: what is written is a pipeline that is read as the same model; what cannot be written is refused."""

import dataclasses
import json
import pathlib
import re

import numpy as np
import pytest

from diffusion_distillation.diffusion.discrete import Discrete
from diffusion_distillation.errors import UserError
from diffusion_distillation.interop import diffusers, exporting
from diffusion_distillation.stages import model
from tests.interop import diffusers_test
from tests.networks.denoiser_test import Small
from tests.stages.model_test import stored


@pytest.fixture(scope='module')
def student(tmp_path_factory):
  """A model of 4 steps with random weights, as it is read from a pipeline."""
  folder, _ = diffusers_test.small_pipeline(tmp_path_factory.mktemp('theirs') / 'pipeline')
  return diffusers.read(folder, 4)


def export(student, tmp_path, **changes):
  model.write(tmp_path / 'model', dataclasses.replace(student, digest=None, **changes))
  exporting.export(tmp_path / 'model', None, tmp_path / 'out', 'diffusers')
  return tmp_path / 'out'


def read_json(path: pathlib.Path):
  return json.loads(path.read_text())


@pytest.mark.slow
def test_a_pipeline_folder_is_written_and_read_as_the_same_model(student, tmp_path):
  out = export(student, tmp_path)
  found = diffusers.read(out, 4)
  assert found.denoise == student.denoise and found.schedule == student.schedule
  assert found.clip_x == student.clip_x and found.image_shape == student.image_shape
  ours, theirs = diffusers.state_dict(student.params), diffusers.state_dict(found.params)
  assert ours.keys() == theirs.keys()
  for name, value in ours.items():
    np.testing.assert_array_equal(value, theirs[name], err_msg=name)
  index = read_json(out / 'model_index.json')
  assert index['_class_name'] == 'DDIMPipeline' and index['unet'] == ['diffusers', 'UNet2DModel']
  assert index['scheduler'] == [
    'diffusers',
    read_json(out / 'scheduler' / 'scheduler_config.json')['_class_name'],
  ]
  card = (out / 'README.md').read_text()
  assert 'library_name: diffusers' in card
  assert 'num_inference_steps=4, use_clipped_model_output=True' in card


@pytest.mark.slow
@pytest.mark.parametrize(
  ('grid', 'sampler', 'output', 'expected'),
  [
    ('uniform', 'ddim', 'v', ('trailing', 'v_prediction')),
    ('leading', 'ddim_keep_eps', 'eps', ('leading', 'epsilon')),
    ('uniform', 'ddim', 'x', ('trailing', 'sample')),
  ],
)
def test_the_scheduler_has_the_timesteps_and_the_output_of_the_model(
  grid, sampler, output, expected, student, tmp_path
):
  denoise = dataclasses.replace(student.denoise, output=output)
  out = export(student, tmp_path, denoise=denoise, times=grid, sampler=sampler, clip_x=False)
  found = read_json(out / 'scheduler' / 'scheduler_config.json')
  assert (found['timestep_spacing'], found['prediction_type']) == expected
  assert found['clip_sample'] is False and found['set_alpha_to_one'] is True
  assert 'use_clipped_model_output=False' in (out / 'README.md').read_text()


REFUSED = {
  'network': (
    {'denoise': stored(Small(1)).denoise, 'params': stored(Small(1)).params},
    'the network Small is not a UNet2DModel',
  ),
  'sampler': ({'sampler': 'ancestral'}, 'the sampler Ancestral is not DDIM'),
  'steps': (
    {'num_steps': 3},
    'DDIMScheduler cannot represent its 3 steps: their number must divide',
  ),
  'grid': ({'times': 'quadratic'}, 'DDIMScheduler cannot represent its 4 steps'),
  'end': (
    {'times': 'leading_to_first', 'schedule': Discrete(steps_offset=1)},
    'DDIMScheduler cannot represent its 4 steps',
  ),
}


@pytest.mark.parametrize('what', REFUSED)
def test_what_diffusers_does_not_have_is_named_and_nothing_is_written(
  what, student, tmp_path, monkeypatch
):
  changes, message = REFUSED[what]
  monkeypatch.setitem(model.NETWORKS, 'small', Small)
  with pytest.raises(UserError, match=re.escape(f'--format=diffusers: {message}')):
    export(student, tmp_path, **changes)
  assert [path.name for path in tmp_path.iterdir()] == ['model']
