"""Texts, and images with captions, are encoded once, and read as what the networks make of them."""

import dataclasses
import pickle
import shutil

import numpy as np
import pytest

from diffusion_distillation.datasets import InMemory, decoding, encoded
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.datasets.prompts import Prompts
from diffusion_distillation.datasets.settings import ENCODED_DTYPES
from diffusion_distillation.errors import DamagedError, Preempted, UserError
from diffusion_distillation.run import encoding
from diffusion_distillation.stages import workdir
from diffusion_distillation.stages.texts import TextEncoder
from diffusion_distillation.system import sharding
from tests import text_model, tiny

CAPTIONS = Prompts('few', text_model.PROMPTS, 'identity of few')


@dataclasses.dataclass(frozen=True, eq=False)
class Captioned(InMemory):
  """Images in memory with captions."""

  def caption(self, k):
    return text_model.PROMPTS[k]


def images(broken=()):
  pixels = np.random.default_rng(0).integers(0, 256, (5, *text_model.IMAGE), np.uint8)
  reasons = dict.fromkeys(broken, 'is empty')
  return Captioned('pictures', text_model.IMAGE, (), 'identity', pixels, np.zeros(5, np.int32), reasons)


def ensure(directory, captions=CAPTIONS, model=None, dtype='float32', **options):
  return encoding.ensure(directory, captions, model or text_model.stored(), dtype, **options)


@pytest.fixture(scope='module')
def directory(tmp_path_factory):
  """The encoded prompts in files of two, which tests only read."""
  found = tmp_path_factory.mktemp('encoded')
  ensure(found, shard_bytes=2 * 6 * 8 * 4)
  return found


def test_images_that_are_decoded_otherwise_are_encoded_anew():
  """The identity of a dataset is that of its files, whatever size and filter they are read with."""
  model, known = text_model.stored(), set()
  area, lanczos = (decoding.Decoder(8, 3, name) for name in ('area', 'lanczos'))
  for shape, decoder in (((8, 8, 3), area), ((8, 8, 3), lanczos), ((16, 16, 3), area)):
    captioned = images()
    object.__setattr__(captioned, 'image_shape', shape)
    object.__setattr__(captioned, 'decoder', decoder)
    known.add(encoding.identity(captioned, model, 'float32'))
  assert len(known) == 3


def test_several_processes_read_what_one_has_encoded_and_do_not_encode(directory, tmp_path, monkeypatch):
  monkeypatch.setattr(sharding, 'part', lambda: (0, 2))
  assert len(ensure(directory, shard_bytes=2 * 6 * 8 * 4)) == len(CAPTIONS)
  with pytest.raises(UserError, match=r'run --mode=prepare .* in one process first'):
    ensure(tmp_path)
  assert not list(tmp_path.iterdir())


@pytest.fixture
def asked(monkeypatch):
  """The tokens of the texts that are embedded."""
  found = []
  really = TextEncoder.embedder

  def embedder(self):
    embed = really(self)
    return lambda tokens: found.append(tokens) or embed(tokens)

  monkeypatch.setattr(TextEncoder, 'embedder', embedder)
  return found


def test_texts_are_what_the_text_encoder_makes_of_them_and_no_text_is_the_empty_one(directory):
  stored = ensure(directory)
  found = stored.batch(np.array([3, 0]))
  text = text_model.stored().text
  expected = text.embed([text_model.PROMPTS[3], text_model.PROMPTS[0]])
  np.testing.assert_allclose(found['cond']['text'], expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_array_equal(found['cond']['no_text'], np.repeat(text.embed(['']), 2, 0))
  assert len(stored) == 5 and stored.x_shape == () and 'x' not in found
  assert len(list(directory.glob('*/*.array_record'))) == 3
  again = pickle.loads(pickle.dumps(stored)).batch(np.array([3, 0]))
  np.testing.assert_array_equal(again['cond']['text'], found['cond']['text'])


def test_a_later_start_encodes_nothing_and_another_encoder_or_dataset_everything(
  directory, asked, tmp_path
):
  ensure(directory)
  assert not asked
  copy = shutil.copytree(directory, tmp_path / 'copy')
  other = dataclasses.replace(text_model.stored(), text=text_model.text_encoder(1))
  assert ensure(copy, model=other).identity != ensure(copy).identity and len(asked) == 1
  ensure(copy, Prompts('few', text_model.PROMPTS, 'another identity'))
  assert len(asked) == 2
  fewer = dataclasses.replace(text_model.stored().text, tokenizer={'merges.txt': b''})
  assert encoding.identity(
    CAPTIONS, dataclasses.replace(text_model.stored(), text=fewer), 'float32'
  ) not in (path.name for path in copy.iterdir())


def test_after_an_interruption_only_the_missing_files_are_written(
  directory, asked, tmp_path, monkeypatch
):
  copy = shutil.copytree(directory, tmp_path / 'copy')
  (folder,) = (path for path in copy.iterdir() if path.is_dir())
  lost = encoded.shard_paths(folder, 3)[1]
  before = lost.read_bytes()
  lost.unlink()
  with pytest.raises(DamagedError, match=r'00001-of-00003\.array_record is missing'):
    encoded.open_folder(folder)

  def stop():
    raise Preempted('a signal')

  with monkeypatch.context() as patch:
    patch.setattr(encoding.interrupts, 'check', stop)
    with pytest.raises(Preempted):
      ensure(copy)
  ensure(copy)
  assert len(asked) == 1 and lost.read_bytes() == before


def test_half_precision_takes_half_of_the_space(directory, tmp_path):
  half = ensure(tmp_path, dtype='float16').batch(np.arange(5))['cond']['text']
  whole = ensure(directory).batch(np.arange(5))['cond']['text']
  assert half.dtype == np.float32 and (half != whole).any()
  np.testing.assert_allclose(half, whole, rtol=1e-3, atol=1e-4)
  sizes = [encoding.size_of_record(CAPTIONS, text_model.stored(), dtype) for dtype in ENCODED_DTYPES]
  assert sizes == [6 * 8 * 4, 6 * 8 * 2]


def test_the_text_of_a_sample_depends_on_its_index_and_the_seed_alone(directory):
  stored = ensure(directory)
  together = stored.draw(np.arange(12), 7)['text']
  for k in (0, 4, 11):
    np.testing.assert_array_equal(stored.draw(np.array([k]), 7)['text'][0], together[k])
  epochs = stored.places(np.arange(15), 7).reshape(3, 5)
  np.testing.assert_array_equal(np.sort(epochs, 1), np.broadcast_to(np.arange(5), (3, 5)))
  assert (epochs != epochs[:1]).any() and (stored.places(np.arange(15), 8) != epochs.ravel()).any()


def test_images_are_encoded_beside_their_captions(tmp_path):
  stored, model = ensure(tmp_path, images()), text_model.stored()
  batch = stored.batch(np.array([4, 1]))
  assert (stored.x_shape, stored.image_shape) == (text_model.LATENT, text_model.IMAGE)
  np.testing.assert_allclose(
    batch['x'], model.space.encode(images().images[[4, 1]]), rtol=1e-4, atol=1e-5
  )
  expected = model.text.embed([text_model.PROMPTS[4], text_model.PROMPTS[1]])
  np.testing.assert_allclose(batch['cond']['text'], expected, rtol=1e-5, atol=1e-6)
  loader = Loader(stored)
  streamed = next(loader.shuffled(3, 4, 1, 2))
  assert streamed['x'].shape == (4, *text_model.LATENT) and set(streamed['cond']) == {'text', 'no_text'}
  loader.close()


def test_a_broken_image_is_replaced_by_the_next_one_with_its_caption(tmp_path):
  whole, stored = ensure(tmp_path / 'a', images()), ensure(tmp_path / 'b', images(broken=(1, 4)))
  found, expected = stored.batch(np.arange(5)), whole.batch(np.array([0, 2, 2, 3, 0]))
  np.testing.assert_allclose(found['x'], expected['x'], rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(found['cond']['text'], expected['cond']['text'], rtol=1e-5, atol=1e-6)


def test_long_texts_are_counted_and_a_full_disk_is_one_line(tmp_path, monkeypatch, caplog):
  long = Prompts('long', ['a red circle and a large green square', 'a'], 'identity of long')
  ensure(tmp_path, long)
  assert 'long: 1 of 2 texts are longer than 4 tokens and were cut' in caplog.text
  monkeypatch.setattr(encoding.shutil, 'disk_usage', lambda path: _Usage(0))
  with pytest.raises(
    UserError, match=r'5 encoded texts take 0\.0 GB, .* dataset\.encoded_dtype=float16'
  ):
    ensure(tmp_path / 'other')


@dataclasses.dataclass
class _Usage:
  free: int


def test_prepare_encodes_once_for_several_runs(tmp_path, asked, monkeypatch):
  directory, c = text_model.begin(tmp_path)
  flags = ['--mode=prepare', '--config=configs/stable_diffusion.py', '--config.dataset.name=prompts']
  flags += [
    f'--config.dataset.path={c.dataset.path}',
    f'--config.dataset.prepared={tmp_path / "shared"}',
  ]
  code, out, err = tiny.run_cli(*flags, f'--workdir={directory}')
  assert code == 0 and '5 texts prepared' in out, err
  c.dataset.prepared = str(tmp_path / 'shared')
  monkeypatch.setattr(TextEncoder, 'embedder', None)
  captions = workdir.open_captions(directory, c)
  found = encoding.of_run(c, directory, text_model.stored(), captions)
  assert found.folder.parent == tmp_path / 'shared' and f'{found.folder}: ' in out
  code, _, err = tiny.run_cli(*flags)
  assert code == 2 and '--mode=prepare with dataset.name=prompts needs --workdir' in err
