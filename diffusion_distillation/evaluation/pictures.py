"""Writes images to files: a grid or single images as PNG, or arrays as npz."""

import functools
import io
import math
import os
import pathlib
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image

from diffusion_distillation import paths
from diffusion_distillation.errors import UserError

SUFFIXES = ('.png', '.npz')


def enlarge(images: np.ndarray, side: int) -> np.ndarray:
  """Enlarges (n, H, W, C) images by repeating pixels until their height is at least `side`."""
  factor = max(1, math.ceil(side / images.shape[1]))
  return images.repeat(factor, axis=1).repeat(factor, axis=2)


def reduced(images: np.ndarray, side: int) -> np.ndarray:
  """Reduces (n, H, W, C) uint8 images that are higher than `side` to this height, with Lanczos' filter."""
  height, width = images.shape[1:3]
  if height <= side:
    return images
  size = max(1, round(width * side / height)), side
  made = [np.asarray(to_pil(image).resize(size, Image.Resampling.LANCZOS)) for image in images]
  return np.stack(made).reshape(len(images), side, size[0], -1)


def grid(images: np.ndarray, columns: int, gap: int = 2) -> np.ndarray:
  """Arranges (n, H, W, C) uint8 images row by row on white: (rows (H + gap) + gap, columns (W + gap) + gap, C)."""
  count, height, width, channels = images.shape
  rows = math.ceil(count / columns)
  sheet = np.full((rows * columns, height + gap, width + gap, channels), 255, np.uint8)
  sheet[:count, gap:, gap:] = images
  sheet = sheet.reshape(rows, columns, height + gap, width + gap, channels)
  sheet = sheet.transpose(0, 2, 1, 3, 4).reshape(rows * (height + gap), -1, channels)
  return np.pad(sheet, [(0, gap), (0, gap), (0, 0)], constant_values=255)


def strip(images: np.ndarray, columns: int, side: int = 48) -> bytes:
  """Arranges (n, H, W, C) uint8 images, at least `side` pixels high, row by row, as PNG; the gaps are transparent."""
  images = enlarge(images, side)
  count, height, width, channels = images.shape
  colour = images if channels == 3 else images.repeat(3, axis=-1)
  opaque = np.concatenate([colour, np.full((count, height, width, 1), 255, np.uint8)], axis=-1)
  gap = max(2, height // 16)
  padded = np.pad(opaque, [(0, 0), (0, gap), (0, gap), (0, 0)])
  rows = math.ceil(count / columns)
  padded = np.pad(padded, [(0, rows * columns - count), (0, 0), (0, 0), (0, 0)])
  sheet = padded.reshape(rows, columns, height + gap, width + gap, 4).transpose(0, 2, 1, 3, 4)
  sheet = sheet.reshape(rows * (height + gap), columns * (width + gap), 4)
  file = io.BytesIO()
  Image.fromarray(sheet[:-gap, :-gap]).save(file, format='png')
  return file.getvalue()


def width(png: bytes) -> int:
  """Returns the width of a PNG in pixels."""
  return Image.open(io.BytesIO(png)).width


def to_pil(image: np.ndarray) -> Image.Image:
  """Converts (H, W, 1) or (H, W, 3) uint8 to a Pillow image."""
  return Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)


class Output(NamedTuple):
  """Where samples are written.

  Attributes:
    path: the file or folder.
    kind: '.png' for a grid; '.npz' for arrays; '/' for a folder with a .png for each image.
  """

  path: pathlib.Path
  kind: str


def check_out(given: str | os.PathLike[str] | None, num_samples: int) -> Output:
  """Checks `--out` before anything is loaded: it is a file with a known suffix (in upper or lower case), or a folder.

  A folder ends with a slash or exists. It must not contain other files than those that will be written, so that older images
  cannot be mistaken for new ones.

  Raises:
    UserError: `--out` is neither, or is not writable.
  """
  text = os.fspath(given or '')
  suffix = pathlib.PurePath(text).suffix.lower()
  if not text or (suffix not in SUFFIXES and not text.endswith('/') and not os.path.isdir(text)):
    raise UserError(
      f'--out={text}: name a file that ends in {" or ".join(SUFFIXES)}, or a folder that ends in a slash'
    )
  path = paths.on_disk('--out', text)
  is_folder = text.endswith('/') or (path.is_dir() and suffix not in SUFFIXES)
  into = path if is_folder and path.is_dir() else path.parent
  if not into.exists():
    raise UserError(f'--out={text}: there is no directory {into}; make it first')
  if not into.is_dir() or not os.access(into, os.W_OK):
    raise UserError(f'--out={text}: {into} is not a writable directory')
  if not is_folder and path.is_dir():
    raise UserError(f'--out={text} is a directory; name a file, or end it with a slash')
  if is_folder and path.exists() and not path.is_dir():
    raise UserError(f'--out={text} is a file; name a folder')
  if is_folder and path.is_dir():
    others = sorted(_visible(path) - set(_names(num_samples)))
    if others:
      raise UserError(f'--out={text} holds other files, such as {others[0]}; name another folder')
  return Output(path, '/' if is_folder else suffix)


def _visible(folder: pathlib.Path) -> set[str]:
  return {entry.name for entry in folder.iterdir() if not entry.name.startswith('.')}


def _names(count: int) -> list[str]:
  """Returns the file names '000000.png' and so on, which sort by number."""
  digits = max(6, len(str(count - 1)))
  return [f'{k:0{digits}}.png' for k in range(count)]


def save(out: Output, images: np.ndarray, labels: np.ndarray | None) -> None:
  """Writes (n, H, W, C) uint8 images as a grid, as single files, or as the arrays `images` and, if given, `labels`.

  A .npz also contains the images as `arr_0`, the name that ADM's evaluator (Dhariwal & Nichol 2021) reads.
  """
  if out.kind == '/':
    out.path.mkdir(exist_ok=True)
    for name, image in zip(_names(len(images)), images, strict=True):
      _write(out.path / name, functools.partial(to_pil(image).save, format='png'))
  elif out.kind == '.npz':
    arrays: dict[str, Any] = {'images': images, 'arr_0': images}
    arrays |= {} if labels is None else {'labels': labels}
    _write(out.path, lambda file: np.savez(file, **arrays))
  else:
    columns = math.ceil(math.sqrt(len(images)))
    sheet = to_pil(grid(enlarge(images, 32), columns))
    _write(out.path, functools.partial(sheet.save, format='png'))


def _write(path: pathlib.Path, write: Callable[[BinaryIO], None]) -> None:
  """Writes a file atomically."""
  temporary = path.with_name(f'.{path.name}.tmp')
  with temporary.open('wb') as file:
    write(file)
  os.replace(temporary, path)
