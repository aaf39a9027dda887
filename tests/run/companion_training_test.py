"""The networks beside a base that a run trains itself: written once, resumed, checked, and used like an imported model's."""

import dataclasses
import itertools
import json
import shutil

import numpy as np
import pytest
import safetensors.numpy

import diffusion_distillation
from diffusion_distillation.datasets import ImageSet, Settings, open_split
from diffusion_distillation.errors import DamagedError, Preempted, UserError
from diffusion_distillation.evaluation.sampled_texts import SampledTexts
from diffusion_distillation.interop import exporting, importing
from diffusion_distillation.run import companion_training, compared, encoded_texts
from diffusion_distillation.run import run as runs
from diffusion_distillation.stages import companions, comparison, model, own_companions, workdir
from diffusion_distillation.stages.plan import plan
from diffusion_distillation.system import interrupts, sharding
from diffusion_distillation.system.checkpoints import digest
from diffusion_distillation.system.files import write_json
from diffusion_distillation.system.progress import Progress
from tests import text_model, tiny

SMALL = {
  'dataset.name': 'captioned_shapes',
  'dataset.split': 'train[:96]',
  'dataset.image_size': 8,
  'dataset.label_dropout': 0.25,
  'dataset.workers': 0,
  'autoencoder.num_updates': 6,
  'autoencoder.batch_size': 8,
  'autoencoder.latent_channels': 2,
  'autoencoder.block_out_channels': (4, 4),
  'autoencoder.norm_num_groups': 2,
  'text_encoder.num_updates': 6,
  'text_encoder.batch_size': 8,
  'text_encoder.length': 8,
  'text_encoder.hidden_size': 8,
  'text_encoder.num_layers': 1,
  'text_encoder.num_heads': 1,
  'model.name': 'unet2d_condition',
  'model.space': 'latents',
  'model.block_out_channels': (8,),
  'model.down_block_types': ('CrossAttnDownBlock2D',),
  'model.up_block_types': ('UpBlock2D',),
  'model.attention_head_dim': 1,
  'model.norm_num_groups': 4,
  'schedule.name': 'discrete',
  'schedule.betas': 'squaredcos_cap_v2',
  'train.num_updates': 4,
  'train.batch_size': 8,
  'train.ema_decay': (0.9,),
  'evaluation.clip_x': False,
  'evaluation.grid': 'uniform',
  'evaluation.num_samples': 16,
  'evaluation.batch_size': 16,
}


def config(**changes):
  """A small run that trains its own autoencoder and text encoder; dots in names are written as two underscores."""
  c = text_model.config('')
  given = {name.replace('__', '.'): value for name, value in changes.items()}
  c.update_from_flattened_dict(SMALL | {'dataset.path': '', 'methods': ()} | given)
  return c


def images(c):
  return open_split(Settings.of(c.dataset), 'train')


@pytest.fixture(scope='module')
def made(tmp_path_factory):
  """A workdir with finished networks of random parameters, which nothing is compiled for; tests only read it."""
  directory, c = tmp_path_factory.mktemp('made'), config()
  folder = directory / 'companions'
  folder.mkdir()
  space, text = own_companions.new_latents(c, images(c)), own_companions.new_text(c, images(c))
  of_image, of_text = np.zeros((1, 8, 8, 3), np.float32), np.zeros((1, 8), np.int32)
  vae = text_model.random(space.vae.init, of_image)['params']
  encoder = text_model.random(text.network.init, of_text)['params']
  space = dataclasses.replace(space, weights=lambda: vae, digest=digest(vae))
  text = dataclasses.replace(text, weights=lambda: encoder, digest=digest(encoder))
  companions.write(folder, space, text)
  write_json(folder / 'vae.json', companions.describe_space(space))
  write_json(folder / 'text_encoder.json', companions.describe_text(text))
  return directory


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  """A workdir with the finished networks, which tests only read."""
  directory, c = tmp_path_factory.mktemp('trained'), config()
  companion_training.ensure(c, directory, images(c))
  return directory


@pytest.mark.slow
def test_the_networks_are_written_with_the_scale_of_their_latents_and_a_tokenizer(trained):
  c = config()
  found = own_companions.find(trained, c, None)
  assert found.space.shape((8, 8, 3)) == (4, 4, 2) and found.text.network.max_position_embeddings == 8
  latents = found.space.encode(np.stack([images(c).read(k)[0] for k in range(96)]))
  assert float(np.std(latents)) == pytest.approx(1.0, rel=1e-3)
  caption = images(c).caption(0)
  assert found.text.embed([caption]).shape == (1, 8, 8)
  assert (found.text.tokens([caption])[0] < found.text.network.vocab_size).all()
  entry = json.loads((trained / 'companions' / 'vae.json').read_text())
  assert entry['updates'] == 6 and 0.0 < entry['error'] < 2.0


def test_finished_networks_are_not_trained_again(made, monkeypatch):
  c = config()
  monkeypatch.setattr(companion_training, '_train', None)
  companion_training.ensure(c, made, images(c))
  monkeypatch.setattr(sharding, 'part', lambda: (0, 2))
  companion_training.ensure(c, made, images(c))


@pytest.fixture
def stop(monkeypatch):
  """A function that stops the training in progress after so many updates from now."""

  def after(updates):
    interrupts.install()
    calls = itertools.count(1)

    class Stopping(Progress):
      def advance(self, steps=1):
        super().advance(steps)
        if next(calls) == updates - 1:
          interrupts.request('SIGTERM')  # which the next update finds

    monkeypatch.setattr(companion_training, 'Progress', Stopping)

  yield after
  interrupts.uninstall()


@pytest.mark.slow
def test_interrupted_training_goes_on_with_the_same_result(trained, tmp_path, monkeypatch, stop):
  """Each network is stopped after its third update, the first one in the middle of an interval of checkpoints and lines."""
  c, folder, writer, began = config(), tmp_path / 'companions', companion_training.MetricsWriter, []
  monkeypatch.setattr(
    companion_training, 'MetricsWriter', lambda *args: began.append(args[-1]) or writer(*args)
  )
  for updates, name in ((3, 'autoencoder'), (6, 'text_encoder')):  # three more of the autoencoder
    stop(updates)
    with pytest.raises(Preempted):
      companion_training.ensure(c, tmp_path, images(c))
    assert (folder / name / 'checkpoints' / '3').is_dir()
    assert (folder / 'vae.json').is_file() == (name == 'text_encoder')
  stop(99)
  companion_training.ensure(c, tmp_path, images(c))
  assert began == [0, 3, 0, 3]
  for file, name in (('vae', 'autoencoder'), ('text_encoder', 'text_encoder')):
    paths = [directory / 'companions' / file for directory in (trained, tmp_path)]
    once, twice = (safetensors.numpy.load_file(path.with_suffix('.safetensors')) for path in paths)
    assert all((once[key] == twice[key]).all() for key in once)
    once, twice = (json.loads(path.with_suffix('.json').read_text()) for path in paths)
    assert once | {'seconds': 0} == twice | {'seconds': 0} and twice['seconds'] > 0.0
    assert not (folder / name / 'checkpoints').exists()
    lines = map(json.loads, (folder / name / 'metrics.jsonl').read_text().splitlines())
    assert [line['step'] for line in lines if line['loss'] > 0.0] == [2, 4, 6]


@pytest.mark.parametrize('begin', ['run', 'prepare'])
def test_several_processes_need_networks_that_are_finished_before_anything_is_written(
  begin, tmp_path, monkeypatch
):
  c, directory = config(), tmp_path / 'run'
  monkeypatch.setattr(sharding, 'part', lambda: (0, 2))
  with pytest.raises(UserError, match=r'run --mode=prepare .* in one process first'):
    if begin == 'run':
      runs.run(c, directory)
    else:
      encoded_texts.prepare(c, directory, images(c))
  assert not directory.exists()


def test_the_plan_names_the_networks_and_their_shapes_before_they_are_trained(made, tmp_path):
  c = config(methods=('dmd',), dmd__guidance=1.0, pairs__guidance=1.0)
  base, dmd = workdir.described_plan(tmp_path, c)
  network = base.denoise.network
  assert (network.cross_attention_dim, network.text_length) == (8, 8)
  assert base.recipe.shape == (8, 4, 4, 2) and base.recipe.cond_dropout == 0.25
  assert dmd.text == base.text and dmd.space == base.space and dmd.clip_x is None
  *lines, left_out = companion_training.table(c, tmp_path)
  assert 'network calls and times below leave out' in left_out
  assert [line.split()[0] for line in lines] == ['autoencoder', 'text_encoder']
  assert '6 updates of 8 images' in lines[0] and 'finished' not in ''.join(lines)
  assert all(line.endswith('finished') for line in companion_training.table(c, made))
  assert not list(companion_training.table(tiny.config(), tmp_path))
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'text_encoder__num_updates': 0}, r'text_encoder\.num_updates=0: .* set both'),
    ({'model__name': 'unet'}, r'model\.name=unet: .* set model\.name=unet2d_condition'),
    ({'model__conditional': True}, r'model\.conditional=True: .* set model\.conditional=False'),
    ({'model__space': 'pixels'}, r'model\.space=pixels: .* set model\.space=latents'),
    ({'dataset__name': 'digits', 'dataset__split': ''}, r'dataset\.name=digits: the model draws .* no captions'),
    ({'dataset__name': 'prompts'}, r'autoencoder\.num_updates=6 needs images with captions'),
    ({'dataset__random_flip': True}, r'dataset\.random_flip=True: the latents of a mirrored image'),
    ({'dataset__image_size': 9}, r'config\.autoencoder: .* divisible by 2'),
    ({'autoencoder__norm_num_groups': 3}, r'config\.autoencoder: '),
    ({'text_encoder__num_heads': 3}, r'config\.text_encoder: .* does not divide hidden_size=8'),
    ({'schedule__name': 'cosine'}, r'config\.model: .* needs a schedule in discrete time'),
    ({'model__up_block_types': ('UpBlock',)}, r"model\.up_block_types='UpBlock' is not one of"),
  ],
)  # fmt: skip
def test_what_does_not_fit_is_one_line_before_anything_is_trained(changes, message, tmp_path):
  with pytest.raises(UserError, match=message):
    workdir.plan_for(tmp_path, config(**changes))
  assert not any(tmp_path.iterdir())


def test_without_networks_of_their_own_latents_and_texts_are_for_imported_models():
  c = config(autoencoder__num_updates=0, text_encoder__num_updates=0)
  with pytest.raises(UserError, match=r'only for imported models .* set autoencoder\.num_updates'):
    plan(c, (8, 8, 3), 0)
  c.model.space = 'pixels'
  with pytest.raises(UserError, match=r'give its cross_attention_dim; or set autoencoder\.num_up'):
    plan(c, (8, 8, 3), 0)


def test_an_imported_model_keeps_its_own_networks(tmp_path):
  directory, _ = text_model.begin(tmp_path)
  with pytest.raises(UserError, match=r'autoencoder\.num_updates=6: .* begins with an imported model'):
    workdir.plan_for(directory, config())


def test_a_base_with_networks_of_its_run_is_imported_as_a_folder(made, tmp_path):
  """Its stage is refused, as its config is in a run that would train other networks beside it."""
  theirs = shutil.copytree(made, tmp_path / 'theirs')
  c, default = config(), config(autoencoder__num_updates=0, text_encoder__num_updates=0)
  workdir.claim(theirs, c)
  base, own = workdir.described_plan(theirs, c)[0], own_companions.find(theirs, c, None)
  params = text_model.random(lambda rng: base.init_params(rng))
  stored = dataclasses.replace(
    text_model.stored(), denoise=base.denoise, params=params, space=own.space, text=own.text
  )
  model.write(theirs / 'base' / 'model', stored)
  write_json(theirs / 'base' / 'stage.json', {'finished': True})
  folder, into = theirs / 'base' / 'model', tmp_path / 'run'
  with pytest.raises(UserError, match=r'import its folder, .* --source=model --checkpoint=.*base/model'):
    importing.from_workdir(default, default, theirs / 'base', into)
  for read, path in ((importing.from_model, folder), (importing.from_google, folder)):
    with pytest.raises(UserError, match=r'autoencoder\.num_updates=6: .* begins with an imported model'):
      read(c, default, path, into)
  assert not into.exists()
  importing.from_model(default, default, folder, into)
  (found,), _ = workdir.plan_for(into, default)
  assert found.text == own.text and found.space == own.space
  captions = workdir.open_captions(into, default)
  assert isinstance(captions, ImageSet) and captions.caption(0) == images(c).caption(0)


def test_samples_of_a_run_are_drawn_for_texts_as_the_trained_encoder_reads_them(made):
  c = config()
  before, after = own_companions.new_text(c, images(c)), own_companions.find(made, c, None).text
  real = compared.Compared(c, None, SampledTexts(before, images(c)))
  assert real.drawing_for(after).texts.encoder == after != before
  nothing = compared.Compared(c, None, None)
  assert nothing.drawing_for(after) is nothing


def test_settings_that_made_the_networks_cannot_be_changed(tmp_path):
  workdir.claim(tmp_path, config())
  workdir.claim(tmp_path, config(evaluation__num_samples=32))
  for changed in ({'autoencoder__kl_weight': 1.0}, {'text_encoder__merges': 5}):
    with pytest.raises(
      UserError, match=rf'{next(iter(changed)).replace("__", ".")} was .* use another workdir'
    ):
      workdir.claim(tmp_path, config(**changed))


def test_settings_of_networks_that_a_run_does_not_train_may_change(tmp_path):
  """In workdirs of versions that had no such networks, too, where they cannot be added beside a stage."""
  path, sections = tmp_path / 'stage.json', ('autoencoder', 'text_encoder')
  without = config(autoencoder__num_updates=0, text_encoder__num_updates=0)
  unused = {'autoencoder__batch_size': 3, 'text_encoder__merges': 5}
  changed = config(autoencoder__num_updates=0, text_encoder__num_updates=0, **unused)
  made_with = json.loads(without.to_json())
  older = {name: section for name, section in made_with.items() if name not in sections}
  for stored in (made_with, older):
    for stage in ('', 'base', 'dmd'):
      comparison.check_config(path, stored, without, stage)
      comparison.check_config(path, stored, changed, stage)
      with pytest.raises(
        UserError, match=r'autoencoder\.num_updates was 0, is 6; text_encoder\.num_upd'
      ):
        comparison.check_config(path, stored, config(), stage)
  with pytest.raises(UserError, match=r'autoencoder\.batch_size was 8, is 3; text_encoder\.merges was'):
    comparison.check_config(path, json.loads(config().to_json()), config(**unused), 'base')


def test_networks_that_stages_were_trained_with_are_missed(tmp_path):
  (tmp_path / 'base').mkdir()
  (tmp_path / 'base' / 'stage.json').write_text('{}')
  with pytest.raises(DamagedError, match='companions holds no finished autoencoder and text encoder'):
    own_companions.find(tmp_path, config(), images(config()))


def test_a_damaged_description_is_one_line(tmp_path):
  (tmp_path / 'companions').mkdir()
  (tmp_path / 'companions' / 'vae.json').write_text('{"vae": {}}')
  with pytest.raises(DamagedError, match=r'vae\.json is damaged .*digest'):
    own_companions.find(tmp_path, config(), images(config()))


@pytest.mark.slow
def test_a_run_from_nothing_to_a_one_step_student_that_draws_prompts(trained, tmp_path, monkeypatch):
  """The networks are finished: interrupted before the base, the run continues without training them again."""
  shutil.copytree(trained / 'companions', tmp_path / 'companions')
  c = config(methods=('dmd',), dmd__guidance=1.0, pairs__guidance=1.0, dmd__num_updates=2)
  monkeypatch.setattr(companion_training, '_train', None)
  monkeypatch.setattr(
    runs.measure, 'evaluate', lambda *_, **__: None
  )  # tests/text_rows_test.py measures
  runs.run(c, tmp_path)
  student = diffusion_distillation.load(tmp_path / 'dmd' / 'model')
  own = own_companions.find(tmp_path, c, None)
  assert student.stored.space == own.space and student.stored.text == own.text
  prompts = ['a large red circle on white', 'a small blue cross on black']
  drawn = student.sample(prompts=prompts, seed=1)
  assert drawn.shape == (2, 8, 8, 3) and student.stored.num_steps == 1
  assert workdir.stored_plan(tmp_path, c)[1].text == own.text
  exporting.export(
    tmp_path, 'dmd', str(tmp_path / 'pipeline'), 'diffusers'
  )  # compares what it has written
