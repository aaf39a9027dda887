"""Decodes image files to pixels as an image viewer shows them, and crops and resizes them."""

import dataclasses
import functools
import io
import warnings
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from diffusion_distillation.datasets import colours
from diffusion_distillation.datasets.image_set import BrokenImage

_BLOCK = 2**20  # pixels that are converted to a wider type at a time
# Larger images are not used, because decoding them may take all memory.
MOST_PIXELS = 100_000_000

# These warnings are about unusual metadata and about large images.
warnings.filterwarnings('ignore', module=r'PIL\.')

# Formats that are read, regardless of file names. (Pillow supports more, but for example runs a program to read EPS.)
FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'GIF', 'TIFF', 'PPM', 'AVIF', 'JPEG2000', 'QOI')
# Files with these suffixes are assumed to be images; other files are recognized by their first bytes.
SUFFIXES = (
  *('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.gif', '.tif', '.tiff'),
  *('.ppm', '.pgm', '.pbm', '.pnm', '.avif', '.jfif', '.jpe', '.apng', '.jp2', '.j2k', '.qoi'),
)
HEAD = 256  # number of bytes by which a format is recognized
_BY_HEADER = ('BMP', 'PPM')  # text files may begin with 'BM' or 'P1', too


def is_image(head: bytes) -> bool:
  """Whether a file that begins with these HEAD bytes has one of FORMATS."""
  Image.init()
  found = [f for f in FORMATS if f in Image.OPEN and (Image.OPEN[f][1] or bool)(head[:16]) is True]
  if not set(found) <= set(_BY_HEADER):
    return True
  try:
    with Image.open(io.BytesIO(head), formats=found):
      return bool(found)
  except Exception:  # with unknown bytes, Pillow may raise anything
    return False


@functools.lru_cache(maxsize=256)
def _overlap(length: int, size: int) -> np.ndarray:
  """Returns (size, length): the fraction of new pixel j that old pixel i covers, in a row of `length` old pixels."""
  edges, old = np.linspace(0.0, length, size + 1), np.arange(length)
  upper = np.minimum(old[None, :] + 1, edges[1:, None])
  lower = np.maximum(old[None, :], edges[:-1, None])
  return np.maximum(upper - lower, 0.0) * (size / length)


def area(image: np.ndarray, size: int) -> np.ndarray:
  """Resizes (H, W, C) to (size, size, C): the float64 mean of the image over each new pixel's rectangle.

  Works on a few rows at a time, because a photo in float64 takes eight times its memory.
  """
  height, width, channels = image.shape
  across, resized = _overlap(width, size), np.empty((size, size, channels))
  rows = max(1, size * _BLOCK // (height * width))
  for j in range(0, size, rows):
    down = _overlap(height, size)[j : j + rows]
    used = np.flatnonzero(down.any(axis=0))
    part = slice(used[0], used[-1] + 1)
    block = image[part].astype(np.float64)
    resized[j : j + rows] = np.einsum('jh,hwc,kw->jkc', down[:, part], block, across, optimize=True)
  return resized


# Pillow scales its filters to the size of the new pixels, so they are antialiased.
FILTERS = {
  'bilinear': Image.Resampling.BILINEAR,
  'bicubic': Image.Resampling.BICUBIC,
  'lanczos': Image.Resampling.LANCZOS,
}
RESIZE = ('area', *FILTERS)


@dataclasses.dataclass(frozen=True)
class Decoder:
  """Decodes the bytes of a file to (size, size, channels) uint8: its central square, resized.

  Attributes:
    size: height and width in pixels.
    channels: 1 (grey) or 3.
    resize: one of RESIZE.
  """

  size: int
  channels: int
  resize: str

  def __call__(self, data: bytes) -> np.ndarray:
    """Decodes an image; raises BrokenImage if it is not a complete image, or too large, or its short side is below `size`."""
    return _decode(data, self.channels, self.fit, self.size)

  def fit(self, image: Image.Image) -> np.ndarray:
    """Crops an image to its central square, and resizes it."""
    width, height = image.size
    side = min(width, height)
    left, top = width // 2 - side // 2, height // 2 - side // 2
    image = image.crop((left, top, left + side, top + side))
    if side != self.size and self.resize in FILTERS:
      image = image.resize((self.size, self.size), FILTERS[self.resize])
    pixels = _pixels(image, self.channels)
    if side != self.size and self.resize == 'area':
      halves_up = 0.5 + 1e-6  # rounds the same on all machines, regardless of the last bit
      pixels = np.floor(area(pixels, self.size) + halves_up).astype(np.uint8)
    return pixels


@dataclasses.dataclass(frozen=True)
class NativeDecoder:
  """Decodes the bytes of a file to (H, W, channels) uint8, without cropping or resizing.

  Attributes:
    channels: 1 (grey) or 3.
  """

  channels: int

  def __call__(self, data: bytes) -> np.ndarray:
    """Decodes an image; raises BrokenImage if it is not a complete image, or too large."""
    return _decode(data, self.channels, lambda image: _pixels(image, self.channels))


def _pixels(image: Image.Image, channels: int) -> np.ndarray:
  return np.asarray(image).reshape(*image.size[::-1], channels)


def _decode(
  data: bytes, channels: int, convert: Callable[[Image.Image], np.ndarray], smallest: int = 1
) -> np.ndarray:
  """Returns `convert` of the decoded image; raises BrokenImage for all errors, or if the short side is below `smallest`."""
  if not data:
    raise BrokenImage('is empty')
  try:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
      # Checked before decoding, because a small file may have very many pixels.
      if image.width * image.height > MOST_PIXELS:
        raise BrokenImage(
          f'is {image.width}x{image.height}, larger than {MOST_PIXELS // 10**6} megapixels'
        )
      if min(image.size) < smallest:
        raise BrokenImage(f'is {image.width}x{image.height}, smaller than dataset.image_size={smallest}')
      return convert(as_seen(image, channels))
  except BrokenImage:
    raise
  except UnidentifiedImageError as error:
    raise BrokenImage(f'is none of {", ".join(FORMATS)}') from error
  except Exception as error:  # with a damaged file, Pillow may raise anything
    raise BrokenImage(f'cannot be decoded: {error}') from error


def as_seen(image: Image.Image, channels: int) -> Image.Image:
  """Converts an image to mode L (1 channel) or RGB (3) as a viewer shows it.

  This is the first frame, upright, in sRGB, with transparency over white and 16 bits scaled to 8.

  Raises:
    ValueError: the range of its pixels is unknown.
  """
  profile = colours.embedded(image)
  image.load()
  image = ImageOps.exif_transpose(image)
  if image.mode.startswith('I'):
    image = _eight_bits(image)
  if image.mode == 'F':
    raise ValueError('floating-point pixels have no known range')
  if profile:
    image = colours.to_srgb(image, profile)
  if image.has_transparency_data:
    image = image.convert('RGBA')
    white = Image.new('RGBA', image.size, 'white')
    image = Image.alpha_composite(white, image)
  return image.convert('L' if channels == 1 else 'RGB')


def _eight_bits(image: Image.Image) -> Image.Image:
  values = np.asarray(image)
  if values.min() < 0 or values.max() > 65535:
    raise ValueError('integer pixels beyond 16 bits have no known range')
  scaled = np.empty(values.shape, np.uint8)
  rows = max(1, _BLOCK // values.shape[1])
  for j in range(0, len(values), rows):
    scaled[j : j + rows] = np.round(values[j : j + rows] / 257.0)
  grey = Image.fromarray(scaled)
  if 'transparency' in image.info:
    opaque = values != image.info['transparency']
    grey.putalpha(Image.fromarray(np.where(opaque, np.uint8(255), np.uint8(0))))
  return grey
