"""Converts images with an embedded ICC profile to sRGB, which images without a profile are assumed to be in."""

import functools
import io
import logging

import numpy as np
from PIL import Image, ImageCms

_log = logging.getLogger(__name__)

_MODES = {'RGB': 'RGB', 'GRAY': 'L', 'CMYK': 'CMYK'}  # Pillow's mode for each colour space of a profile
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
