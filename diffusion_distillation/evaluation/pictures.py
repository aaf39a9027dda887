"""Images to files: a grid as PNG, arrays as npz."""

import math
import os
import pathlib
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from diffusion_distillation.errors import UserError

SUFFIXES = ('.png', '.npz')


def enlarge(images: np.ndarray, side: int) -> np.ndarray:
  """Repeats the pixels of (n, H, W, C) until they are `side` high or more."""
  factor = max(1, math.ceil(side / images.shape[1]))
  return images.repeat(factor, axis=1).repeat(factor, axis=2)


def grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
  """Lays (n, H, W, C) uint8 out row by row on white: (rows (H + gap) + gap, columns (W + gap) + gap, C)."""
  count, height, width, channels = images.shape
  rows = math.ceil(count / columns)
  sheet = np.full((rows * columns, height + gap, width + gap, channels), 255, np.uint8)
  sheet[:count, gap:, gap:] = images
  sheet = sheet.reshape(rows, columns, height + gap, width + gap, channels)
  sheet = sheet.transpose(0, 2, 1, 3, 4).reshape(rows * (height + gap), -1, channels)
  return np.pad(sheet, [(0, gap), (0, gap), (0, 0)], constant_values=255)


def to_pil(image: np.ndarray) -> Image.Image:
  """(H, W, 1) or (H, W, 3) uint8 as Pillow's."""
  return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


def check_out(out: pathlib.Path | None) -> pathlib.Path:
  """Raises UserError unless `out` is a file that can be written as PNG or npz."""
  if out is None or out.suffix not in SUFFIXES:
    raise UserError(f'--out={out}: name a file that ends in {" or ".join(SUFFIXES)}')
  if not out.parent.is_dir() or not os.access(out.parent, os.W_OK):
    raise UserError(f'--out={out}: {out.parent} is not a directory that can be written')
  if out.is_dir():
    raise UserError(f'--out={out} is a directory; name a file')
  return out


def save(out: pathlib.Path, images: np.ndarray, labels: np.ndarray | None) -> None:
  """Writes (n, H, W, C) uint8 as a grid ('.png') or as `images` and, if given, `labels` ('.npz')."""
  temporary = out.with_name(out.name + '.tmp')
  with temporary.open('wb') as file:
    if out.suffix == '.npz':
      arrays: dict[str, Any] = {'images': images}
      np.savez(file, **(arrays if labels is None else arrays | {'labels': labels}))
    else:
      _save_grid(file, images)
  os.replace(temporary, out)


def _save_grid(file: BinaryIO, images: np.ndarray) -> None:
  columns = math.ceil(math.sqrt(len(images)))
  to_pil(grid(enlarge(images, 32), columns)).save(file, format='png')
