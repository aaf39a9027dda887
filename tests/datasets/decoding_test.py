"""From a file's bytes to pixels: what arrives is what Pillow shows a person."""

import concurrent.futures
import io
import subprocess
import sys
import warnings

import numpy as np
import PIL
import pytest
from PIL import Image

from diffusion_distillation.datasets import decoding
from diffusion_distillation.datasets.image_set import BrokenImage
from tests import tiny


def noise(height, width, channels=3, seed=0, dtype=np.uint8):
  values = np.random.default_rng(seed).integers(0, np.iinfo(dtype).max + 1, (height, width, channels))
  return values.astype(dtype)


def picture(*shape, mode='RGB', seed=0):
  """Noise of the shape (H, W), in one of Pillow's modes."""
  return Image.fromarray(noise(*shape, seed=seed)).convert(mode)


def encoded(image, format, **options):
  file = io.BytesIO()
  image.save(file, format, **options)
  return file.getvalue()


def opened(data):
  return Image.open(io.BytesIO(data))


def decode(data, size=6, channels=3, resize='area'):
  pixels = decoding.Decoder(size, channels, resize)(data)
  assert pixels.shape == (size, size, channels) and pixels.dtype == np.uint8
  return pixels


LOSSLESS = [
  ('PNG', {}),
  ('BMP', {}),
  ('PPM', {}),
  ('TIFF', {}),
  ('TIFF', {'compression': 'tiff_lzw'}),
  ('WEBP', {'lossless': True}),
]


@pytest.mark.parametrize('resize', decoding.RESIZE)
@pytest.mark.parametrize(('format', 'options'), LOSSLESS, ids=str)
def test_an_image_of_the_size_arrives_bit_for_bit(format, options, resize):
  pixels = noise(6, 6)
  data = encoded(Image.fromarray(pixels), format, **options)
  np.testing.assert_array_equal(decode(data, resize=resize), pixels)


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize(
  ('mode', 'format'),
  [
    ('RGB', 'JPEG'),
    ('RGB', 'WEBP'),
    ('RGB', 'AVIF'),
    ('RGB', 'PNG'),
    ('L', 'PNG'),
    ('L', 'JPEG'),
    ('1', 'PNG'),
    ('1', 'TIFF'),
    ('P', 'PNG'),
    ('P', 'GIF'),
    ('P', 'BMP'),
    ('CMYK', 'JPEG'),
    ('CMYK', 'TIFF'),
    pytest.param(
      'YCbCr',
      'TIFF',
      marks=pytest.mark.skipif(
        int(PIL.__version__.split('.')[0]) < 13, reason='Pillow 12 does not read the file that it writes'
      ),
    ),
  ],
)
def test_every_kind_of_pixel_is_converted_as_pillow_converts_it(mode, format, channels):
  data = encoded(picture(6, 6, mode=mode), format)
  expected = np.asarray(opened(data).convert('L' if channels == 1 else 'RGB'))
  assert len(np.unique(expected)) > 1
  np.testing.assert_array_equal(decode(data, channels=channels), expected.reshape(6, 6, channels))


@pytest.mark.parametrize('mode', ['RGBA', 'LA'])
@pytest.mark.parametrize(
  ('format', 'options'), [('PNG', {}), ('WEBP', {'lossless': True, 'exact': True})]
)
def test_transparent_pixels_lie_over_white(mode, format, options):
  """Whatever colour hides behind a transparent pixel; an opaque one is left as it is."""
  pixels = noise(6, 6, 4)
  pixels[0, :, 3], pixels[1, :, 3] = 0, 255
  image = Image.fromarray(pixels).convert(mode)
  values = np.asarray(image).astype(float)
  share = values[..., -1:] / 255
  expected = np.broadcast_to(values[..., :-1] * share + 255 * (1 - share), (6, 6, 3))
  arrived = decode(encoded(image, format, **options))
  np.testing.assert_allclose(arrived, expected, atol=0.51)
  assert (arrived[0] == 255).all()
  np.testing.assert_array_equal(arrived[1], expected[1])


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize(('mode', 'hidden'), [('P', 3), ('L', 30), ('RGB', (7, 8, 9))])
def test_a_colour_that_stands_for_transparent_is_white(mode, hidden, channels):
  image = Image.new(mode, (6, 6), hidden)
  if mode == 'P':
    image.putpalette([5 * k for k in range(8) for _ in 'RGB'])
  image.paste(1 if mode != 'RGB' else (1, 2, 3), (0, 0, 3, 6))
  arrived = decode(encoded(image, 'PNG', transparency=hidden), channels=channels)
  assert (arrived[:, 3:] == 255).all() and (arrived[:, :3] < 10).all()


def test_a_palette_with_shares_of_transparency_lies_over_white():
  image = Image.fromarray(np.arange(36, dtype=np.uint8).reshape(6, 6) % 3, 'P')
  image.putpalette([0, 0, 0] * 3)
  arrived = decode(encoded(image, 'PNG', transparency=bytes([255, 0, 51])))
  np.testing.assert_array_equal(arrived[0, :3, 0], [0, 255, 204])


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('format', ['PNG', 'TIFF', 'PPM'])
def test_sixteen_bits_are_scaled_to_eight(format, channels):
  """65535 = 255 * 257 is white: all multiples of 257 are exact, others go to the nearest."""
  exact = (257 * np.arange(256)).astype(np.uint16).reshape(16, 16)
  arrived = decode(encoded(Image.fromarray(exact), format), 16, channels)
  np.testing.assert_array_equal(arrived, np.broadcast_to((exact // 257)[..., None], (16, 16, channels)))
  values = noise(16, 16, 1, dtype=np.uint16)
  arrived = decode(encoded(Image.fromarray(values[..., 0]), format), 16, channels)
  np.testing.assert_allclose(arrived, np.broadcast_to(values / 257, arrived.shape), atol=0.5)


def test_a_transparent_grey_of_sixteen_bits_is_white():
  values = np.full((6, 6), 257, np.uint16)
  values[:, 3:] = 5000
  arrived = decode(encoded(Image.fromarray(values), 'PNG', transparency=5000))
  assert (arrived[:, :3] == 1).all() and (arrived[:, 3:] == 255).all()


@pytest.mark.parametrize(
  ('values', 'message'),
  [
    (np.full((6, 6), 0.5, np.float32), 'floating-point pixels'),
    (np.full((6, 6), 65536, np.int32), 'beyond 16 bits'),
    (np.full((6, 6), -1, np.int32), 'beyond 16 bits'),
  ],
)
def test_pixels_without_a_known_range_are_refused(values, message):
  values[0, 0] = 0
  with pytest.raises(BrokenImage, match=f'cannot be decoded: .*{message}'):
    decode(encoded(Image.fromarray(values), 'TIFF'))


@pytest.mark.parametrize('format', ['GIF', 'PNG', 'WEBP'])
def test_of_an_animation_the_first_frame_arrives(format):
  frames = [Image.new('RGB', (6, 6), colour) for colour in ('red', 'lime', 'blue')]
  data = encoded(frames[0], format, save_all=True, append_images=frames[1:], lossless=True)
  assert opened(data).n_frames == 3
  np.testing.assert_array_equal(decode(data), np.full((6, 6, 3), [255, 0, 0]))


UPRIGHT = {
  1: lambda stored: stored,
  2: lambda stored: stored[:, ::-1],
  3: lambda stored: stored[::-1, ::-1],
  4: lambda stored: stored[::-1],
  5: lambda stored: stored.swapaxes(0, 1),
  6: lambda stored: np.rot90(stored, -1),
  7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
  8: lambda stored: np.rot90(stored, 1),
}


@pytest.mark.parametrize(
  ('format', 'options'), [('PNG', {}), ('TIFF', {}), ('WEBP', {'lossless': True})]
)
@pytest.mark.parametrize('orientation', UPRIGHT)
def test_photographs_are_turned_upright_before_they_are_cropped(orientation, format, options):
  stored = noise(6, 9)
  exif = Image.Exif()
  exif[0x0112] = orientation
  seen = UPRIGHT[orientation](stored)
  top, left = seen.shape[0] // 2 - 3, seen.shape[1] // 2 - 3
  arrived = decode(encoded(Image.fromarray(stored), format, exif=exif, **options))
  np.testing.assert_array_equal(arrived, seen[top : top + 6, left : left + 6])


@pytest.mark.parametrize('share', [0.05, 0.5, 0.97])
@pytest.mark.parametrize('format', ['PNG', 'JPEG', 'WEBP', 'GIF', 'BMP', 'TIFF', 'PPM', 'AVIF'])
def test_a_file_that_ends_early_is_broken(format, share):
  data = encoded(picture(40, 40), format)
  decode(data)
  with pytest.raises(BrokenImage):
    decode(data[: int(share * len(data))])


EPS = b"""%!PS-Adobe-3.0 EPSF-3.0
%%BoundingBox: 0 0 100 100
%%EndComments
newpath 0 0 moveto 100 100 lineto stroke showpage
%%EOF
"""


@pytest.mark.parametrize('data', [b'cats are not pixels\n', b'<html></html>', EPS], ids=range(3))
def test_what_is_none_of_the_formats_is_refused(data):
  with pytest.raises(BrokenImage, match=r'is none of PNG, JPEG, .*AVIF'):
    decode(data)


@pytest.mark.parametrize('shape', [(5, 12), (12, 5), (5, 5)])
def test_images_are_not_enlarged(shape):
  data = encoded(picture(*shape), 'PNG')
  with pytest.raises(
    BrokenImage, match=f'^is {shape[1]}x{shape[0]}, smaller than dataset.image_size=6$'
  ):
    decode(data)
  assert decode(data, size=5).shape == (5, 5, 3)


@pytest.mark.parametrize(
  ('shape', 'top', 'left'),
  [((7, 4), 1, 0), ((4, 7), 0, 1), ((7, 5), 1, 0), ((5, 8), 0, 2), ((9, 4), 2, 0), ((6, 6), 0, 0)],
)
def test_the_central_square_is_kept(shape, top, left):
  pixels, side = noise(*shape), min(shape)
  assert (top, left) == (shape[0] // 2 - side // 2, shape[1] // 2 - side // 2)
  arrived = decode(encoded(Image.fromarray(pixels), 'PNG'), side)
  np.testing.assert_array_equal(arrived, pixels[top : top + side, left : left + side])


@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('resize', decoding.FILTERS)
def test_filters_are_pillows_own(resize, channels):
  image = picture(20, 23, mode='L' if channels == 1 else 'RGB')
  arrived = decode(encoded(image, 'PNG'), 6, channels, resize)
  square = image.crop((1, 0, 21, 20))
  expected = square.resize((6, 6), getattr(Image.Resampling, resize.upper()))
  np.testing.assert_array_equal(arrived, np.asarray(expected).reshape(6, 6, channels))


def by_repeating(pixels, size):
  """Mean over new pixels of a square image: each pixel is cut into `size` parts a side, which add up."""
  side, _, channels = pixels.shape
  fine = pixels.astype(np.float64).repeat(size, 0).repeat(size, 1)
  return fine.reshape(size, side, size, side, channels).mean((1, 3))


@pytest.mark.parametrize('size', [2, 3, 6, 12])
def test_area_gives_the_means_of_blocks(size):
  pixels, block = noise(12, 12), 12 // size
  expected = pixels.reshape(size, block, size, block, 3).mean((1, 3))
  np.testing.assert_allclose(decoding.area(pixels, size), expected, rtol=1e-14)


@pytest.mark.parametrize(('side', 'size'), [(7, 3), (10, 4), (9, 8), (31, 11), (5, 1), (3, 7), (4, 8)])
def test_area_weighs_pixels_by_their_share(side, size):
  """Both to fewer pixels and, though the decoder does not ask for it, to more."""
  pixels = noise(side, side, seed=side)
  resized = decoding.area(pixels, size)
  np.testing.assert_allclose(resized, by_repeating(pixels, size), rtol=1e-12)
  np.testing.assert_allclose(resized.mean((0, 1)), pixels.mean((0, 1), np.float64), rtol=1e-12)


def test_area_takes_height_and_width_apart():
  pixels = noise(4, 10)
  rows = pixels.reshape(2, 2, 10, 3).mean(1)
  expected = rows.reshape(2, 2, 5, 3).mean(2)
  np.testing.assert_allclose(decoding.area(pixels, 2), expected, rtol=1e-14)


@pytest.mark.parametrize('value', [0, 1, 127, 255])
def test_area_leaves_a_plain_image_plain(value):
  plain = Image.new('RGB', (67, 59), (value,) * 3)
  assert (decode(encoded(plain, 'PNG'), 13) == value).all()


@pytest.mark.parametrize('channels', [1, 3])
def test_area_is_rounded_once_to_the_nearest(channels):
  image = picture(35, 36, mode='L' if channels == 1 else 'RGB')
  arrived = decode(encoded(image, 'PNG'), 8, channels)
  square = np.asarray(image).reshape(35, 36, channels)[:, 1:]
  np.testing.assert_allclose(arrived, by_repeating(square, 8), atol=0.5)


@pytest.mark.parametrize('block', [2, 6, 10, 14])
def test_halves_go_up(block):
  """Also where float64 may fall short of a half: 1/6 and such are no sums of powers of 2."""
  below = noise(6, 6) // 2
  stripes = np.arange(6 * block) % 2
  pixels = below.repeat(block, 0).repeat(block, 1) + stripes[None, :, None].astype(np.uint8)
  np.testing.assert_array_equal(decode(encoded(Image.fromarray(pixels), 'PNG')), below + 1)


def test_large_images_are_read_in_silence_and_enormous_ones_are_not_read(monkeypatch):
  """Pillow warns beyond a number of pixels, and refuses beyond twice as many."""
  data = encoded(picture(6, 10), 'PNG')
  program = (
    'import io; from PIL import Image; from diffusion_distillation.datasets.decoding import Decoder;'
    f'Image.MAX_IMAGE_PIXELS = 40; Decoder(6, 3, "area")({data!r});'
    f'Image.open(io.BytesIO({data!r}))'
  )
  run = subprocess.run([sys.executable, '-c', program], cwd=tiny.ROOT, capture_output=True, check=True)
  assert run.stderr == b''
  monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 20)
  with pytest.raises(BrokenImage, match=r'cannot be decoded: .*exceeds limit'):
    decode(data)


def test_threads_that_decode_do_not_silence_the_process():
  data = encoded(picture(100, 100), 'PNG')
  with (
    warnings.catch_warnings(record=True) as caught,
    concurrent.futures.ThreadPoolExecutor(8) as threads,
  ):
    warnings.simplefilter('always')
    for _ in range(4):
      list(threads.map(decode, [data] * 100))
    warnings.warn('of something else', stacklevel=1)
  assert [str(warning.message) for warning in caught] == ['of something else']
