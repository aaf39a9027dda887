"""Computes the embeddings of a dataset's texts, and the latents of its images, once; `datasets/encoded.py` reads them.

FOLDER/<first digits of the identity>/   what one pair of networks makes of one dataset
"""

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import pathlib
import shutil
from collections.abc import Generator
from typing import Any, Protocol

import numpy as np

from diffusion_distillation.config import Config
from diffusion_distillation.datasets import encoded
from diffusion_distillation.datasets.encoded import Encoded
from diffusion_distillation.datasets.image_set import ImageSet
from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.datasets.preparing import SHARD_BYTES, write_shard
from diffusion_distillation.datasets.prompts import Captions
from diffusion_distillation.errors import UserError
from diffusion_distillation.networks.spaces import Space
from diffusion_distillation.stages import companions
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.stages.texts import TextEncoder
from diffusion_distillation.system import files, interrupts, sharding
from diffusion_distillation.system.files import read_json, write_json
from diffusion_distillation.system.progress import Progress

_log = logging.getLogger(__name__)

FORMAT = 1  # version of the records
_BATCH = 64  # texts at a time
_IMAGES = 8  # images at a time


class Encoding(Protocol):
  """The networks that encode a dataset: those beside a stage's own."""

  @property
  def text(self) -> TextEncoder | None:
    """The text encoder."""
    ...

  @property
  def space(self) -> Space:
    """The space of the images' latents."""
    ...


def identity(captions: Captions, model: Encoding, dtype: str) -> str:
  """Returns the sha256 of everything that determines the records."""
  assert model.text is not None
  described = {
    'format': FORMAT,
    'source': captions.identity,
    'text': companions.describe_text(model.text),
    'tokenizer': {
      name: hashlib.sha256(model.text.tokenizer[name]).hexdigest() for name in model.text.tokenizer
    },
    'space': companions.describe_space(model.space) if isinstance(captions, ImageSet) else None,
    'dtype': dtype,
  }
  if isinstance(captions, ImageSet):  # its identity is that of the files, whatever they are decoded to
    described |= {
      'image_shape': captions.image_shape,
      'decoder': repr(getattr(captions, 'decoder', None)),
    }
  return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()


def ensure(
  directory: pathlib.Path,
  captions: Captions,
  model: Encoding,
  dtype: str,
  workers: int = 0,
  shard_bytes: int = SHARD_BYTES,
) -> Encoded:
  """Returns a dataset as `model` encodes it; encodes what is not there yet. Images are encoded if the dataset has any.

  Files are written atomically; after an interruption, only the missing files are written. Several processes do not encode,
  because those that wait could not be stopped by a signal.

  Args:
    directory: where the folders of encoded datasets are.
    captions: the texts or, as an `ImageSet` too, images with their captions.
    model: the networks.
    dtype: type of the stored numbers, one of `settings.ENCODED_DTYPES`.
    workers: number of processes that decode images.
    shard_bytes: approximate size of a file.

  Raises:
    UserError: the disk is too small, or there is no tokenizer, or too many images are broken, or files are missing and there
      are several processes.
    Preempted: a signal was received; the same command continues.
  """
  made = identity(captions, model, dtype)
  folder = directory / made[:16]
  if sharding.part()[1] > 1:
    if not (folder / encoded.INFO).is_file() or _missing(folder, read_json(folder / encoded.INFO)):
      raise UserError(
        f'{folder}: {captions.name} is not encoded yet, or not to its end; run --mode=prepare with the same config and '
        '--workdir in one process first'
      )
    return encoded.open_folder(folder)
  with files.lock(directory, str(directory)):
    info = _begin(folder, captions, model, dtype, made, shard_bytes)
    if missing := _missing(folder, info):
      _write(folder, info, missing, captions, model, workers)
  return encoded.open_folder(folder)


def _missing(folder: pathlib.Path, info: dict[str, Any]) -> list[pathlib.Path]:
  """Returns the files that are not there yet, or not to their end."""
  paths = encoded.shard_paths(folder, encoded.shard_count(info))
  return [path for path in paths if not encoded.is_whole(path, info)]


def directory_of(prepared: str, workdir: pathlib.Path) -> pathlib.Path:
  """Returns where the encoded datasets of a run are: `dataset.prepared`, or a folder of its workdir."""
  return pathlib.Path(prepared) if prepared else workdir / 'encoded'


def of_run(
  config: Config, workdir: pathlib.Path, stage: Stage, captions: Captions | None
) -> Encoded | None:
  """Returns the texts of a run as the networks beside `stage` encode them; None if there are no texts. See `ensure`."""
  if captions is None:
    return None
  section = config.dataset
  directory = directory_of(section.prepared, workdir)
  return ensure(directory, captions, stage, section.encoded_dtype, section.workers)


def missing_bytes(config: Config, workdir: pathlib.Path, stage: Stage, captions: Captions | None) -> int:
  """Returns the bytes that the encoded texts of a run will take on the disk of its workdir; 0 if they are finished or elsewhere."""
  section = config.dataset
  if captions is None or section.prepared:
    return 0
  folder = directory_of('', workdir) / identity(captions, stage, section.encoded_dtype)[:16]
  if (folder / encoded.INFO).is_file() and not _missing(folder, read_json(folder / encoded.INFO)):
    return 0
  return size_of_record(captions, stage, section.encoded_dtype) * len(captions)


def size_of_record(captions: Captions, model: Encoding, dtype: str) -> int:
  """Returns the bytes of a record."""
  return sum(map(math.prod, _shapes(captions, model))) * np.dtype(dtype).itemsize


def _shapes(captions: Captions, model: Encoding) -> list[tuple[int, ...]]:
  """Returns the shapes of the arrays of a record: the text's embeddings and, if there are images, before them x."""
  assert model.text is not None
  network = model.text.network
  text = (network.max_position_embeddings, network.hidden_size)
  return [model.space.shape(captions.image_shape), text] if isinstance(captions, ImageSet) else [text]


def _begin(
  folder: pathlib.Path, captions: Captions, model: Encoding, dtype: str, made: str, shard_bytes: int
) -> dict[str, Any]:
  """Returns the description of a folder: that of an earlier start, or a new one, if the disk is large enough."""
  if (folder / encoded.INFO).is_file():
    found = read_json(folder / encoded.INFO)
    if found.get('identity') == made and (folder / encoded.NO_TEXT).is_file():
      return found
  size, shapes = size_of_record(captions, model, dtype), _shapes(captions, model)
  needed, free = size * len(captions), shutil.disk_usage(folder.parent).free
  if needed > free:
    raise UserError(
      f'{folder}: {len(captions):,} encoded texts take {needed / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free; set '
      'dataset.prepared to a directory on a larger disk, or dataset.encoded_dtype=float16'
    )
  shutil.rmtree(folder, ignore_errors=True)
  folder.mkdir()
  assert model.text is not None
  np.save(folder / encoded.NO_TEXT, model.text.embed([''])[0])
  info = {
    'identity': made,
    'name': captions.name,
    'count': len(captions),
    'image_shape': captions.image_shape if isinstance(captions, ImageSet) else (),
    'x_shape': shapes[0] if len(shapes) > 1 else (),
    'dtype': dtype,
    'per_file': max(1, shard_bytes // size),
    'bytes': {},
  }
  write_json(folder / encoded.INFO, info)
  return info


def _write(
  folder: pathlib.Path,
  info: dict[str, Any],
  missing: list[pathlib.Path],
  captions: Captions,
  model: Encoding,
  workers: int,
) -> None:
  """Writes the missing files, and records their sizes in `info.json`."""
  assert model.text is not None
  count, per_file = info['count'], info['per_file']
  every = encoded.shard_paths(folder, encoded.shard_count(info))
  ranges = {
    path: range(k * per_file, min((k + 1) * per_file, count))
    for k, path in enumerate(every)
    if path in missing
  }
  indices = [k for inside in ranges.values() for k in inside]
  tokenize = model.text.tokenize()
  name, unit = f'encoding {captions.name}', 'images' if info['x_shape'] else 'texts'
  with Progress(name, count, count - len(indices), unit=unit) as progress:
    records = _records(captions, model, indices, tokenize, info['dtype'], workers)
    with contextlib.closing(records):
      for path, inside in ranges.items():
        temporary = write_shard(path, itertools.islice(records, len(inside)), progress)
        info['bytes'][path.name] = temporary.stat().st_size
        write_json(folder / encoded.INFO, info)
        os.replace(temporary, path)
  if tokenize.cut:
    length = model.text.network.max_position_embeddings - 2
    _log.warning(
      '%s: %d of %d texts are longer than %d tokens and were cut',
      *(captions.name, tokenize.cut, len(indices), length),
    )


def _records(
  captions: Captions, model: Encoding, indices: list[int], tokenize: Any, dtype: str, workers: int
) -> Generator[bytes]:
  """Yields the records at `indices`, in order; a broken image is replaced by the next intact one, with its caption."""
  assert model.text is not None
  embed, kind = model.text.embedder(), np.dtype(dtype).newbyteorder('<')
  with contextlib.ExitStack() as stack:
    images = loader = None
    if isinstance(captions, ImageSet):
      loader = stack.enter_context(contextlib.closing(Loader(captions, workers=workers)))
      images = stack.enter_context(contextlib.closing(loader.in_order(_IMAGES, indices)))
    size = _BATCH if images is None else _IMAGES
    for start in range(0, len(indices), size):
      interrupts.check()
      batch = None if images is None else next(images)
      some = indices[start : start + size]
      used = some if loader is None else [intact(k, loader) for k in some]
      texts = [captions.caption(k) for k in used]
      tokens = tokenize(texts + [''] * (size - len(texts)), warns=False)
      of_text = np.asarray(embed(tokens), np.float32)
      x = None if batch is None else np.asarray(model.space.encode(batch['image']), np.float32)
      for place in range(len(some)):
        arrays = [of_text[place]] if x is None else [x[place], of_text[place]]
        yield b''.join(array.astype(kind).tobytes() for array in arrays)


def intact(k: int, loader: Loader) -> int:
  """Returns the index of the image that stands at index k: k itself or, if it is broken, the next intact one."""
  while k in loader.skipped:
    k = (k + 1) % len(loader)
  return k
