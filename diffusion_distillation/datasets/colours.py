"""Converts images with an embedded ICC profile to sRGB, which images without a profile are assumed to be in."""

import functools
import io
import logging
import struct
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageCms

_log = logging.getLogger(__name__)

_MODES = {'RGB': 'RGB', 'GRAY': 'L', 'CMYK': 'CMYK'}  # Pillow's mode for each colour space of a profile
_ICC_METHODS = (2, 3)  # a 'colr' box of JPEG 2000 holds a profile, not the number of a colour space
_LEVELS = np.linspace(0, 255, 9).round().astype(np.uint8)


@functools.cache
def _srgb() -> ImageCms.ImageCmsProfile:
  return ImageCms.ImageCmsProfile(ImageCms.createProfile('sRGB'))


@functools.lru_cache(maxsize=64)
def _transform(profile: bytes) -> tuple[str, ImageCms.ImageCmsTransform] | None:
  """Returns the mode of pixels with this profile and their transform to sRGB, or None if no conversion is needed.

  The transform is relative colorimetric with black point compensation: white stays white, black becomes black, and colours
  outside sRGB are clipped to its gamut. A profile that changes no colour by more than one level counts as sRGB, and such
  images are not converted.
  """
  try:
    read = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    mode = _MODES[read.profile.xcolor_space.strip()]
    made = ImageCms.buildTransform(
      *(read, _srgb(), mode, 'RGB'),
      ImageCms.Intent.RELATIVE_COLORIMETRIC,
      ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
  except (KeyError, OSError, ImageCms.PyCMSError):
    _warn()
    return None
  return None if _is_srgb(made, mode) else (mode, made)


@functools.cache
def _warn() -> None:
  """Warns once per process."""
  _log.warning('some images have a damaged or unsupported colour profile, which is ignored')


def _is_srgb(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
  """Whether the transform changes no colour of a grid by more than one level."""
  if mode == 'CMYK':
    return False
  grid = np.stack(np.meshgrid(*[_LEVELS] * 3), -1) if mode == 'RGB' else np.arange(256, dtype=np.uint8)
  probe = Image.fromarray(grid.reshape(1, 256 if mode == 'L' else -1, *grid.shape[3:]))
  moved = np.asarray(transform.apply(probe), int) - np.asarray(probe.convert('RGB'), int)
  return bool(np.abs(moved).max() <= 1)


def embedded(image: Image.Image) -> bytes | None:
  """Returns the ICC profile of an opened image that is not loaded yet, or None.

  Pillow finds it in all formats that are read and have one, except for JPEG 2000, whose boxes are searched here.
  """
  profile: bytes | None = image.info.get('icc_profile')
  if profile or image.format != 'JPEG2000':
    return profile
  stream = getattr(image, 'fp', None)
  if stream is None:
    return None
  position = stream.tell()
  stream.seek(0)
  data = stream.read()
  stream.seek(position)
  headers = (body for kind, body in _boxes(data) if kind == b'jp2h')
  colours = (body for header in headers for kind, body in _boxes(header) if kind == b'colr')
  return next((body[3:] for body in colours if body[:1] and body[0] in _ICC_METHODS), None)


def _boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
  """Yields the type and the contents of each box (ISO/IEC 15444-1, annex I.4); stops where there is none."""
  start = 0
  while start + 8 <= len(data):
    length, kind = struct.unpack_from('>I4s', data, start)
    header = 8
    if length == 1 and start + 16 <= len(data):
      (length,), header = struct.unpack_from('>Q', data, start + 8), 16
    if length == 0:  # the box extends to the end
      length = len(data) - start
    if length < header:
      return
    yield kind, data[start + header : start + length]
    start += length


def to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
  """Converts an image from the colour space of its profile to sRGB, and keeps its transparency.

  Grey images may have a grey or an RGB profile, other images only a profile of their own colour space; as in browsers, other
  profiles are ignored, and so are damaged ones.

  Args:
    image: an image of any mode, with 8 bits per channel.
    profile: the embedded profile.

  Returns:
    The converted image in RGB or RGBA, or the original image if no conversion is needed.
  """
  found = _transform(profile)
  if found is None:
    return image
  mode, transform = found
  grey = image.mode in ('1', 'L', 'LA')
  if not {'RGB': image.mode != 'CMYK', 'L': grey, 'CMYK': image.mode == 'CMYK'}[mode]:
    return image
  seen = transform.apply(image if image.mode == mode else image.convert(mode))
  if image.has_transparency_data:
    seen.putalpha(image.convert('RGBA').getchannel('A'))
  return seen
