"""Embedded colour profiles: what a profile says of a colour is compared with the definitions of the colour spaces."""

import io
import itertools
import json
import logging
import struct

import numpy as np
import pytest
from PIL import Image

from diffusion_distillation import datasets
from diffusion_distillation.datasets import colours, decoding, preparing
from diffusion_distillation.errors import UserError
from tests import tiny_pictures
from tests.datasets.decoding_test import encoded, noise, opened

D50, D65 = np.array([0.9642, 1.0, 0.8249]), (0.3127, 0.3290)
SRGB = ((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))  # ITU-R BT.709's primaries
P3 = ((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))  # SMPTE RP 431-2's
ADOBE = ((0.64, 0.33), (0.21, 0.71), (0.15, 0.06))  # Adobe RGB (1998)'s
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


def xyz(x, y):
  return np.array([x / y, 1.0, (1.0 - x - y) / y])


def to_xyz(primaries):
  """(3, 3): linear RGB to XYZ, with D65 as white."""
  columns = np.stack([xyz(*p) for p in primaries], axis=1)
  return columns * np.linalg.solve(columns, xyz(*D65))


def from_linear(x):
  """sRGB's curve, IEC 61966-2-1."""
  x = np.clip(x, 0.0, 1.0)
  return np.where(x <= 0.0031308, 12.92 * x, 1.055 * x ** (1 / 2.4) - 0.055)


def seen(pixels, primaries, gamma):
  """The sRGB values, 0 to 255, of pixels (..., 3) in the space of those primaries."""
  linear = (np.asarray(pixels) / 255.0) ** gamma
  matrix = np.linalg.inv(to_xyz(SRGB)) @ to_xyz(primaries)
  return 255.0 * from_linear(linear @ matrix.T)


def fixed(*values):
  return b''.join(struct.pack('>i', round(value * 65536)) for value in values)


def icc(space, tags):
  """An ICC profile, version 2, of a display."""
  tags = {'desc': b'desc' + bytes(4) + struct.pack('>I', 2) + b'x' + bytes(79), **tags}
  tags |= {'cprt': b'text' + bytes(4) + b'x\0', 'wtpt': b'XYZ ' + bytes(4) + fixed(*D50)}
  table, body = struct.pack('>I', len(tags)), b''
  for name, data in tags.items():
    table += struct.pack('>4sII', name.encode(), 132 + 12 * len(tags) + len(body), len(data))
    body += data + bytes(-len(data) % 4)
  head = struct.pack(
    '>I4sI4s4s4s', 128 + len(table + body), b'lcms', 0x02400000, b'mntr', space, b'XYZ '
  )
  head += struct.pack('>6H', 2020, 1, 1, 0, 0, 0) + b'acsp' + bytes(28) + fixed(*D50)
  return head.ljust(128, b'\0') + table + body


def curve(gamma):
  """A power, or sRGB's own curve for None."""
  if gamma is not None:
    return b'para' + bytes(4) + struct.pack('>HH', 0, 0) + fixed(gamma)
  return (
    b'para'
    + bytes(4)
    + struct.pack('>HH', 3, 0)
    + fixed(2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)
  )


def rgb_profile(primaries, gamma):
  scale = (BRADFORD @ D50) / (BRADFORD @ xyz(*D65))
  adapted = np.linalg.inv(BRADFORD) @ np.diag(scale) @ BRADFORD @ to_xyz(primaries)
  columns = {f'{c}XYZ': b'XYZ ' + bytes(4) + fixed(*adapted[:, k]) for k, c in enumerate('rgb')}
  return icc(b'RGB ', columns | {f'{c}TRC': curve(gamma) for c in 'rgb'})


def grey_profile(gamma):
  return icc(b'GRAY', {'kTRC': curve(gamma)})


def decode(image, profile, form='PNG', channels=3, **options):
  data = encoded(image, form, icc_profile=profile, **options)
  return decoding.Decoder(min(image.size), channels, 'area')(data)


WIDE = rgb_profile(P3, 2.2)
LOSSLESS = {'PNG': {}, 'TIFF': {}, 'WEBP': {'lossless': True}}


@pytest.mark.parametrize('form', [*LOSSLESS, 'JPEG', 'AVIF'])
def test_a_colour_of_p3_is_shown_as_srgb(form):
  atol = 1 if form in LOSSLESS else 4
  image = Image.new('RGB', (8, 8), (60, 160, 60))
  options = LOSSLESS.get(form, {'quality': 100, 'subsampling': 0 if form == 'JPEG' else '4:4:4'})
  np.testing.assert_allclose(
    decode(image, WIDE, form, **options), np.full((8, 8, 3), (0, 164, 35)), atol=atol
  )
  assert np.abs(decode(image, None, form, **options).astype(int) - (60, 160, 60)).max() <= 2


@pytest.mark.parametrize('method', [2, 3])
@pytest.mark.parametrize('large', [False, True], ids=['32 bits', '64 bits'])
def test_the_profile_in_a_box_of_jpeg_2000_is_used(method, large):
  """Pillow neither reads nor writes it."""
  data = encoded(Image.new('RGB', (8, 8), (60, 160, 60)), 'JPEG2000')
  at = data.index(b'jp2h') - 4
  length = int.from_bytes(data[at : at + 4], 'big')
  header = data[at + 8 : at + length]
  colour = header.index(b'colr') - 4
  end = colour + int.from_bytes(header[colour : colour + 4], 'big')
  box = struct.pack('>I4s3B', 11 + len(WIDE), b'colr', method, 0, 0) + WIDE
  header = header[:colour] + box + header[end:]
  size = struct.pack('>I4sQ', 1, b'jp2h', 16 + len(header))
  size = size if large else struct.pack('>I4s', 8 + len(header), b'jp2h')
  changed = data[:at] + size + header + data[at + length :]
  decode_it = decoding.Decoder(8, 3, 'area')
  np.testing.assert_allclose(decode_it(changed), np.full((8, 8, 3), (0, 164, 35)), atol=1)
  np.testing.assert_array_equal(decode_it(data), np.full((8, 8, 3), (60, 160, 60)))


def test_boxes_end_where_the_file_is_cut_or_damaged():
  box = struct.pack('>I4s', 12, b'colr') + bytes(4)
  assert list(colours._boxes(box)) == [(b'colr', bytes(4))]
  assert list(colours._boxes(struct.pack('>I4s', 0, b'jp2c') + bytes(9))) == [(b'jp2c', bytes(9))]
  for length in (1, 2, 7):
    assert not list(colours._boxes(struct.pack('>I4s', length, b'jp2h')))
  assert not list(colours._boxes(b'jp2'))


@pytest.mark.parametrize(('primaries', 'gamma'), [(P3, 2.2), (ADOBE, 563 / 256), (SRGB, 1.8)], ids=str)
def test_colours_are_those_that_the_profile_defines(primaries, gamma):
  """To two of 255 levels, which lcms's arithmetic and the profile's rounding may take."""
  pixels = noise(16, 16)
  arrived = decode(Image.fromarray(pixels), rgb_profile(primaries, gamma))
  np.testing.assert_allclose(arrived, seen(pixels, primaries, gamma), atol=2)


@pytest.mark.parametrize('form', LOSSLESS)
@pytest.mark.parametrize('mode', ['RGB', 'RGBA', 'P', 'L', 'LA', '1'])
def test_every_mode_is_converted_and_transparency_lies_over_white_thereafter(mode, form):
  pixels = noise(8, 8, 4)
  image = Image.fromarray(pixels).convert(mode)
  options = LOSSLESS[form] | ({'exact': True} if form == 'WEBP' else {})
  stored = opened(encoded(image, form, **options)).convert('RGBA')
  colour, share = np.asarray(stored)[..., :3], np.asarray(stored)[..., 3:] / 255.0
  expected = share * seen(colour, P3, 2.2) + (1.0 - share) * 255.0
  np.testing.assert_allclose(decode(image, WIDE, form, **options), expected, atol=2)


@pytest.mark.parametrize('mode', ['L', 'LA', 'I;16'])
def test_grey_profiles_change_greys(mode):
  values = np.arange(256, dtype=np.uint16).reshape(16, 16)
  image = (
    Image.fromarray(257 * values)
    if mode == 'I;16'
    else Image.fromarray(values.astype(np.uint8)).convert(mode)
  )
  expected = 255.0 * from_linear((values / 255.0) ** 1.4)
  assert np.abs(expected - values).max() > 20
  for channels in (1, 3):
    arrived = decode(image, grey_profile(1.4), channels=channels)
    np.testing.assert_allclose(arrived, np.broadcast_to(expected[..., None], arrived.shape), atol=2)


def test_transparent_colours_of_a_palette_are_white():
  image = Image.new('P', (8, 8), 0)
  image.putpalette([60, 160, 60, 0, 0, 0])
  image.paste(1, (4, 0, 8, 8))
  arrived = decode(image, WIDE, transparency=1)
  np.testing.assert_allclose(arrived[:, :4], np.full((8, 4, 3), (0, 164, 35)), atol=1)
  assert (arrived[:, 4:] == 255).all()


@pytest.mark.parametrize('form', ['JPEG', 'TIFF'])
def test_cmyk_is_converted_by_its_profile(form):
  """One whose table has the corners alone: without ink white, with much ink black, in L*a*b*."""
  corners = itertools.product((0.0, 1.0), repeat=4)
  lab = b''.join(
    struct.pack('>3H', round(0xFF00 * max(0.0, 1 - sum(c) / 4)), 0x8000, 0x8000) for c in corners
  )
  linear = struct.pack('>2H', 0, 0xFFFF)
  table = b'mft2' + bytes(4) + struct.pack('>4B', 4, 3, 2, 0) + fixed(1, 0, 0, 0, 1, 0, 0, 0, 1)
  table += struct.pack('>2H', 2, 2) + 4 * linear + lab + 3 * linear
  profile = bytearray(icc(b'CMYK', {'A2B0': table, 'A2B1': table}))
  profile[12:16], profile[20:24] = b'prtr', b'Lab '
  image = Image.new('CMYK', (8, 8), (102, 0, 51, 0))  # 0.6 of an ink in all: L* = 100 (1 - 0.6 / 4) = 85
  options = {'quality': 100, 'subsampling': 0} if form == 'JPEG' else {}
  lightness = ((85 + 16) / 116) ** 3
  expected = 255.0 * from_linear(np.array(lightness))
  arrived = decode(image, bytes(profile), form, **options)
  np.testing.assert_allclose(arrived, np.full((8, 8, 3), expected), atol=3)
  assert np.abs(decode(image, None, form, **options).astype(int) - arrived).max() > 20


@pytest.mark.parametrize('profile', [rgb_profile(SRGB, None), None], ids=['srgb', 'none'])
def test_srgb_arrives_bit_for_bit(profile):
  pixels = noise(16, 16)
  np.testing.assert_array_equal(decode(Image.fromarray(pixels), profile), pixels)


@pytest.mark.parametrize('mode', ['RGB', 'L', 'RGBA'])
def test_a_profile_that_does_not_fit_is_left_aside(mode):
  profile = grey_profile(1.4) if mode != 'L' else icc(b'LAB ', {})
  image = Image.fromarray(noise(8, 8)).convert(mode)
  np.testing.assert_array_equal(decode(image, profile), decode(image, None))


def test_damaged_profiles_are_left_aside_with_one_warning(caplog):
  colours._warn.cache_clear()
  pixels = noise(8, 8)
  with caplog.at_level(logging.WARNING):
    for k in (1, 100, 140, 200):
      np.testing.assert_array_equal(decode(Image.fromarray(pixels), WIDE[:k]), pixels)
    np.testing.assert_array_equal(decode(Image.fromarray(pixels), bytes(300)), pixels)
  assert len(caplog.records) == 1 and 'damaged or unsupported colour profile' in caplog.text


def test_turned_pictures_are_converted_too():
  stored = noise(8, 12)
  exif = Image.Exif()
  exif[0x0112] = 6
  arrived = decode(Image.fromarray(stored), WIDE, exif=exif)
  np.testing.assert_allclose(arrived, seen(np.rot90(stored[:, 2:10], -1), P3, 2.2), atol=2)


def test_profiles_survive_in_formats_that_have_them():
  """The tests above would show nothing if Pillow did not write the profiles."""
  for form in (*LOSSLESS, 'JPEG', 'AVIF'):
    image = Image.open(io.BytesIO(encoded(Image.new('RGB', (8, 8)), form, icc_profile=WIDE)))
    assert image.info.get('icc_profile') == WIDE


def test_a_copy_that_was_made_without_regard_to_profiles_is_refused(tmp_path):
  (tmp_path / 'pictures').mkdir()
  for k in range(4):
    Image.new('RGB', (8, 8), (60, 160, 60)).save(tmp_path / 'pictures' / f'{k}.png', icc_profile=WIDE)
  given = tiny_pictures.settings('folder', path=tmp_path / 'pictures', prepared=tmp_path / 'copy')
  preparing.prepare(given, 0)
  (image, _) = datasets.open_split(given, 'eval').read(0)
  np.testing.assert_allclose(image, np.full((8, 8, 3), (0, 164, 35)), atol=1)
  info = tmp_path / 'copy' / 'info.json'
  made = json.loads(info.read_text())
  del made['dataset']['colours']
  info.write_text(json.dumps(made))
  for again in (lambda: preparing.prepare(given, 0), lambda: datasets.open_split(given, 'train')):
    with pytest.raises(
      UserError, match='before colour profiles were converted to sRGB; remove it and run'
    ):
      again()
