"""Small files with very many pixels, and pictures whose decoding must not take many times their size."""

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image

from diffusion_distillation.datasets import decoding, survey
from diffusion_distillation.datasets.image_set import BrokenImage


def bomb(width, height):
  """A grey PNG of this size in about a thousandth of its pixels' bytes."""
  packer = zlib.compressobj(9)
  row = bytes(1 + width)
  packed = b''.join([packer.compress(row) for _ in range(height)]) + packer.flush()
  header = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
  chunks = [(b'IHDR', header), (b'IDAT', packed), (b'IEND', b'')]
  written = [
    struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))
    for kind, data in chunks
  ]
  return b'\x89PNG\r\n\x1a\n' + b''.join(written)


@pytest.mark.filterwarnings('ignore::PIL.Image.DecompressionBombWarning')
def test_a_picture_of_very_many_pixels_is_left_out_before_it_is_decoded(monkeypatch):
  monkeypatch.setattr(decoding, 'as_seen', None)
  with pytest.raises(BrokenImage, match='is 11000x11000, larger than 100 megapixels') as caught:
    decoding.Decoder(8, 3, 'area')(bomb(11_000, 11_000))
  assert survey._kind(f'x.png {caught.value}') == 'too large'


def test_a_picture_within_the_limit_is_decoded():
  image = decoding.Decoder(8, 3, 'area')(bomb(1000, 2000))
  assert image.shape == (8, 8, 3) and not image.any()


def test_sixteen_bits_are_scaled_without_many_times_the_picture():
  values = (np.arange(1500 * 2000) % 65536).astype(np.uint16).reshape(1500, 2000)
  file = io.BytesIO()
  Image.fromarray(values).save(file, 'PNG')
  with Image.open(file) as image:
    image.load()
    tracemalloc.start()
    scaled = decoding._eight_bits(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
  assert peak < 12 * values.size + 10 * decoding._BLOCK
  np.testing.assert_array_equal(np.asarray(scaled), np.round(values / 257.0).astype(np.uint8))
