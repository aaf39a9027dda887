"""Compares finished runs: their rows, their samples and what differs between their configs, as a table and as a page."""

import dataclasses
import math
import os
import pathlib
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from diffusion_distillation import paths
from diffusion_distillation.config import Config, flatten
from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.evaluation import curves, figures, report
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.system.files import read_json

_PAGE, _FIGURES = 'index.html', {'frechet': 'frechet.png', 'clip_score': 'clip_score.png'}
_NEEDED = ('rows', 'metric', 'stages', 'seconds')  # of results.json
_OF_DISTANCES = ('floor', 'extractor', 'reference')  # and these of results with distances
_OF_SCORES = ('clip', 'prompts')  # or these of results with CLIP scores alone


@dataclasses.dataclass(frozen=True)
class Run:
  """A finished run.

  Attributes:
    name: a short name, different for each run.
    directory: its workdir.
    config: its config, flat.
    results: the contents of its `results.json`.
    images: the identity of its training images; '' if it is not recorded.
    samples: images (n, H, W, C) uint8 of each stage by caption; empty if its report is of an older version.
  """

  name: str
  directory: pathlib.Path
  config: dict[str, Any]
  results: dict[str, Any]
  images: str
  samples: dict[str, np.ndarray]


def compare(given: Sequence[str], default: Config, out: str | os.PathLike[str] | None) -> str:
  """Compares runs and writes the page, with its figure beside it.

  Args:
    given: the workdirs.
    default: the config with all keys.
    out: the folder of the page; None: the folder `comparison` in the report of the first workdir.

  Returns:
    The comparison as text: a table, what to mind, and where the page is.

  Raises:
    UserError: there are fewer than two workdirs, one of them has no results, or their numbers are not comparable.
  """
  runs = read(given, default)
  check(runs)
  directory, value = _out(runs, out), curves.value_name(runs[0].results['metric'])
  notes, lines = remarks(runs), table(runs)
  picture = figures.render(lambda theme: figures.side_by_side(_curves(runs), runs[0].results, theme))
  page = (
    report.environment()
    .get_template('comparison.html')
    .render(
      runs=runs,
      metric=runs[0].results['metric'],
      upwards=value != 'frechet',
      figure=picture,
      table=lines,
      notes=notes,
      differences=differences(runs),
      samples=_samples(runs),
      seconds=_seconds(runs),
    )
  )
  directory.mkdir(parents=True, exist_ok=True)
  (directory / _FIGURES[value]).write_bytes(picture.png)
  (directory / _PAGE).write_text(page)
  return '\n'.join([*_text(runs, lines), '', *notes, str(directory / _PAGE)])


def read(given: Sequence[str], default: Config) -> list[Run]:
  """Reads the runs in the given workdirs; raises UserError if one of them has no results."""
  directories = [paths.on_disk('--workdirs', path) for path in given]
  if len({path.resolve() for path in directories}) < max(2, len(directories)):
    raise UserError(
      f'--mode=compare needs --workdirs=A,B: the directories of two or more different runs, not {",".join(given)!r}'
    )
  names = _names(directories)
  return [_read(directory, name, default) for directory, name in zip(directories, names, strict=True)]


def _names(directories: list[pathlib.Path]) -> list[str]:
  """Returns the shortest ends of the paths, all of the same length, that differ from each other."""
  for depth in range(1, max(len(path.parts) for path in directories) + 1):
    names = ['/'.join(path.parts[-depth:]) for path in directories]
    if len(set(names)) == len(names):
      break
  return names


def _read(directory: pathlib.Path, name: str, default: Config) -> Run:
  config = workdirs.read_config(directory, default)
  path = directory / 'results.json'
  if not path.is_file():
    raise UserError(
      f'--workdirs: there is no {path}; finish the run, or measure its stages with --mode=evaluate --workdir={directory}'
    )
  results = read_json(path)
  is_distance = curves.value_name(results.get('metric')) == 'frechet'
  needed = _NEEDED + (_OF_DISTANCES if is_distance else _OF_SCORES)
  missing = [key for key in needed if not results.get(key)]
  if missing:
    raise DamagedError(
      f'{path} is damaged (no {missing[0]}); write it again with --mode=evaluate --workdir={directory}'
    )
  recorded = directory / 'dataset.json'
  images = read_json(recorded).get('identity', '') if recorded.is_file() else ''
  return Run(name, directory, dict(flatten(config)), results, images, _read_samples(directory))


def _read_samples(directory: pathlib.Path) -> dict[str, np.ndarray]:
  path = directory / 'report' / 'samples.npz'
  if not path.is_file():
    return {}
  try:
    with np.load(path, allow_pickle=False) as arrays:
      return {caption: arrays[caption] for caption in arrays.files}
  except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
    raise DamagedError(
      f'{path} is damaged ({error}); remove it to compare the runs without their samples'
    ) from error


def check(runs: Sequence[Run]) -> None:
  """Raises UserError unless the runs were measured in the same way, so that their numbers compare.

  Distances need the same features of the same images; CLIP scores need the same CLIP model and the same texts.
  """
  first = runs[0]
  for run in runs[1:]:
    kinds = {curves.value_name(found.results['metric']) for found in (first, run)}
    if kinds == {'frechet'}:
      _check_images(first, run)
    elif kinds == {'clip_score'}:
      _check_texts(first, run)
    if run.results['metric'] != first.results['metric']:
      raise UserError(
        f'{run.name} was measured as {run.results["metric"]} and {first.name} as {first.results["metric"]}; measure one of '
        'them again with --mode=evaluate and the settings of the other'
      )


def _check_images(first: Run, run: Run) -> None:
  if run.results['extractor']['digest'] != first.results['extractor']['digest']:
    remedy = f'copy {first.directory}/extractor.safetensors into {run.directory}, and measure it again'
    if any(found.results['extractor'].get('held_out_accuracy') is None for found in (first, run)):
      remedy = 'measure both again with the same evaluation.inception'
    raise UserError(
      f'{run.name} was measured with another feature extractor than {first.name}, so that their numbers cannot be '
      f'compared; {remedy}, with --mode=evaluate'
    )
  if _reference(run) != _reference(first):
    files = [found.results['reference'].get('file') for found in (first, run)]
    other = 'another evaluation.reference' if any(files) else 'other training images'
    remedy = 'measure both with the same one' if any(files) else 'compare runs on the same images'
    raise UserError(
      f'{run.name} was compared with {other} than {first.name}, so that their numbers cannot be compared; {remedy}'
    )


def _check_texts(first: Run, run: Run) -> None:
  for key, what in (('clip', 'another CLIP model'), ('prompts', 'other prompts')):
    if run.results[key]['digest'] != first.results[key]['digest']:
      raise UserError(
        f'{run.name} was measured with {what} than {first.name}, so that their numbers cannot be compared; measure both again '
        f'with the same evaluation.{key}, with --mode=evaluate'
      )


def _reference(run: Run) -> tuple[Any, ...]:
  """Identifies what the samples of a run were compared with: a file by its digest, or the training images.

  Results of older versions say less of the training images, so that only what all versions record is compared.
  """
  found = run.results['reference']
  return (found['digest'],) if found.get('file') else (run.images, found.get('num_images'))


def remarks(runs: Sequence[Run]) -> list[str]:
  """Returns sentences about differences between the evaluations that the numbers depend on."""
  found = []
  numbers = {
    run.name: (run.results.get('floor') or run.results['rows'][0])['num_samples'] for run in runs
  }
  if len(set(numbers.values())) > 1:
    listed = ', '.join(f'{name}: {count}' for name, count in numbers.items())
    note = '; the distance of fewer samples is larger' if 'floor' in runs[0].results else ''
    found.append(f'The numbers of samples differ ({listed}){note}.')
  labels = {run.name: run.results.get('labels') for run in runs if run.results.get('labels')}
  if len(set(labels.values())) > 1:
    listed = ', '.join(f'{name}: {kind}' for name, kind in labels.items())
    found.append(f'The distributions of the class labels differ ({listed}).')
  texts = {run.name: of for run in runs if (of := _texts(run.results))}
  if len({of['digest'] for of in texts.values()}) > 1:
    listed = ', '.join(f'{name}: {of.get("file") or of.get("name")}' for name, of in texts.items())
    found.append(f'The texts that the samples are drawn for differ ({listed}).')
  seeds = {run.config['evaluation.seed'] for run in runs}
  if len(seeds) > 1:
    found.append(
      'The seeds of the evaluation differ, so the samples of the runs start from different noise.'
    )
  if not any(row.get('error') for run in runs for row in run.results['rows']):
    found.append('The rows have no error bars; small differences may be due to chance.')
  return found


def _texts(results: Mapping[str, Any]) -> dict[str, Any] | None:
  """Returns what the results of models of texts say of the texts: the prompts of a file, or else the captions of the images."""
  return results.get('prompts') or results.get('captions')


def _key(row: Mapping[str, Any]) -> tuple[Any, ...]:
  """Identifies what a row measured, in any run."""
  guidance = row.get('guidance') or 0.0
  return row['stage'], row['weights'], row['sampler'], row['num_steps'], guidance


def table(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """Returns a line for each row that at least one run has, in the order of the first run.

  Returns:
    The `stage`, `weights`, `sampler`, `num_steps`, `guidance` and `nfe` of the row; `values` and `errors`, one per run, None
    where a run lacks it; `differences`, one for each run but the first: (value minus the first run's, its standard error or
    None), or None where one of them is missing. The error assumes that the runs' errors are independent.
  """
  by_key = [{_key(row): row for row in run.results['rows']} for run in runs]
  lines = []
  for key in dict.fromkeys(key for rows in by_key for key in rows):
    rows = [found.get(key) for found in by_key]
    some = next(row for row in rows if row is not None)
    names = ('stage', 'weights', 'sampler', 'num_steps', 'guidance')
    lines.append(
      dict(zip(names, key, strict=True))
      | {
        'nfe': some['nfe'],
        'values': [None if row is None else row['value'] for row in rows],
        'errors': [None if row is None else row.get('error') for row in rows],
        'differences': [_difference(rows[0], row) for row in rows[1:]],
      }
    )
  return lines


def _difference(
  first: Mapping[str, Any] | None, other: Mapping[str, Any] | None
) -> tuple[float, float | None] | None:
  if first is None or other is None:
    return None
  errors = [row.get('error') for row in (first, other)]
  known = None if None in errors else math.hypot(*(float(error or 0.0) for error in errors))
  return other['value'] - first['value'], known


def differences(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
  """Returns the keys of the configs that are not the same in all runs, with their values."""
  keys = dict.fromkeys(key for run in runs for key in run.config)
  found = [(key, [run.config.get(key) for run in runs]) for key in keys]
  return [(key, values) for key, values in found if any(value != values[0] for value in values)]


def _seconds(runs: Sequence[Run]) -> list[tuple[str, list[float | None]]]:
  """Returns the seconds of training of each stage in each run, and of the evaluation."""
  names = dict.fromkeys(name for run in runs for name in run.results['seconds'])
  return [(name, [run.results['seconds'].get(name) for run in runs]) for name in names]


def _curves(runs: Sequence[Run]) -> list[tuple[str, dict[str, list[curves.Point]]]]:
  return [(run.name, curves.by_calls(curves.few(run.results['rows']))) for run in runs]


def _samples(runs: Sequence[Run]) -> list[dict[str, Any]]:
  """Returns, for each stage by caption, the strips of images of the runs that have it."""
  found = []
  for caption in dict.fromkeys(caption for run in runs for caption in run.samples):
    strips = [report.strips(run.name, run.samples[caption]) for run in runs if caption in run.samples]
    found.append({'caption': caption, 'strips': strips})
  return found


def _out(runs: Sequence[Run], given: str | os.PathLike[str] | None) -> pathlib.Path:
  """Returns the folder of the page; raises UserError if it is a file, holds other files, or cannot be written to."""
  if given is None:
    directory = runs[0].directory / 'report' / 'comparison'
  else:
    directory = paths.on_disk('--out', given)
  if directory.exists() and not directory.is_dir():
    raise UserError(f'--out={directory} is a file; name a folder')
  others = (
    {entry.name for entry in directory.iterdir()} - {_PAGE, *_FIGURES.values()}
    if directory.is_dir()
    else set()
  )
  if others:
    raise UserError(f'--out={directory} holds other files, such as {min(others)}; name another folder')
  existing = next(path for path in (directory, *directory.parents) if path.exists())
  if not existing.is_dir() or not os.access(existing, os.W_OK):
    raise UserError(f'--out={directory}: {existing} is not a writable directory')
  return directory


def _text(runs: Sequence[Run], lines: Sequence[Mapping[str, Any]]) -> Iterator[str]:
  """Yields the lines of the table as text, with aligned columns."""
  first = runs[0].name
  head = ['stage', 'sampler', 'steps', 'NFE', *(run.name for run in runs)]
  cells = [[*head, *(f'{run.name} - {first}' for run in runs[1:])]]
  for line in lines:
    weights = '' if line['weights'] == 'ema' else f' ({line["weights"]})'
    guided = f', W = {line["guidance"]:g}' if line['guidance'] else ''
    values = zip(line['values'], line['errors'], strict=True)
    cells.append(
      [
        *(line['stage'] + weights, line['sampler'] + guided, str(line['num_steps']), str(line['nfe'])),
        *(report.measured(value, error) for value, error in values),
        *(report.signed(difference) for difference in line['differences']),
      ]
    )
  widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
  for row in cells:
    aligned = [
      text.ljust(w) if k < 2 else text.rjust(w)
      for k, (text, w) in enumerate(zip(row, widths, strict=True))
    ]
    yield '  '.join(aligned).rstrip()
