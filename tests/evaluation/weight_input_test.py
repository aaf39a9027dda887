"""Models that take the weight of guidance as an input: images, calls, rows and pairs by weight."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.diffusion import samplers, times
from diffusion_distillation.diffusion.guidance import Guidance
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import measure, rows, sampling
from diffusion_distillation.evaluation.loading import LoadedModel
from diffusion_distillation.evaluation.sampling import Drawer
from diffusion_distillation.networks.conditioning import Weights
from diffusion_distillation.run import forecast, pairs
from diffusion_distillation.stages import model as models
from tests import tiny
from tests.evaluation.guided_model_test import sample  # noqa: F401, a fixture
from tests.run.pairs_test import ONE, everything
from tests.stages.model_test import UNET, stored

NETWORK = dataclasses.replace(UNET, num_classes=3, guidance=(0.0, 4.0))
TOLD = stored(NETWORK, num_steps=3, provenance={'stage': 'guided'})
DRAWER = LoadedModel(TOLD).drawer(samplers.DDIM(), TOLD.clip_x, 5)


def by_hand(weight, seed=7):
  """Three steps of DDIM whose every call is told the weight."""
  index = np.arange(5, dtype=np.int32)
  z, keys = sampling.noise(DRAWER, np.int32(seed), index)
  cond = {'label': jnp.asarray(index % 3), 'guidance': jnp.full(5, weight, jnp.float32)}

  def denoise(z, logsnr):
    x, eps = TOLD.denoise(TOLD.params, z, logsnr, cond)
    return samplers.clipped(lambda *_: (x, eps), TOLD.space.clip, True)(z, logsnr)

  args = (samplers.DDIM(), denoise, TOLD.schedule, times.uniform(3), z, keys)
  return np.asarray(TOLD.space.decode(samplers.sample(*args)))


def assert_close(images, expected):
  assert np.abs(images.astype(int) - expected).max() <= 1


def test_a_model_with_the_input_is_told_the_weight_and_called_once():
  model = LoadedModel(TOLD)
  drawn = {weight: model.sample(5, seed=7, guidance=weight) for weight in (None, 0.0, 2.0, 4.0)}
  for weight, images in drawn.items():
    assert_close(images, by_hand(weight or 0.0))
  np.testing.assert_array_equal(drawn[None], drawn[0.0])
  assert len({images.tobytes() for images in drawn.values()}) == 3
  guided = [dataclasses.replace(DRAWER, guidance=Guidance(weight)) for weight in (1.0, 2.0)]
  assert guided[0].program == guided[1].program and guided[0] != guided[1]
  assert guided[1].calls(times.uniform(3)) == 3
  with pytest.raises(UserError, match=r'^guidance=2: .* leave out the interval'):
    model.sample(5, guidance=2.0, guidance_interval=(0.1, 1.0))


def test_a_range_that_does_not_begin_at_0_has_its_smallest_weight_by_default(caplog):
  network = dataclasses.replace(NETWORK, guidance=(2.0, 4.0))
  model = LoadedModel(
    dataclasses.replace(TOLD, denoise=dataclasses.replace(TOLD.denoise, network=network))
  )
  np.testing.assert_array_equal(model.sample(5, seed=7), model.sample(5, seed=7, guidance=2.0))
  assert not caplog.records
  model.sample(5, guidance=1.0)
  assert 'was trained with weights from 2 to 4' in caplog.records[-1].getMessage()
  with pytest.raises(UserError, match=r'^guidance=0: .* from 2 to 4 and cannot draw without guidance'):
    model.sample(5, guidance=0.0)


def test_the_command_line_tells_the_weight_counts_one_call_and_warns_outside(sample, caplog):  # noqa: F811
  code, line, images = sample(model=TOLD, guidance=2.0)
  assert code == 0 and ' in 3 ddim steps, 3 network calls each' in line
  assert_close(images, by_hand(2.0))
  assert not caplog.records
  code, line, images = sample(model=TOLD, guidance=9.0)
  assert code == 0 and len(images) == 5
  assert '--guidance=9: this model was trained with weights from 0 to 4' in caplog.text
  code, text, images = sample(model=TOLD, guidance=2.0, guidance_interval=['1', '2'])
  assert code == 2 and images is None and 'leave out the interval' in text and text.count('\n') == 1
  code, text, images = sample(model=stored(dataclasses.replace(UNET, num_classes=3)), guidance=2.0)
  assert code == 2 and "distill a student that takes it, with methods=('guided','progressive')" in text


def test_model_json_says_that_the_weight_is_an_input_and_its_range(tmp_path):
  models.write(tmp_path / 'model', TOLD)
  found = json.loads((tmp_path / 'model' / 'model.json').read_text())
  assert found['conditioning'] == {'label': {'count': 3}, 'guidance': {'low': 0.0, 'high': 4.0}}
  read = models.read(tmp_path / 'model').denoise
  assert read == TOLD.denoise and read.conditioning['guidance'] == Weights(0.0, 4.0)


OVERRIDES = {
  'methods': ('guided', 'progressive'),
  'model__conditional': True,
  'dataset__label_dropout': 0.1,
  'evaluation__guidance': (0.0, 1.5, 9.0),
  'evaluation__guidance_interval': (0.0, 1.0),
  'evaluation__samplers': ('ddim',),
}


def test_students_with_the_input_have_a_row_for_each_weight_in_their_range():
  config, stages = tiny.config(**OVERRIDES), tiny.plan(**OVERRIDES)[0]
  found = {}
  calls = 0
  for place, _, sampler, steps in rows.rows(stages, config):
    for guidance in rows.guidances(config, place, stages[place]):
      model = types.SimpleNamespace(stage=stages[place], weights='ema', digest='d')
      row = measure.describe(config, measure.Setting(model, sampler, steps, 3, guidance))
      found.setdefault(row['stage'], []).append(
        (row['num_steps'], row['guidance'], row['guidance_interval'], row['nfe'])
      )
      calls += row['nfe']
  assert found.pop('base')[:3] == [(4, 0.0, None, 4), (4, 1.5, [0.0, 1.0], 6), (4, 9.0, [0.0, 1.0], 6)]
  assert found == {
    'guided': [(4, 0.0, None, 4), (4, 1.5, None, 4)],
    'progressive_0002': [(2, 0.0, None, 2), (2, 1.5, None, 2)],
    'progressive_0001': [(1, 0.0, None, 1), (1, 1.5, None, 1)],
  }
  assert forecast.evaluation_calls(stages, config) == 48 * calls
  above = tiny.plan(**OVERRIDES | {'guided__weights': (2.0, 3.0)})[0][1]
  assert rows.guidances(config, 1, above) == (Guidance(2.0),)


def test_pairs_have_a_weight_each_and_are_drawn_with_it(tmp_path):
  stage = types.SimpleNamespace(
    name='guided', denoise=TOLD.denoise, schedule=TOLD.schedule, space=TOLD.space, image_shape=(8, 8, 1)
  )
  teacher = types.SimpleNamespace(stage=stage, weights='ema', digest='d', params=TOLD.params)
  found = everything(pairs.ensure(tmp_path, ONE, teacher))
  cond = found['cond']
  np.testing.assert_array_equal(cond['guidance'], Weights(0.0, 4.0).spread(np.arange(ONE.count)))
  index = 3
  told = {key: jnp.asarray(values[index : index + 1]) for key, values in cond.items()}
  drawer = Drawer(TOLD.denoise, ONE.sampler, TOLD.schedule, TOLD.space, (8, 8, 1), 1, clip_x=ONE.clip_x)
  keys = jax.random.split(jax.random.key(0), 1)
  grid = jnp.asarray(times.uniform(ONE.num_steps))
  z = jnp.asarray(found['noise'][index : index + 1])
  image = sampling.from_noise(drawer, TOLD.params, grid, z, keys, told)
  np.testing.assert_allclose(found['image'][index], image[0], atol=1e-4)
