"""The network calls of each row are those that were made."""

import json

import jax
import numpy as np
import pytest

from diffusion_distillation.diffusion import samplers, schedules, times
from diffusion_distillation.evaluation import measure, sampling
from diffusion_distillation.stages.provenance import Model
from tests import tiny
from tests.exact import Gaussian


def calls_of(sampler, grid):
  """Times that a denoiser is called by a sampler on a grid, by counting."""
  calls = []

  def denoise(z, logsnr):
    calls.append(logsnr)
    return Gaussian(0.1, 0.3)(z, logsnr)

  with jax.disable_jit():
    z, keys = np.zeros((1, 2), np.float32), jax.random.split(jax.random.key(0), 1)
    samplers.sample(sampler, denoise, schedules.Cosine(), grid, z, keys)
  return len(calls)


@pytest.mark.slow
def test_results_tell_the_network_calls_that_were_made(finished, tmp_path, monkeypatch):
  """Every row of an evaluation whose drawing is replaced: what is asked of the drawer is counted."""
  overrides = {'train__ema_decay': (0.9, 0.5), 'distill__start_steps': 2}
  overrides |= {'evaluation__gamma': 0.5, 'evaluation__grid': 'karras'}
  config = tiny.config(evaluation__samplers=tuple(samplers.SAMPLERS), **overrides)
  stages, images = tiny.plan(**overrides)
  asked = []

  def seconds_per_image(self, params, grid, num_samples, seed, then, use, first):
    assert self.clip_x
    asked.append((self.sampler, params['of'], grid, calls_of(self.sampler, grid)))
    use(then(images.images.images[:num_samples]), num_samples)
    return 0.001

  def draw(self, params, grid, num_samples, seed, classes=()):
    return images.images.images[:num_samples]

  monkeypatch.setattr(sampling.Drawer, 'seconds_per_image', seconds_per_image)
  monkeypatch.setattr(sampling.Drawer, 'draw', draw)
  (tmp_path / 'extractor.safetensors').symlink_to(finished / 'extractor.safetensors')
  (tmp_path / 'base').mkdir()
  made_elsewhere = {'imported': {'source': 'edm'}, 'num_updates': 3}
  (tmp_path / 'base' / 'stage.json').write_text(json.dumps(made_elsewhere))
  models = []
  for stage in stages:
    sets = {name: {'of': np.array(f'{stage.name} {name}')} for name in stage.weights}
    models.append(Model(stage, 'ema', f'digest of {stage.name}', 7, 1.5, sets))
  results = measure.evaluate(config, models, images, tmp_path, again=False)

  rows = results['rows']
  assert json.loads((tmp_path / 'results.json').read_text())['rows'] == rows
  assert len(rows) == len(asked) == 2 * len(samplers.SAMPLERS) + 2
  for measured, (sampler, params, grid, calls) in zip(rows, asked, strict=True):
    assert samplers.SAMPLERS[measured['sampler']] is type(sampler)
    assert f'{measured["stage"]} {measured["weights"]}' == params
    assert measured['nfe'] == calls
    assert measured['grid'] == ('karras' if measured['stage'] == 'base' else 'uniform')
    expected = times.make_grid(measured['grid'], measured['num_steps'], schedules.Cosine())
    np.testing.assert_array_equal(grid, expected)
    assert measured['clip_x'] is True
    assert measured['updates'] == (3 if measured['stage'] == 'base' else 7)
    assert measured.get('gamma') == (0.5 if measured['sampler'] == 'ancestral' else None)
  of_two = {row['sampler']: row['nfe'] for row in rows if row['num_steps'] == 2}
  assert (of_two['ddim'], of_two['heun'], of_two['rk4'], of_two['edm_heun']) == (2, 4, 8, 3)
  text = (tmp_path / 'report' / 'index.html').read_text()
  assert 'Base, Heun' in text and 'ema_0.5' in text
  asked.clear()
  again = tiny.config(
    evaluation__samplers=('ancestral', 'ddim'), **overrides | {'evaluation__gamma': 1.0}
  )
  measure.evaluate(again, models, images, tmp_path, again=False)
  assert {type(sampler) for sampler, *_ in asked} == {samplers.Ancestral}
