"""Stored pairs: whose they are, that they are what the sampler makes of noise, and that nothing is drawn twice."""

import dataclasses
import itertools
import json
import pathlib
import pickle
import signal
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.samplers import DDIM, Heun
from diffusion_distillation.diffusion.schedules import Cosine
from diffusion_distillation.errors import Preempted, UserError
from diffusion_distillation.evaluation import sampling
from diffusion_distillation.networks.conditioning import Classes
from diffusion_distillation.networks.spaces import Pixels
from diffusion_distillation.run import pairs
from diffusion_distillation.stages.provenance import Model
from diffusion_distillation.stages.stage import Pairs
from diffusion_distillation.system import interrupts, sharding
from tests.exact import Gaussian, scales

SHAPE = (3, 2, 1)
ONE = Pairs(20, DDIM(), False, 3, 'uniform', 7, 8)  # files of 8, 8 and 4
SIZES = (1, 2, 7)  # of the classes of the data
FILES = ['00000.npy', '00001.npy', '00002.npy']


@dataclasses.dataclass(frozen=True)
class Exact:
  """The exact denoiser of Gaussian pixels around the parameter, and, if it is told classes, around each one's."""

  num_classes: int = 0

  @property
  def conditioning(self):
    return {'label': Classes(self.num_classes)} if self.num_classes else {}

  def __call__(self, mean, z, logsnr, cond, rng=None):
    assert (cond is None) == (self.num_classes == 0)
    own = 0.0 if cond is None else 0.1 * cond['label'][:, None, None, None]
    return Gaussian(mean + own, 0.3)(z, logsnr)


def teacher(mean=0.2, num_classes=0, **fields):
  """A model whose flow is known in closed form."""
  stage = types.SimpleNamespace(
    name='base', denoise=Exact(num_classes), schedule=Cosine(), space=Pixels(), image_shape=SHAPE
  )
  params = np.float32(mean)
  return Model(
    **{'stage': stage, 'weights': 'ema', 'digest': f'digest of {mean}'}
    | {'step': 1, 'seconds': 0.0, 'all': {'ema': params}}
    | fields
  )


def workdir_of(path, sizes):
  """A workdir whose data have classes of these sizes."""
  path.mkdir()
  if sizes:
    (path / 'dataset.json').write_text(json.dumps({'label_counts': sizes}))
  return path


def everything(stored):
  return stored.read(np.arange(len(stored)))


def content(directory):
  """The bytes of every file, but for the seconds in pairs.json."""
  found = {path.name: path.read_bytes() for path in (directory / 'pairs').iterdir()}
  described = json.loads(found.pop('pairs.json'))
  return found, {key: value for key, value in described.items() if key != 'seconds'}


@pytest.fixture(scope='module')
def drawn(tmp_path_factory):
  """A directory of ONE's pairs, which tests only read."""
  directory = tmp_path_factory.mktemp('pairs')
  pairs.ensure(directory, ONE, teacher())
  return directory


@pytest.fixture
def asked(monkeypatch):
  """The first index of each file that is drawn."""
  found = []
  really = sampling.Drawer.pairs

  def draw(self, params, grid, seed, index):
    found.append(int(index[0]))
    return really(self, params, grid, seed, index)

  monkeypatch.setattr(sampling.Drawer, 'pairs', draw)
  return found


def ddim(noise, grid, mean):
  """DDIM in float64: at each time of `grid`, from 1 down, to alpha x^ + sigma eps^ at the next one."""
  z, logsnr = np.float64(noise), np.float64(Cosine()(jnp.float32(grid)))[::-1]
  for at, to in itertools.pairwise(logsnr):
    (alpha, sigma), (alpha_s, sigma_s) = scales(at), scales(to)
    residual = (z - alpha * mean) / (alpha**2 * 0.3**2 + sigma**2)
    z = alpha_s * (mean + alpha * 0.3**2 * residual) + sigma_s * sigma * residual
  return z


@pytest.mark.parametrize('grid', ['uniform', 'quadratic', 'karras'])
def test_a_pair_is_noise_and_what_the_sampler_makes_of_it(tmp_path, grid):
  """In three steps on the grid that is named; the noise is standard normal, another one for each k."""
  law = dataclasses.replace(ONE, grid=grid, count=320, batch_size=160)
  found = everything(pairs.ensure(tmp_path, law, teacher()))
  noise = np.float64(found['noise'])
  assert noise.shape == found['image'].shape == (320, *SHAPE) and found['cond'] is None
  assert found['noise'].dtype == found['image'].dtype == np.float32
  expected = ddim(noise, times.make_grid(grid, 3, Cosine()), 0.2)
  np.testing.assert_allclose(found['image'], expected, atol=1e-5)
  count = noise.size
  assert abs(noise.mean()) < 4 / np.sqrt(count) and abs(noise.var() - 1) < 4 * np.sqrt(2 / count)
  assert len({record.tobytes() for record in noise}) == 320


def test_with_clipping_no_pixel_leaves_the_range_and_without_some_do(tmp_path):
  """Steps that end on clean data return x^, which is clipped if the sampler clips."""
  law = dataclasses.replace(ONE, clip_x=True)
  image = everything(pairs.ensure(tmp_path, law, teacher(0.9)))['image']
  assert image.max() == 1.0 and image.min() < 0.9
  (tmp_path / 'free').mkdir()
  free = everything(pairs.ensure(tmp_path / 'free', ONE, teacher(0.9)))['image']
  assert free.max() > 1.0 and not ONE.clip_x


def test_pairs_do_not_depend_on_the_batch_that_they_are_drawn_in_nor_on_devices(
  drawn, tmp_path, monkeypatch
):
  assert jax.device_count() == 8
  reference = everything(pairs.ensure(drawn, ONE, teacher()))
  (tmp_path / 'wide').mkdir()
  wide = pairs.ensure(tmp_path / 'wide', dataclasses.replace(ONE, batch_size=13), teacher())
  monkeypatch.setattr(sharding, '_in_use', [sharding._make(jax.devices()[:1], 1)])
  (tmp_path / 'one').mkdir()
  one = pairs.ensure(tmp_path / 'one', ONE, teacher())
  for other in map(everything, (wide, one)):
    np.testing.assert_array_equal(other['noise'], reference['noise'])
    np.testing.assert_allclose(other['image'], reference['image'], atol=1e-6)


def test_the_seed_makes_the_noise_and_the_teacher_the_images(drawn, tmp_path):
  reference = everything(pairs.ensure(drawn, ONE, teacher()))
  for name in ('seed', 'teacher'):
    (tmp_path / name).mkdir()
  other = everything(pairs.ensure(tmp_path / 'seed', dataclasses.replace(ONE, seed=8), teacher()))
  assert not np.isin(other['noise'], reference['noise']).any()
  other = everything(pairs.ensure(tmp_path / 'teacher', ONE, teacher(0.4)))
  np.testing.assert_array_equal(other['noise'], reference['noise'])
  np.testing.assert_allclose(other['image'], ddim(other['noise'], times.uniform(3), 0.4), atol=1e-5)


def test_a_conditional_teacher_s_pairs_have_the_labels_that_it_was_told(tmp_path):
  """In the data's proportions, or in turn; class c has its pixels around 0.2 + 0.1 c."""
  balanced = dataclasses.replace(ONE, labels='balanced')
  in_proportion = Classes(3).proportional(np.arange(20), ONE.seed, SIZES)
  assert np.bincount(in_proportion).argmax() == 2
  for name, sizes, law, expected in (
    ('data', SIZES, ONE, in_proportion),
    ('balanced', SIZES, balanced, np.arange(20) % 3),
    ('unknown', None, ONE, np.arange(20) % 3),
  ):
    found = everything(pairs.ensure(workdir_of(tmp_path / name, sizes), law, teacher(num_classes=3)))
    label = found['cond']['label']
    assert label.dtype == np.int32
    np.testing.assert_array_equal(label, expected)
    means = 0.2 + 0.1 * label[:, None, None, None]
    exact = ddim(found['noise'], times.uniform(3), means)
    np.testing.assert_allclose(found['image'], exact, atol=1e-5)


def test_pairs_of_before_had_balanced_labels_or_none(tmp_path, drawn, asked):
  """Those with labels go on as such, and are refused otherwise in a line that says how; the others just go on."""
  workdir, law = workdir_of(tmp_path / 'told', SIZES), dataclasses.replace(ONE, labels='balanced')
  pairs.ensure(workdir, law, teacher(num_classes=3))
  untold = a_copy(drawn, tmp_path / 'untold')
  for directory in (workdir, untold):
    path = directory / 'pairs' / 'pairs.json'
    described = json.loads(path.read_text())
    del described['labels']
    path.write_text(json.dumps(described))
  asked.clear()
  with pytest.raises(UserError, match=r'labels was balanced, is data; .* set pairs\.labels=balanced'):
    pairs.ensure(workdir, ONE, teacher(num_classes=3))
  pairs.ensure(workdir, law, teacher(num_classes=3))
  pairs.ensure(untold, ONE, teacher())
  assert not asked


def test_pairs_that_are_there_are_not_drawn_again(drawn, asked):
  before = {path: path.stat().st_mtime_ns for path in drawn.rglob('*')}
  first = pairs.ensure(drawn, ONE, teacher())
  assert not asked and before == {path: path.stat().st_mtime_ns for path in drawn.rglob('*')}
  stored = json.loads((drawn / 'pairs' / 'pairs.json').read_text())
  assert first.seconds == stored['seconds'] > 0 and len(first.digest) == 64
  assert sorted(path.name for path in (drawn / 'pairs').iterdir()) == [*FILES, 'pairs.json']


@pytest.mark.parametrize('way', ['raised', 'signal', 'killed between file and list', 'half a file'])
def test_interrupted_drawing_goes_on_and_ends_with_the_same_bytes(drawn, tmp_path, monkeypatch, way):
  reference, really = pairs.ensure(drawn, ONE, teacher()), sampling.Drawer.pairs

  class Stopped(Exception):
    pass

  def stop(*args):
    raise Stopped

  def draw(self, params, grid, seed, index):
    if index[0] == 8 and way == 'signal':
      signal.raise_signal(signal.SIGTERM)
    elif index[0] == 8 and way == 'raised':
      stop()
    elif index[0] == 8:
      monkeypatch.setattr(*{'k': (pairs, 'write_json'), 'h': (pairs.os, 'replace')}[way[0]], stop)
    return really(self, params, grid, seed, index)

  with monkeypatch.context() as patched:
    patched.setattr(sampling.Drawer, 'pairs', draw)
    patched.setattr(pairs, 'write_json', pairs.write_json)  # to be put back as they were
    patched.setattr(pairs.os, 'replace', pairs.os.replace)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
      interrupts.install()
      with pytest.raises(Preempted if way == 'signal' else Stopped):
        pairs.ensure(tmp_path, ONE, teacher())
    finally:
      interrupts._received.clear()
      for number, handler in handlers.items():
        signal.signal(number, handler)
      monkeypatch.undo()
  kept = 2 if way == 'signal' else 1
  assert len(content(tmp_path)[1]['digests']) == kept
  assert (tmp_path / 'pairs' / FILES[1]).exists() == (way in ('signal', 'killed between file and list'))
  again = []
  monkeypatch.setattr(sampling.Drawer, 'pairs', lambda *args: again.append(args[-1][0]) or really(*args))
  stored = pairs.ensure(tmp_path, ONE, teacher())
  assert again == [0, 8, 16][kept:]
  assert content(tmp_path) == content(drawn) and stored.digest == reference.digest


class Unpickled:
  """Leaves a trace where it is unpickled."""

  def __init__(self, trace):
    self.trace = trace

  def __reduce__(self):
    return pathlib.Path.touch, (self.trace,)


def damage(path, way, trace):
  whole = path.read_bytes()
  if way == 'missing':
    path.unlink()
  elif way == 'short':
    path.write_bytes(whole[:-5])
  elif way == 'one bit':
    path.write_bytes(whole[:200] + bytes([whole[200] ^ 1]) + whole[201:])
  elif way == 'objects':
    with path.open('wb') as file:
      np.save(file, np.array([Unpickled(trace)], object), allow_pickle=True)
  else:
    path.write_bytes(pickle.dumps(Unpickled(trace)))


def a_copy(drawn, workdir):
  (workdir / 'pairs').mkdir(parents=True)
  for path in (drawn / 'pairs').iterdir():
    (workdir / 'pairs' / path.name).write_bytes(path.read_bytes())
  return workdir


@pytest.mark.parametrize('way', ['missing', 'short', 'one bit', 'objects', 'pickle'])
def test_a_file_that_is_not_what_was_drawn_is_drawn_again(drawn, tmp_path, asked, caplog, way):
  workdir = a_copy(drawn, tmp_path / 'workdir')
  damage(workdir / 'pairs' / FILES[1], way, tmp_path / 'trace')
  stored = pairs.ensure(workdir, ONE, teacher())
  assert asked == [8] and content(workdir) == content(drawn)
  (record,) = caplog.records
  assert record.levelname == 'WARNING' and '00001.npy is damaged or missing' in record.getMessage()
  assert not (tmp_path / 'trace').exists()
  assert (
    everything(stored)['noise'].tobytes()
    == everything(pairs.ensure(drawn, ONE, teacher()))['noise'].tobytes()
  )


@pytest.mark.parametrize('way', ['objects', 'pickle'])
def test_nothing_is_unpickled_even_if_its_digest_is_listed(drawn, tmp_path, way):
  workdir = a_copy(drawn, tmp_path / 'workdir')
  path = workdir / 'pairs' / FILES[1]
  damage(path, way, tmp_path / 'trace')
  listed = json.loads((workdir / 'pairs' / 'pairs.json').read_text())
  listed['digests'][1] = pairs._digest(path)
  (workdir / 'pairs' / 'pairs.json').write_text(json.dumps(listed))
  with pytest.raises((ValueError, UserError)):
    pairs.ensure(workdir, ONE, teacher())
  assert not (tmp_path / 'trace').exists()


OTHERS = {
  'num_pairs': (dataclasses.replace(ONE, count=24), teacher()),
  'sampler': (dataclasses.replace(ONE, sampler=Heun()), teacher()),
  'clip_x': (dataclasses.replace(ONE, clip_x=True), teacher()),
  'num_steps': (dataclasses.replace(ONE, num_steps=4), teacher()),
  'grid': (dataclasses.replace(ONE, grid='karras'), teacher()),
  'seed': (dataclasses.replace(ONE, seed=8), teacher()),
  'batch_size': (dataclasses.replace(ONE, batch_size=4), teacher()),
  'teacher': (ONE, teacher(0.4)),
  'teacher ': (ONE, teacher(weights='last')),
}


@pytest.mark.parametrize('name', OTHERS)
@pytest.mark.parametrize('complete', [True, False])
def test_pairs_of_another_kind_are_refused_and_left_alone(drawn, tmp_path, asked, name, complete):
  workdir = a_copy(drawn, tmp_path)
  if not complete:
    listed = json.loads((workdir / 'pairs' / 'pairs.json').read_text())
    listed['digests'] = listed['digests'][:1]
    (workdir / 'pairs' / 'pairs.json').write_text(json.dumps(listed))
  before = {path: path.read_bytes() for path in (workdir / 'pairs').iterdir()}
  with pytest.raises(UserError) as error:
    pairs.ensure(workdir, *OTHERS[name])
  message = str(error.value)
  assert f': {name.strip()} was ' in message and 'remove' in message and '\n' not in message
  assert str(workdir / 'pairs' / 'pairs.json') in message
  assert before == {path: path.read_bytes() for path in (workdir / 'pairs').iterdir()} and not asked
