import json

import numpy as np
import pytest
from PIL import Image

from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.evaluation import features, pictures, report
from tests import tiny


def row(stage, sampler, nfe, value):
  method = 'denoising' if stage == 'base' else 'progressive'
  extra = {'num_steps': nfe, 'seconds_per_image': 0.001, 'updates': 10}
  return {'stage': stage, 'method': method, 'sampler': sampler, 'nfe': nfe, 'value': value} | extra


ROWS = [
  row('base', 'ddim', 4, 2.0),
  row('base', 'ancestral', 4, 3.0),
  row('base', 'ddim', 2, 20.0),
  row('progressive_0002', 'ddim', 2, 2.5),
]


def test_the_table_compares_at_each_number_of_network_calls():
  assert report.comparison(ROWS) == [
    {'nfe': 4, 'values': [None, 2.0, 3.0], 'ratio': None},
    {'nfe': 2, 'values': [2.5, 20.0, None], 'ratio': 1.25},
  ]


def test_the_figure_is_log_log_with_three_curves_and_the_floor():
  figure = report.distance_figure(
    {'rows': ROWS, 'metric': 'FD-digits', 'floor': {'value': 0.5, 'num_samples': 100}}
  )
  (axes,) = figure.axes
  assert axes.get_xscale() == axes.get_yscale() == 'log'
  curves = {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in axes.lines}
  assert curves['Distilled'] == [(2, 2.5)]
  assert curves['Base, DDIM'] == [(2, 20.0), (4, 2.0)]
  assert curves['Base, ancestral'] == [(4, 3.0)]
  assert [y for _, y in curves['Real against real']] == [0.5, 0.5]


def test_what_the_page_shows_is_escaped(tmp_path):
  results = {
    'rows': ROWS,
    'metric': 'FD-<b>',
    'floor': {'value': 0.5, 'num_samples': 100},
    'extractor': {'name': 'digits', 'digest': 'ab' * 32, 'held_out_accuracy': 0.99},
    'reference': {'num_images': 7},
    'held_out': {'value': 1.0, 'num_samples': 3},
    'versions': {'jax': '1'},
    'seconds': {'base': 2.0},
  }
  images = np.zeros((3, 8, 8, 1), np.uint8)
  report.write(tiny.config(), results, {'base\n4 steps': images}, tmp_path / 'report')
  text = (tmp_path / 'report' / 'index.html').read_text()
  assert 'FD-&lt;b&gt;' in text and 'FD-<b>' not in text


def test_a_grid_puts_every_image_where_it_belongs():
  images = np.arange(5, dtype=np.uint8).reshape(5, 1, 1, 1) * np.ones((1, 4, 4, 1), np.uint8)
  sheet = pictures.grid(images, columns=3, gap=2)
  assert sheet.shape == (2 * 6 + 2, 3 * 6 + 2, 1)
  for k in range(5):
    top, left = 2 + 6 * (k // 3), 2 + 6 * (k % 3)
    assert (sheet[top : top + 4, left : left + 4] == k).all()
  assert (sheet[8:12, 14:18] == 255).all()
  assert (sheet == 255).sum() == sheet.size - 5 * 16


@pytest.mark.parametrize('channels', [1, 3])
def test_png_and_npz_hold_the_images(tmp_path, channels):
  images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, channels)).astype(np.uint8)
  pictures.save(tmp_path / 'x.npz', images, np.arange(4))
  with np.load(tmp_path / 'x.npz', allow_pickle=False) as arrays:
    np.testing.assert_array_equal(arrays['images'], images)
    assert arrays['labels'].tolist() == [0, 1, 2, 3]
  pictures.save(tmp_path / 'x.png', images, None)
  with Image.open(tmp_path / 'x.png') as image:
    sheet = np.asarray(image).reshape(70, 70, channels)
  np.testing.assert_array_equal(sheet[2:34:4, 2:34:4], images[0])
  np.testing.assert_array_equal(sheet[36:68:4, 36:68:4], images[3])
  assert sorted(path.name for path in tmp_path.iterdir()) == ['x.npz', 'x.png']


def test_out_has_to_be_a_png_or_npz_in_a_directory(tmp_path):
  assert pictures.check_out(tmp_path / 'x.png') == tmp_path / 'x.png'
  for out in (None, tmp_path / 'x.gif', tmp_path / 'no' / 'x.png'):
    with pytest.raises(UserError, match='--out'):
      pictures.check_out(out)


def test_a_damaged_extractor_is_named_and_not_used(finished, tmp_path):
  whole = (finished / 'extractor.safetensors').read_bytes()
  path = tmp_path / 'extractor.safetensors'
  for position in (12, len(whole) // 2):
    content = bytearray(whole)
    content[position] ^= 1
    for damaged in (bytes(content), whole[: len(whole) // 2]):
      path.write_bytes(damaged)
      with pytest.raises(DamagedError, match=r'extractor\.safetensors is damaged'):
        features.load_or_train(path, None, None)
      assert path.read_bytes() == damaged


def test_the_stored_extractor_is_the_one_of_the_results(finished):
  extractor = features.load_or_train(finished / 'extractor.safetensors', None, None)
  results = json.loads((finished / 'results.json').read_text())
  assert extractor.digest == results['extractor']['digest']
  images = np.random.default_rng(0).integers(0, 256, (7, 8, 8, 1)).astype(np.uint8)
  assert extractor(images).shape == (7, 64)
  np.testing.assert_allclose(extractor(images)[:2], extractor(images[:2]), rtol=1e-5)
