"""Guidance of models, rows and plans: what is asked for, what is measured, and what is refused."""

import contextlib
import dataclasses
import json
import types

import numpy as np
import pytest

from configs import default
from diffusion_distillation import cli, modes
from diffusion_distillation.diffusion import samplers, times
from diffusion_distillation.diffusion.guidance import NONE, Guidance
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import curves, elsewhere, measure, results
from diffusion_distillation.evaluation.loading import LoadedModel
from diffusion_distillation.evaluation.sampling import Drawer
from diffusion_distillation.networks import NETWORKS
from diffusion_distillation.run import forecast
from diffusion_distillation.stages import model as models
from tests import tiny
from tests.networks.denoiser_test import Small
from tests.stages.model_test import UNET, stored

DROPPED = stored(Small(1, num_classes=3), num_steps=3, cond_dropout=0.1)
DEFAULT = default.get_config()
CONDITIONAL = {'model__conditional': True, 'dataset__label_dropout': 0.1}


def drawn(guidance):
  given = (DROPPED.denoise, samplers.DDIM(), DROPPED.schedule, DROPPED.space, (8, 8, 1), 5)
  draw = Drawer(*given, clip_x=DROPPED.clip_x, guidance=guidance)
  return draw.draw(DROPPED.params, times.uniform(3), 5, 7)


def test_a_model_is_sampled_with_guidance_in_python():
  model = LoadedModel(DROPPED)
  plain, guided = model.sample(5, seed=7), model.sample(5, seed=7, guidance=2.0)
  np.testing.assert_array_equal(plain, drawn(NONE))
  np.testing.assert_array_equal(guided, drawn(Guidance(2.0)))
  some = model.sample(5, seed=7, guidance=2.0, guidance_interval=(0.1, 1.0))
  np.testing.assert_array_equal(some, drawn(Guidance(2.0, 0.1, 1.0)))
  assert len({images.tobytes() for images in (plain, guided, some)}) == 3
  for asked in ({'labels': [-1]}, {'guidance_interval': (1.0,)}, {'guidance': -1.0}):
    with pytest.raises(UserError, match='guidance'):
      model.sample(1, **{'guidance': 2.0} | asked)
  never_dropped = LoadedModel(stored(Small(1, num_classes=3)))
  with pytest.raises(UserError, match=r'^guidance=2: .* without label dropout'):
    never_dropped.sample(1, guidance=2.0)


@pytest.fixture
def sample(tmp_path, monkeypatch, capsys):
  """--mode=sample of the folder of a model; returns the exit code, what is printed, and the images."""
  monkeypatch.setitem(NETWORKS, 'small', Small)
  monkeypatch.setattr('diffusion_distillation.system.interrupts.install', lambda: None)

  def run(model=DROPPED, **changes):
    folder, out = tmp_path / 'model', tmp_path / 'x.npz'
    models.write(folder, model, anew=True)
    out.unlink(missing_ok=True)
    given = {'mode': 'sample', 'config': None, 'default': DEFAULT, 'workdir': folder}
    code = cli.run(cli.Options(**given | {'num_samples': 5, 'seed': 7, 'out': out} | changes))
    captured = capsys.readouterr()
    images = np.load(out)['images'] if out.exists() else None
    return code, captured.out + captured.err, images

  return run


def test_the_command_line_samples_with_guidance_and_tells_the_calls(sample):
  code, line, images = sample(guidance=2.0)
  assert code == 0 and ' in 3 ddim steps, 6 network calls each' in line
  np.testing.assert_array_equal(images, drawn(Guidance(2.0)))
  code, line, images = sample(guidance=2.0, guidance_interval=['1', 'inf'])
  assert code == 0 and ' in 3 ddim steps, 5 network calls each' in line  # sigma / alpha = tan(pi t / 2)
  np.testing.assert_array_equal(images, drawn(Guidance(2.0, 1.0)))
  code, line, images = sample(guidance=0.0)
  assert code == 0 and ', 3 network calls each' in line
  np.testing.assert_array_equal(images, drawn(NONE))


WRONG = [
  ({'guidance': -0.5}, '--guidance=-0.5: the weight of guidance is -0.5'),
  (
    {'guidance': 1.0, 'guidance_interval': ['1', 'x']},
    '--guidance_interval=1,x: must be numbers, such as',
  ),
  ({'guidance': 1.0, 'guidance_interval': ['3', '1']}, 'it must be 0 <= LOW < HIGH'),
  ({'guidance_interval': ['1', '2']}, '--guidance_interval=1,2 only applies to --guidance above 0'),
  ({'guidance': 1.0, 'classes': ['none']}, '--guidance=1: images without a class cannot be guided'),
  ({'guidance': 1.0, 'model': stored(Small(1))}, '--guidance=1: guidance needs a class-conditional'),
]


@pytest.mark.parametrize(('changes', 'message'), WRONG)
def test_guidance_that_cannot_be_had_is_one_line(sample, changes, message):
  code, text, images = sample(**changes)
  assert code == 2 and text.startswith('error: ') and message in text and text.count('\n') == 1
  assert images is None


ROWS = {'evaluation__samplers': ('ddim', 'heun'), 'evaluation__guidance': (0.0, 1.5)}


@pytest.fixture
def of_folder(monkeypatch, tmp_path):
  """Measures the folder of a model whose images are drawn, but compared with nothing; returns what drew them, and the results."""
  train, drawers = types.SimpleNamespace(images=types.SimpleNamespace(image_shape=(8, 8, 1))), []
  monkeypatch.setattr(
    elsewhere, '_place', lambda config, _: contextlib.nullcontext((config, train, None))
  )
  monkeypatch.setattr(elsewhere.real_images, 'open_extractors', lambda *_: None)
  monkeypatch.setattr(elsewhere.real_images, 'summarize', lambda *_: (None, {}))
  monkeypatch.setattr(elsewhere, '_draw', lambda *given: drawers.append(given[-1]))
  monkeypatch.setattr(elsewhere, '_write', lambda header, described, *_: described)

  def measured(model=DROPPED, **changes):
    config, out = tiny.config(**changes), tmp_path / 'x.json'
    found, _ = elsewhere.measure_model(config, LoadedModel(model), tmp_path, out)
    return drawers[-1], found

  return measured


def test_the_folder_of_a_model_is_measured_with_guidance(of_folder):
  draw, found = of_folder()
  assert not draw.guidance and (found['guidance'], found['guidance_interval']) == (0.0, None)
  assert found['nfe'] == 3
  given = {'evaluation__guidance': (2.0,), 'evaluation__guidance_interval': (0.1, 1.0)}
  draw, found = of_folder(**given)
  assert draw.guidance == Guidance(2.0, 0.1, 1.0) and found['nfe'] > 3
  assert (found['guidance'], found['guidance_interval']) == (2.0, [0.1, 1.0])
  takes = stored(dataclasses.replace(UNET, num_classes=3, guidance=(0.5, 4.0)), num_steps=3)
  for asked, expected in ((0.0, 0.5), (2.0, 2.0)):
    draw, found = of_folder(takes, evaluation__guidance=(asked,))
    assert found['guidance'] == expected and found['nfe'] == 3
    assert (draw.cond(np.arange(2), 0)['guidance'] == expected).all()
  for changes, words in (
    ({'evaluation__guidance': (0.0, 1.0)}, r'measured with one weight; .* or \(0\.0,\) for none'),
    ({'evaluation__guiding_model': 'x'}, r'guiding_model=x does not apply to the folder of a model'),
    (
      {**given, 'model': stored(Small(1))},
      r'evaluation\.guidance=2: guidance needs a class-conditional',
    ),
  ):
    with pytest.raises(UserError, match=words):
      of_folder(**changes)


def test_labels_and_grids_that_there_are_not_are_refused_with_any_config():
  for key, value in (('labels', 'dat'), ('grid', 'even'), ('samplers', ('dim',))):
    config = tiny.config(**{f'evaluation__{key}': value})
    with pytest.raises(UserError, match=rf'evaluation\.{key}'):
      modes._checked_config(cli.Options('evaluate', config=config, default=DEFAULT, workdir='x'))


def test_the_base_has_a_row_for_each_weight_and_students_have_none():
  overrides = {**CONDITIONAL, **ROWS, 'evaluation__guidance_interval': (0.0, 1.0)}
  config, stages = tiny.config(**overrides), tiny.plan(**overrides)[0]
  found = []
  for place, _, sampler, steps in measure.rows(stages, config):
    for guidance in measure.guidances(config, place, stages[place]):
      model = types.SimpleNamespace(stage=stages[place], weights='ema', digest='d')
      setting = measure.Setting(model, sampler, steps, 3, guidance)
      row = measure.describe(config, setting)
      found.append((row['stage'], sampler, steps, row['guidance'], row['guidance_interval'], row['nfe']))
      assert json.loads(json.dumps(row)) == row  # as it is read again
      draw = measure.drawer(config, stages[place], sampler, (), guidance)
      assert (draw.guidance is NONE) == (row['guidance'] == 0.0)
  of_base = [row[1:] for row in found if row[0] == 'base']
  # Levels of the uniform grid in t = 1, 3/4, 1/2, 1/4 are inf, 2.4, 1 and 0.4: the last two are in (0, 1].
  assert of_base[:4] == [
    ('ddim', 4, 0.0, None, 4),
    ('ddim', 4, 1.5, [0.0, 1.0], 6),
    ('heun', 4, 0.0, None, 8),
    ('heun', 4, 1.5, [0.0, 1.0], 12),
  ]
  assert len(of_base) == 12 and all(row[3:5] == (0.0, None) for row in found if row[0] != 'base')
  assert forecast.evaluation_calls(stages, config) == 48 * sum(row[-1] for row in found)


def test_rows_of_before_had_no_guidance():
  base = tiny.plan(**CONDITIONAL)[0][0]
  model = types.SimpleNamespace(stage=base, weights='ema', digest='d')
  keys = set()
  for guidance in (NONE, Guidance(1.0), Guidance(2.0), Guidance(2.0, 0.1, 1.0), Guidance(2.0, 0.1)):
    row = measure.describe(tiny.config(), measure.Setting(model, 'ddim', 4, 3, guidance))
    keys.add(results.key_of(json.loads(json.dumps(row, allow_nan=False))))
    before = {key: value for key, value in row.items() if not key.startswith('guidance')}
    assert (results.key_of(before) == results.key_of(row)) == (guidance is NONE)
  assert len(keys) == 5


def test_curves_tell_guidance_apart():
  row = {'stage': 'base', 'weights': 'ema', 'sampler': 'ddim', 'method': 'denoising'}
  rows = [{**row, 'nfe': 4, 'value': 3.0}, {**row, 'nfe': 8, 'value': 1.0, 'guidance': 1.5}]
  assert curves.curves(rows) == {'Base, DDIM': {4: 3.0}, 'Base, DDIM, guidance 1.5': {8: 1.0}}


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({}, r'^evaluation.guidance=1.5: .*unconditional'),
    ({'model__conditional': True}, r'^evaluation.guidance=1.5: .*dataset.label_dropout=0'),
    ({**CONDITIONAL, 'evaluation__guidance': ()}, r'^evaluation.guidance=\(\) must not be empty'),
    ({**CONDITIONAL, 'evaluation__guidance': (-1.0,)}, r'^evaluation.guidance=\(-1.0,\) must be zero'),
    (
      {**CONDITIONAL, 'evaluation__guidance_interval': (2.0,)},
      r'^evaluation.guidance_interval=\(2.0,\)',
    ),
  ],
)
def test_a_plan_with_guidance_that_cannot_be_had_is_refused(changes, message):
  with pytest.raises(UserError, match=message):
    tiny.plan(**ROWS | changes)
