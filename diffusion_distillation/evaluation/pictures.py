"""Images to files: a grid or each of them as PNG, arrays as npz."""

import functools
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


class Output(NamedTuple):
  """Where drawn images go.

  Attributes:
    path: of the file or folder.
    kind: '.png', a grid; '.npz', arrays; '/', a folder with a .png for each image.
  """

  path: pathlib.Path
  kind: str


def check_out(given: str | os.PathLike[str] | None, num_samples: int) -> Output:
  """What `--out` names, before anything is loaded: a file by its suffix, in any case, or a folder.

  A folder is what ends with a slash, or is there. It may hold nothing but what is to be written, so that no pictures of
  before are taken for these.

  Raises:
    UserError: it is neither, or cannot be written.
  """
  text = os.fspath(given or '')
  suffix = pathlib.PurePath(text).suffix.lower()
  if not text or (suffix not in SUFFIXES and not text.endswith('/') and not os.path.isdir(text)):
    raise UserError(
      f'--out={text}: name a file that ends in {" or ".join(SUFFIXES)}, or a folder, which ends in a slash'
    )
  path = paths.on_disk('--out', text)
  is_folder = text.endswith('/') or (path.is_dir() and suffix not in SUFFIXES)
  into = path if is_folder and path.is_dir() else path.parent
  if not into.is_dir() or not os.access(into, os.W_OK):
    raise UserError(f'--out={text}: {into} is not a directory that can be written')
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
  """'000000.png' and so on: names that sort by number."""
  digits = max(6, len(str(count - 1)))
  return [f'{k:0{digits}}.png' for k in range(count)]


def save(out: Output, images: np.ndarray, labels: np.ndarray | None) -> None:
  """Writes (n, H, W, C) uint8: a grid, each image, or the arrays `images` and, if given, `labels`.

  In a .npz the images are `arr_0`, too, the name by which ADM's evaluator (Dhariwal & Nichol 2021) reads them.
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
  """Writes a file whole or not at all."""
  temporary = path.with_name(f'.{path.name}.tmp')
  with temporary.open('wb') as file:
    write(file)
  os.replace(temporary, path)
