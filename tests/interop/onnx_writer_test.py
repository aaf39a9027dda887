"""The format `onnx`: its sampler is the model's; what it cannot be is refused. The converter is tried where it is installed."""

import dataclasses
import importlib.util
import json
import re
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.diffusion import samplers, times
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import sampling
from diffusion_distillation.evaluation.loading import LoadedModel
from diffusion_distillation.interop import exporting, onnx_writer
from diffusion_distillation.networks import NETWORKS
from diffusion_distillation.stages import model
from tests.networks.denoiser_test import Small
from tests.stages.model_test import stored

STUDENT = stored(Small(1, num_classes=3), sampler='ddim', num_steps=3, times='uniform')


@pytest.fixture(autouse=True)
def _small_is_a_network(monkeypatch):
  monkeypatch.setitem(NETWORKS, 'small', Small)


def test_the_unrolled_sampler_is_the_model_s():
  drawer = LoadedModel(STUDENT).drawer(samplers.DDIM(), True, 6)
  grid = times.make_grid('uniform', 3, STUDENT.schedule)
  z, keys = sampling.noise(drawer, np.int32(0), np.arange(6, dtype=np.int32))
  label = jnp.arange(6, dtype=jnp.int32) % 3
  args = (STUDENT.params, jnp.asarray(grid), z, keys, {'label': label})
  found = onnx_writer._sampler(drawer, STUDENT.params, grid)(z, label)
  np.testing.assert_allclose(found, sampling.from_noise(drawer, *args), atol=2e-6)


@pytest.mark.parametrize(
  ('installed', 'sampler', 'message'),
  [
    (True, 'ancestral', '--format=onnx: the sampler Ancestral adds noise'),
    (False, 'ddim', 'run `pip install jax2onnx onnxruntime`'),
  ],
)
def test_what_onnx_does_not_have_is_named_and_nothing_is_written(
  installed, sampler, message, tmp_path, monkeypatch
):
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: installed or None)
  model.write(tmp_path / 'model', dataclasses.replace(STUDENT, sampler=sampler))
  with pytest.raises(UserError, match=re.escape(message)):
    exporting.export(tmp_path / 'model', None, tmp_path / 'out', 'onnx')
  assert [path.name for path in tmp_path.iterdir()] == ['model']


@pytest.mark.parametrize(
  ('error', 'told'),
  [
    (NotImplementedError('no rule\nfor sort'), 'cannot convert this network (no rule for sort)'),
    (KeyError('axis'), "cannot convert this network (KeyError: 'axis')"),
  ],
)
def test_an_error_of_the_converter_is_one_line_and_nothing_is_written(
  error, told, tmp_path, monkeypatch
):
  def to_onnx(*args, **kwargs):
    raise error

  converter = types.ModuleType('jax2onnx')
  converter.to_onnx = to_onnx
  monkeypatch.setitem(sys.modules, 'jax2onnx', converter)
  monkeypatch.setattr(importlib.util, 'find_spec', lambda name: True)
  model.write(tmp_path / 'model', STUDENT)
  with pytest.raises(UserError, match=re.escape(told)) as caught:
    exporting.export(tmp_path / 'model', None, tmp_path / 'out', 'onnx')
  assert '\n' not in str(caught.value)
  assert [path.name for path in tmp_path.iterdir()] == ['model']


@pytest.mark.slow
def test_the_graph_draws_the_model_s_images(tmp_path):
  for name in ('jax2onnx', 'onnxruntime'):
    pytest.importorskip(name)
  model.write(tmp_path / 'model', STUDENT)
  exporting.export(tmp_path / 'model', None, tmp_path / 'out', 'onnx')  # which compares them
  files = {path.name for path in (tmp_path / 'out').iterdir()}
  assert files == {'README.md', 'model.json', 'samples.png', 'sampler.onnx'}
  usage = onnx_writer.usage(json.loads((tmp_path / 'out' / 'model.json').read_text()))
  assert usage in (tmp_path / 'out' / 'README.md').read_text()
