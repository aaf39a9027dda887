"""What is added later is one file and one line: each of five things is defined here alone, and goes all the way."""

import dataclasses
import hashlib
import json
from typing import Any

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffusion_distillation
from diffusion_distillation import datasets
from diffusion_distillation.config import POSITIVE, key
from diffusion_distillation.datasets import InMemory
from diffusion_distillation.evaluation.metrics import METRICS
from diffusion_distillation.interop import importing
from diffusion_distillation.methods import METHODS, Student
from diffusion_distillation.methods.method import OneNetwork, StudentSection
from diffusion_distillation.networks import NETWORKS
from diffusion_distillation.networks.conditioning import Classes
from tests import tiny

pytestmark = pytest.mark.slow

# A network: three convolutions, told time and class by a shift of all channels.


@dataclasses.dataclass(frozen=True)
class ThreeSection:
  """Three convolutions."""

  width: int = key(4, 'Number of channels inside.', POSITIVE)


class Three(nn.Module):
  Section = ThreeSection

  out_ch: int
  width: int
  num_classes: int = 0
  dropout: float = 0.0

  @property
  def conditioning(self):
    return {'label': Classes(self.num_classes)} if self.num_classes else {}

  def check(self, image_shape):
    del image_shape

  @nn.compact
  def __call__(self, z, logsnr, cond, deterministic=True):
    told = [jnp.tanh(logsnr / 4.0)[:, None]]
    if self.num_classes:
      told.append(jax.nn.one_hot(cond['label'], self.num_classes))
    shift = nn.Dense(self.width, name='told')(jnp.concatenate(told, -1))[:, None, None, :]
    h = nn.swish(nn.Conv(self.width, (3, 3), name='first')(z) + shift)
    h = nn.swish(nn.Conv(self.width, (3, 3), name='second')(h) + shift)
    return nn.Conv(self.out_ch, (3, 3), name='last')(h)


# A method: the student says of pure noise what the teacher says of it. It needs no images.


@dataclasses.dataclass(frozen=True)
class EchoSection(StudentSection):
  """Regression on what the teacher says of pure noise."""

  loudness: float = key(1.0, 'Factor of the loss.', POSITIVE)


@flax.struct.dataclass
class Echo(OneNetwork, Student):
  schedule: Any = flax.struct.field(pytree_node=False)
  loudness: float = 1.0

  name = 'echo'
  Section = EchoSection
  needs = frozenset({'labels'})
  calls = 2

  @classmethod
  def from_config(cls, name, section, context):
    return cls(context.schedule, section.loudness)

  def networks(self, student, teacher):
    return {'student': student, 'teacher': teacher}

  def draw(self, rng, shape):
    return {'z': jax.random.normal(rng, shape)}

  def loss(self, nets, batch, rng, step):
    logsnr = self.schedule(jnp.ones(len(batch['z'])))
    said, heard = (nets[name](batch['z'], logsnr, batch['cond']).x for name in ('teacher', 'student'))
    loss = self.loudness * jnp.mean(jnp.square(heard - jax.lax.stop_gradient(said)))
    return loss, {'echo': loss}


# A dataset: stripes, upright or level.


def open_stripes(settings, role):
  count = {'train': 96, 'eval': 48}[role]
  rng = np.random.default_rng(count)
  labels = (np.arange(count) % 2).astype(np.int32)
  bright = rng.integers(0, 256, (count, 8, 1, 1)).astype(np.uint8)
  upright = np.broadcast_to(bright, (count, 8, 8, 1))
  turned = (labels == 1)[:, None, None, None]
  images = np.where(turned, upright.transpose(0, 2, 1, 3), upright)
  identity = hashlib.sha256(images.tobytes()).hexdigest()
  return InMemory(settings.name, (8, 8, 1), ('level', 'upright'), identity, images, labels)


# A metric: how far the means of the features are apart.


def mean_gap(samples, reference):
  return float(np.abs(samples.some.mean(0) - reference.some.mean(0)).max())


# A reader: weights of a model's folder, halved, under the description that lies beside them.


def read_halves(config, default, path, into):
  model = importing.read(path)
  halves = jax.tree.map(lambda leaf: leaf / 2, model.params)
  model = dataclasses.replace(model, params=halves)
  return importing.adopt_stored(config, into, model, {'source': 'halves', 'folder': str(path)})


@pytest.fixture(scope='module')
def registered():
  """One line each."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setitem(NETWORKS, 'three', Three)
    patch.setitem(METHODS, 'echo', Echo)
    patch.setitem(datasets.SOURCES, 'stripes', open_stripes)
    patch.setitem(METRICS, 'mean_gap', mean_gap)
    patch.setitem(importing.READERS, 'halves', read_halves)
    yield


OVERRIDES = {
  'model__name': 'three',
  'model__width': 6,
  'model__conditional': True,
  'model__output': 'x',
  'dataset__name': 'stripes',
  'methods': ('echo',),
  'echo__num_updates': 8,
  'echo__batch_size': 16,
  'echo__loudness': 2.0,
  'log__health_every': 4,
}


@pytest.fixture(scope='module')
def workdir(registered, tmp_path_factory):
  """A finished run of all of it."""
  path = tmp_path_factory.mktemp('extension') / 'workdir'
  code, _, err = tiny.run_cli(*tiny.flags(**OVERRIDES), f'--workdir={path}')
  assert code == 0, err
  return path


def test_base_and_student_are_trained_and_measured_by_the_new_metric(workdir):
  rows = json.loads((workdir / 'results.json').read_text())['rows']
  assert {row['stage'] for row in rows} == {'base', 'echo'}
  names = {'frechet', 'kid', 'precision', 'recall', 'inception_score', 'mean_gap'}
  assert all(set(row['metrics']) == names for row in rows)
  assert all(row['metric'] == 'FD-stripes' and row['metrics']['mean_gap'] > 0.0 for row in rows)
  assert 'mean_gap' in (workdir / 'report' / 'index.html').read_text()
  lines = [json.loads(line) for line in (workdir / 'echo' / 'metrics.jsonl').read_text().splitlines()]
  assert lines[-1]['echo'] == lines[-1]['loss'] and 'diversity' in lines[-1]


def test_its_models_are_loaded_and_drawn_from(workdir):
  model = diffusion_distillation.load(workdir / 'echo')
  assert isinstance(model.stored.denoise.network, Three) and model.stored.denoise.network.width == 6
  assert model.stored.class_names == ('level', 'upright') and model.stored.provenance['method'] == 'echo'
  assert ['mean_gap' in row['metrics'] for row in model.stored.metrics] == [True]
  images = model.sample(5, labels=[1])
  assert images.shape == (5, 8, 8, 1) and images.dtype == np.uint8


def test_it_is_sampled_and_evaluated_again_from_the_command_line(workdir, tmp_path):
  out = tmp_path / 'upright.npz'
  sample = ('--mode=sample', '--classes=upright', '--num_samples=5', f'--out={out}')
  code, _, err = tiny.run_cli(*sample, f'--workdir={workdir}')
  assert code == 0, err
  expected = diffusion_distillation.load(workdir / 'echo').sample(5, labels=[1])
  with np.load(out) as arrays:
    np.testing.assert_array_equal(arrays['images'], expected)
    assert arrays['labels'].tolist() == [1] * 5
  before = json.loads((workdir / 'results.json').read_text())['rows']
  code, _, err = tiny.run_cli('--mode=evaluate', f'--workdir={workdir}')
  assert code == 0, err
  after = json.loads((workdir / 'results.json').read_text())['rows']
  assert [row['metrics'] for row in after] == [row['metrics'] for row in before]


def test_the_reader_brings_a_teacher_that_is_distilled_without_any_dataset(workdir, tmp_path):
  into, folder = tmp_path / 'run', workdir / 'base' / 'model'
  arguments = tiny.flags(
    **OVERRIDES | {'dataset__name': 'none', 'model__name': 'unet', 'student__width': 5}
  )
  place = f'--workdir={into}'
  source = ('--mode=import', '--source=halves', f'--checkpoint={folder}')
  code, _, err = tiny.run_cli(*arguments, *source, place)
  assert code == 0, err
  code, _, err = tiny.run_cli(*arguments, place)
  assert code == 0, err
  teacher, theirs = diffusion_distillation.load(into / 'base'), diffusion_distillation.load(folder)
  student = diffusion_distillation.load(into / 'echo')
  kernel = [m.stored.params['first']['kernel'] for m in (teacher, theirs, student)]
  np.testing.assert_array_equal(2 * kernel[0], kernel[1])
  assert isinstance(student.stored.denoise.network, Three) and kernel[2].shape == (3, 3, 1, 5)
  assert student.stored.class_names == ('level', 'upright')
  assert teacher.stored.label_counts == theirs.stored.label_counts and sum(theirs.stored.label_counts)
  assert not (into / 'dataset.json').exists() and not (into / 'results.json').exists()
