"""The texts that samples of an evaluation are drawn for: their order, embeddings and labels, and what the report shows of them."""

import dataclasses
import types

import numpy as np
import pytest

from diffusion_distillation.datasets import BrokenImage, InMemory, Settings
from diffusion_distillation.diffusion.guidance import NONE, make_guidance
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import by_class, measure, pictures, report, report_contents
from diffusion_distillation.evaluation.prompted import Prompted
from diffusion_distillation.evaluation.results import key_of
from diffusion_distillation.evaluation.sampled_texts import SampledTexts
from diffusion_distillation.run import compared, forecast, gate, tracking
from diffusion_distillation.run import run as runs
from diffusion_distillation.stages import plan, workdir
from diffusion_distillation.stages.provenance import Model
from tests import captioned, text_model, tiny
from tests.evaluation.rows import ROWS, results_of

IMAGES = captioned.open_squares(Settings(captioned.NAME), 'train')
COUNT = len(IMAGES)
FILE = Prompted('p.txt', ('one', 'two', 'three'), None)


@pytest.fixture(scope='module')
def captions():
  return SampledTexts(text_model.text_encoder(), IMAGES)


def planned(**changes):
  c = captioned.config('', **changes)
  return c, plan.plan(c, text_model.IMAGE, 0, workdir.origin_of(text_model.stored()))


def test_each_epoch_of_samples_has_every_caption_once_in_an_order_of_its_own(captions):
  index = np.arange(2 * COUNT)
  texts = captions.texts(index, 3)
  first, second = texts[:COUNT], texts[COUNT:]
  assert sorted(first) == sorted(second) == sorted(IMAGES.captions) and first != second
  assert captions.texts(index, 4) != texts
  assert captions.texts(np.array([30, 5]), 3) == [texts[30], texts[5]]


def test_the_label_of_a_sample_is_that_of_its_caption(captions):
  index = np.arange(3, 40)
  texts, labels = captions.texts(index, 1), captions.labels(index, 1)
  assert all(captioned.CAPTIONS[label] in text for label, text in zip(labels, texts, strict=True))
  assert labels.dtype == np.int32 and len(set(labels.tolist())) == 3


class Read(InMemory):
  """Images whose labels are only known when they are read; one of them is broken."""

  def known_labels(self):
    return None

  def read(self, k):
    if k == 7:
      raise BrokenImage('is empty')
    return super().read(k)


def test_labels_that_are_not_known_are_read_and_a_broken_image_has_none(captions):
  read = Read(**{field.name: getattr(IMAGES, field.name) for field in dataclasses.fields(IMAGES)})
  index = np.arange(COUNT)
  known, found = captions.labels(index, 1), dataclasses.replace(captions, dataset=read).labels(index, 1)
  (broken,) = np.flatnonzero(found == -1)
  assert captions._places(index, 1)[broken] == 7
  np.testing.assert_array_equal(np.delete(found, broken), np.delete(known, broken))
  tally = by_class.Tally(lambda features: np.argmax(features, axis=1), 3, None)
  tally.add(np.eye(3), {'label': np.array([0, -1, 1])})
  assert tally.result() == {
    'class_accuracy': 0.5,
    'by_class': {'count': [1, 1, 0], 'accuracy': [1.0, 0.0, None]},
  }


def test_embeddings_are_those_of_the_encoder_and_of_a_text_alone(monkeypatch):
  captions = SampledTexts(text_model.text_encoder(), IMAGES)
  shapes, embed = set(), captions.encoder.embedder()
  noting = lambda tokens: shapes.add(tokens.shape) or embed(tokens)  # noqa: E731
  monkeypatch.setattr(type(captions.encoder), 'embedder', lambda self: noting)
  index = np.arange(21)
  found = captions.draw(index, 1)
  of_encoder = captions.encoder.embed(captions.texts(index, 1))
  np.testing.assert_allclose(found['text'], of_encoder, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(found['no_text'][20], captions.encoder.embed([''])[0], rtol=1e-5, atol=1e-6)
  for k in (0, 13, 20):  # a function of the text alone, to the last bit
    np.testing.assert_array_equal(captions.draw(np.array([k]), 1)['text'][0], found['text'][k])
  assert shapes == {(8, 6)}  # by one program, for batches of any size


def test_what_results_say_of_texts_is_documented(captions):
  page = (tiny.ROOT / 'docs' / 'evaluate.md').read_text()
  section = page.partition('\n## results.json\n')[2].partition('\n## ')[0]
  asked = dataclasses.replace(FILE, clip=types.SimpleNamespace(name='small', digest='d'))
  of_file = dataclasses.replace(captions, asked=asked)
  keys = {*captions.describe(), *of_file.describe(), *of_file.of_row()}
  assert keys == {'captions', 'prompts', 'clip', 'texts'}
  assert [key for key in keys if f'`{key}`' not in section] == []


def test_prompts_of_a_file_come_in_their_order_and_have_no_labels():
  texts = SampledTexts(text_model.text_encoder(), IMAGES, FILE)
  assert texts.texts(np.arange(1, 5), 9) == ['two', 'three', 'one', 'two']
  assert texts.labels(np.arange(3), 9) is None and not texts.labelled
  assert texts.describe()['prompts'] == {'file': 'p.txt', 'num_prompts': 3, 'digest': texts.digest}


def test_rows_with_other_texts_or_another_clip_model_are_measured_again(captions):
  c, stages = planned()
  clip = types.SimpleNamespace(name='clip', digest='of clip')
  model = Model(stages[0], 'ema', 'digest', 3, 0.0, {})
  kinds = [
    None,
    captions,
    dataclasses.replace(captions, asked=FILE),
    dataclasses.replace(captions, asked=dataclasses.replace(FILE, prompts=('one', 'two'))),
    dataclasses.replace(captions, asked=dataclasses.replace(FILE, clip=clip)),
  ]
  rows = [measure.describe(c, measure.Setting(model, 'ddim', 4, 3, texts=texts)) for texts in kinds]
  assert len({key_of(row) for row in rows}) == len(kinds)
  assert 'texts' not in rows[0] and rows[1]['texts'] == IMAGES.identity and rows[4]['clip'] == 'of clip'


def test_a_run_of_captions_forecasts_its_evaluation_and_one_of_prompts_none():
  """4 steps of the base, with two weights of which one calls the network twice, and one step of the student."""
  c, stages = planned(methods=('dmd',), dmd__regression=0.0, evaluation__guidance=(0.0, 1.5))
  assert forecast.evaluation_calls(stages, c) == 24 * (4 + 8 + 1 + 2 + 1)
  c.dataset.name = 'prompts'
  assert forecast.evaluation_calls(stages, c) == 0


def test_large_images_are_decoded_a_few_at_a_time_and_programs_hold_no_texts(captions):
  c, stages = planned(evaluation__num_samples=48)
  large = dataclasses.replace(stages[0], image_shape=(512, 512, 3))
  assert measure.drawer(c, large, 'ddim', texts=captions).batch_size == 4
  drawer = measure.drawer(c, stages[0], 'ddim', texts=captions)
  assert drawer.batch_size == 24 and drawer.texts is captions and drawer.program.texts is None


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    (
      {'dataset__name': 'prompts'},
      r'evaluation\.prompts=.*: dataset\.name=prompts has no images to comp',
    ),
    ({'evaluation__num_samples': 6}, r'holds 5 prompts, but evaluation\.num_samples=6 images are drawn'),
    ({'evaluation__prompts': 'nowhere.txt'}, r'evaluation\.prompts=.*nowhere\.txt cannot be read'),
  ],
)
def test_what_an_evaluation_of_texts_lacks_is_one_line(changes, said, tmp_path):
  file = str(text_model.write_prompts(tmp_path / 'p.txt'))
  given = {'evaluation__prompts': file, 'evaluation__num_samples': 5}
  c = captioned.config('', **given)
  assert compared.check(c, text_model.text_encoder()).prompts == list(text_model.PROMPTS)
  with pytest.raises(UserError, match=said):
    compared.check(captioned.config('', **{**given, **changes}), text_model.text_encoder())


def test_only_models_of_texts_are_measured_with_prompts():
  for key in ('prompts', 'clip'):
    c = tiny.config(**{f'evaluation__{key}': 'x.txt'})
    with pytest.raises(
      UserError, match=rf'evaluation\.{key}=x.txt only applies to models that draw what'
    ):
      compared.check(c, None)


def test_prompts_without_images_have_neither_gate_nor_measurements_in_training(tmp_path):
  refused = {
    gate.check: {'gate__factor': 1.5},
    tracking.check: {'early_stop__patience': 2, 'log__frechet_every': 2},
    lambda c: runs._check(c, tmp_path, planned()[1]): {'log__frechet_every': 2},
  }
  for check, changes in refused.items():
    check(captioned.config('', **changes))
    with pytest.raises(UserError, match=r'dataset\.name=prompts has n'):
      check(text_model.config('prompts.txt', **changes))


def shown(name, steps, weight, found):
  """What a row measured, whose first pixel says which model drew it."""
  stage = types.SimpleNamespace(name=name, num_steps=steps, sampler='ddim')
  model = types.SimpleNamespace(stage=stage, weights='ema')
  guidance = make_guidance(weight) if weight else NONE
  return types.SimpleNamespace(
    model=model, sampler='ddim', num_steps=steps, guidance=guidance, found=found
  )


def test_the_report_shows_each_text_with_the_image_of_every_model(captions, tmp_path, monkeypatch):
  monkeypatch.setattr(report.figures, 'to_png', lambda figure, theme: b'png')
  measured = [shown('base', 4, 0.0, 1), shown('base', 4, 1.5, 2), shown('dmd', 1, 0.0, 3)]

  def draw(row, count, chosen):
    assert chosen is None
    return np.broadcast_to(np.uint8(row.found), (count, 200, 200, 3))

  found = report_contents.by_text(measured, draw, captions, 1)
  assert found.texts == tuple(captions.texts(np.arange(8), 1))
  assert found.models == ('base, 4 steps', 'base, 4 steps, guidance 1.5', 'dmd, 1 step')
  np.testing.assert_array_equal(found.images[:, :, 0, 0, 0], np.tile([1, 2, 3], (8, 1)))
  assert report_contents.by_text(measured, draw, None, 1) is None
  long = dataclasses.replace(found, texts=('<b>' + 'word ' * 60, *found.texts[1:]))
  contents = report_contents.ReportContents({}, by_text=long)
  described = captions.describe()
  report.write(tiny.config(), results_of(ROWS, **described), contents, tmp_path)
  page = (tmp_path / 'index.html').read_text()
  assert page.count('<figcaption>dmd, 1 step</figcaption>') == 8
  assert (
    '…</h3>' in page and '&lt;b&gt;word' in page and 'for the captions of the training images' in page
  )
  assert pictures.reduced(found.images[0], 128).shape == (3, 128, 128, 3)
