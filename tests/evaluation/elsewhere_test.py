"""Images and models from elsewhere, measured from the command line."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import dinov2, elsewhere, given, given_images, loading
from diffusion_distillation.evaluation.elsewhere import check_out
from diffusion_distillation.evaluation.frechet import Moments, frechet_distance
from diffusion_distillation.networks import conditioning
from diffusion_distillation.networks.dinov2 import Size, preprocess
from diffusion_distillation.run import evaluating
from tests import tiny


@pytest.fixture(scope='module')
def workdir(finished, tmp_path_factory):
  return shutil.copytree(finished, tmp_path_factory.mktemp('elsewhere') / 'workdir')


@pytest.fixture(scope='module')
def samples(workdir, tmp_path_factory):
  """What the last stage's row of results.json measures, as an .npz."""
  path = tmp_path_factory.mktemp('samples') / 'samples.npz'
  row = json.loads((workdir / 'results.json').read_text())['rows'][-1]
  code, _, err = tiny.run_cli(
    *('--mode=sample', f'--workdir={workdir}', f'--stage={row["stage"]}', f'--out={path}'),
    *(f'--num_samples={row["num_samples"]}', f'--seed={row["seed"]}'),
  )
  assert code == 0, err
  return path, row


def evaluate(*flags):
  code, out, err = tiny.run_cli('--mode=evaluate', *flags)
  assert code == 0, err
  *lines, path = out.strip().splitlines()
  with open(path) as file:
    return json.load(file), lines, path


def test_samples_measured_as_images_have_the_row_of_their_stage(workdir, samples):
  """Samples that were drawn and stored are as far from the data as those that never left the device."""
  path, row = samples
  before = {p.name: p.read_bytes() for p in workdir.glob('*.json')}
  found, lines, written = evaluate(f'--workdir={workdir}', f'--images={path}')
  assert found['value'] == pytest.approx(row['value'], rel=1e-6)
  assert found['metrics'] == pytest.approx(row['metrics'], rel=1e-6)
  assert found['errors'] == pytest.approx(row['errors'], rel=1e-6)
  assert found['metric'] == 'FD-digits' and found['num_images'] == row['num_samples']
  results = json.loads(before['results.json'])
  for key in ('reference', 'held_out', 'floor', 'extractor'):
    assert found[key] == results[key]
  assert str(workdir / f'images_{found["digest"][:12]}.json') == written
  assert {p.name: p.read_bytes() for p in workdir.glob('*.json') if str(p) != written} == before
  assert lines[0].split()[:4] == ['metric', 'value', 'error', 'floor']
  assert lines[1].split()[:2] == ['FD-digits', f'{found["value"]:.4f}'] and lines[1].endswith('lower')
  assert len(lines) == 1 + len(found['metrics'])


def test_a_folder_of_the_same_images_is_the_same_and_other_numbers_have_their_own_floor(
  workdir, samples, tmp_path
):
  with np.load(samples[0]) as arrays:
    images = arrays['images'][:40]
  folder = tmp_path / 'images'
  folder.mkdir()
  for k, image in enumerate(images):
    Image.fromarray(image[..., 0]).save(folder / f'{k:03d}.png')
  np.savez(tmp_path / 'same.npz', arr_0=images)
  out = tmp_path / 'found.json'
  one, _, path = evaluate(f'--workdir={workdir}', f'--images={folder}', f'--out={out}')
  assert path == str(out)
  other, _, _ = evaluate(f'--workdir={workdir}', f'--images={tmp_path / "same.npz"}', f'--out={out}')
  assert one['metrics'] == other['metrics'] and one['floor'] == other['floor']
  assert one['floor']['num_samples'] == one['num_images'] == 40
  kept = [path.name for path in (workdir / 'features').iterdir()]
  assert {'floor.safetensors', 'floor_40.safetensors'} <= set(kept)


@pytest.mark.slow
def test_without_a_workdir_the_config_names_the_dataset(workdir, samples, tmp_path):
  """The classifier is trained anew, and is the same one; nothing but --out is written."""
  out = tmp_path / 'found.json'
  found, _, _ = evaluate(*tiny.flags(), f'--images={samples[0]}', f'--out={out}')
  assert found['value'] == pytest.approx(samples[1]['value'], rel=1e-2)
  assert list(tmp_path.iterdir()) == [out]


@pytest.mark.slow
def test_the_folder_of_a_model_is_measured_like_its_stage(workdir, samples, tmp_path):
  folder, row = workdir / samples[1]['stage'] / 'model', samples[1]
  before = {path.name: path.read_bytes() for path in folder.iterdir()}
  found, _, _ = evaluate(*tiny.flags(), f'--workdir={folder}', f'--out={tmp_path / "x.json"}')
  assert found['value'] == pytest.approx(row['value'], rel=1e-2)
  for key in ('sampler', 'num_steps', 'nfe', 'num_samples', 'seed', 'digest', 'labels', 'guidance'):
    assert found[key] == row[key]
  assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


REFUSED = {
  'neither workdir nor out': (['--images={npz}', '--config=configs/digits.py'], '--config and --out'),
  'no place': (['--images={npz}'], 'needs --workdir'),
  'another suffix': (['--workdir={workdir}', '--images={npz}', '--out=x.png'], 'ends in .json'),
  'no directory': (['--workdir={workdir}', '--images={npz}', '--out=/no/x.json'], 'make it first'),
  'no images': (['--workdir={workdir}', '--images=/nowhere'], 'there is no such file'),
  'out of a run': (['--workdir={workdir}', '--out={tmp}/x.json'], 'a run writes results.json'),
  'model without out': (
    ['--workdir={workdir}/base/model', '--config=configs/digits.py'],
    'name --out=FILE.json',
  ),
  'model without config': (
    ['--workdir={workdir}/base/model', '--out={tmp}/x.json'],
    'name --config, whose',
  ),
  'no dataset': (
    ['--images={npz}', '--config=configs/digits.py', '--config.dataset.name=none', '--out={tmp}/x.json'],
    'dataset.name=none has none',
  ),
  'one image': (['--workdir={workdir}', '--images={one}'], 'holds 1 image; a distance needs at least 2'),
  'another size': (
    ['--workdir={workdir}', '--images={large}'],
    'images of 9 x 9 x 1, but FD-digits compares images of 8 x 8 x 1',
  ),
  'labels that there are not': (
    [
      '--workdir={workdir}/base/model',
      '--config={tiny}',
      '--config.evaluation.labels=dat',
      '--out={tmp}/x.json',
    ],
    'evaluation.labels',
  ),
  'an interval from top to bottom': (
    [
      *('--workdir={workdir}/base/model', '--config={tiny}', '--out={tmp}/x.json'),
      '--config.evaluation.guidance_interval=(3.0,0.3)',
    ],
    'evaluation.guidance_interval=(3.0, 0.3): the interval of guidance is 3,0.3',
  ),
  'statistics of Inception': (
    ['--workdir={workdir}', '--images={npz}', '--config={tiny}', '--config.evaluation.reference={fid}'],
    '2048 features, but FD-digits compares 64',
  ),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_measured_is_refused_in_one_line(workdir, samples, tmp_path, name):
  np.savez(tmp_path / 'one.npz', arr_0=np.zeros((1, 8, 8, 1), np.uint8))
  np.savez(tmp_path / 'large.npz', arr_0=np.zeros((5, 9, 9, 1), np.uint8))
  np.savez(tmp_path / 'fid.npz', mu=np.zeros(2048), sigma=np.zeros((2048, 2048), np.float32))
  places = {key: tmp_path / f'{key}.npz' for key in ('one', 'large', 'fid')}
  places |= {'npz': samples[0], 'workdir': workdir, 'tmp': tmp_path}
  flags, message = REFUSED[name]
  given_flags = []
  for flag in flags:
    given_flags += tiny.flags() if flag == '--config={tiny}' else [flag.format(**places)]
  before = sorted(workdir.iterdir())
  code, out, err = tiny.run_cli('--mode=evaluate', *given_flags)
  assert code == 2 and not out
  assert message in err and err.count('\n') == 1
  assert sorted(workdir.iterdir()) == before


def test_a_model_of_texts_without_prompts_is_refused_before_anything_is_computed(tmp_path):
  told = {'text': conditioning.Text(4, 8)}
  model = SimpleNamespace(stored=SimpleNamespace(denoise=SimpleNamespace(conditioning=told)))
  with pytest.raises(UserError, match=r'draws what a text says; name evaluation\.prompts=FILE'):
    elsewhere.measure_model(tiny.config(), model, tmp_path, tmp_path / 'out.json')


def test_a_model_of_latents_is_drawn_in_batches_of_its_own_size(monkeypatch):
  """A network decodes its images, so that fewer are drawn at a time than `evaluation.batch_size` says."""
  asked = []

  class Stop(Exception):
    pass

  def drawer(sampler, clip_x, batch_size, guidance):
    asked.append(batch_size)
    raise Stop

  stored = SimpleNamespace(
    **{'space': SimpleNamespace(own_programs=True), 'image_shape': (1024, 1024, 3)},
    **{
      'sampler': 'ddim',
      'clip_x': False,
      'denoise': SimpleNamespace(conditioning={}),
      'cond_dropout': 0.0,
    },
  )
  for own_programs, expected in ((True, loading.batch_size(stored, 32, 48)), (False, 32)):
    stored.space.own_programs = own_programs
    with pytest.raises(Stop):
      elsewhere.drawer(tiny.config(), SimpleNamespace(stored=stored, drawer=drawer))
    assert asked.pop() == expected <= 32
  assert (
    loading.batch_size(
      SimpleNamespace(**vars(stored) | {'space': SimpleNamespace(own_programs=True)}), 32, 48
    )
    < 32
  )


@pytest.mark.slow
def test_images_are_measured_by_dinov2_too(workdir, samples, tmp_path, monkeypatch):
  """Two pixels of each image stand for the network."""

  def forward(params, images, size):
    return images.reshape(len(images), -1)[:, 100_000 : 100_000 + size.width] + params['zero'][None]

  weights = dinov2.Weights({'zero': np.zeros(2, np.float32)}, Size(2, 1, 3), 'e' * 64)
  monkeypatch.setattr(dinov2, 'read_weights', lambda path, flag: weights)
  monkeypatch.setattr(dinov2, '_forward', forward)
  config = tiny.flags(evaluation__dinov2='dinov2.pth')
  found, lines, _ = evaluate(f'--workdir={workdir}', f'--images={samples[0]}', *config)
  with np.load(samples[0]) as arrays:
    inputs = preprocess(arrays['images']).reshape(len(arrays['images']), -1)[:, 100_000:100_002]
  train = preprocess(tiny.plan()[1].images.images).reshape(1437, -1)[:, 100_000:100_002]
  moments = [Moments(x.mean(0, np.float64), np.cov(np.float64(x).T)) for x in (inputs, train)]
  assert found['metrics']['fd_dinov2'] == pytest.approx(frechet_distance(*moments), rel=1e-4)
  assert found['dinov2']['digest'] == 'e' * 64 and any(line.startswith('fd_dinov2') for line in lines)


def test_grey_images_in_three_channels_are_those_of_a_grey_dataset_and_coloured_ones_are_not():
  grey = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1)).astype(np.uint8)
  colour = grey.repeat(3, axis=-1)
  np.testing.assert_array_equal(given._as_in_dataset(colour, (8, 8, 1), '--images=x', 'FD'), grey)
  np.testing.assert_array_equal(given._as_in_dataset(grey, (8, 8, 3), '--images=x', 'FD'), colour)
  colour[0, 0, 0, 0] ^= 1
  with pytest.raises(UserError, match='images of 8 x 8 x 3, but FD compares images of 8 x 8 x 1'):
    given._as_in_dataset(colour, (8, 8, 1), '--images=x', 'FD')


def test_the_digest_of_images_depends_on_pixels_and_order_alone(tmp_path, monkeypatch):
  extractor = type('Extractor', (), {'of': staticmethod(_pixels), 'metric': 'FID'})()
  images = np.random.default_rng(0).integers(0, 256, (30, 4, 4, 3)).astype(np.uint8)

  def digest(array, size):
    monkeypatch.setattr(given, 'batch_size', lambda extractor, number: size)
    np.savez(tmp_path / 'x.npz', arr_0=array)
    return given.features_of(extractor, given_images.open_images(tmp_path / 'x.npz'), (9, 9, 3))[1]

  assert digest(images, 8) == digest(images, 16)
  assert digest(images[::-1], 8) != digest(images, 8)
  assert digest(images.reshape(30, 2, 8, 3), 8) != digest(images, 8)


def test_images_of_several_sizes_are_measured_where_the_extractor_takes_them(tmp_path, monkeypatch):
  monkeypatch.setattr(given, 'batch_size', lambda extractor, number: 8)
  extractor = type('Extractor', (), {'of': staticmethod(_pixels), 'metric': 'FID'})()
  rng = np.random.default_rng(0)
  for k in range(11):
    shape = (4, 4, 3) if k % 3 else (5, 3, 3)
    Image.fromarray(rng.integers(0, 256, shape).astype(np.uint8)).save(tmp_path / f'{k:02d}.png')
  images = given_images.open_images(tmp_path)
  given.check(images, None, 'FID')
  found, digest = given.features_of(extractor, images, (9, 9, 3))
  assert found.count == 11 and found.some.shape == (11, 3) and len(digest) == 64
  first = np.stack([np.asarray(Image.open(tmp_path / f'{k:02d}.png'))[0, 0] for k in range(11)])
  np.testing.assert_allclose(found.moments.mean, first.mean(0))


def _pixels(images):
  from diffusion_distillation.evaluation.extracted import Extracted

  return Extracted(images.reshape(len(images), -1)[:, :3].astype(np.float32))


def test_out_is_a_json_file(tmp_path):
  assert check_out(None) is None and check_out(tmp_path / 'X.JSON') == tmp_path / 'X.JSON'
  with pytest.raises(UserError, match=r'ends in \.json'):
    check_out(tmp_path)


@pytest.mark.slow
def test_batches_of_another_size_change_no_value(workdir, tmp_path):
  """Also, on 8 devices what was measured on one: other batches, and other programs."""
  before = json.loads((workdir / 'results.json').read_text())['rows']
  config = tiny.config(evaluation__batch_size=16)
  copy = shutil.copytree(workdir, tmp_path / 'workdir')
  evaluating.evaluate(config, copy)
  after = json.loads((copy / 'results.json').read_text())['rows']
  assert {row['batch_size'] for row in after} == {16} != {row['batch_size'] for row in before}
  for one, other in zip(before, after, strict=True):
    assert other['metrics'] == pytest.approx(one['metrics'], rel=1e-6)
