"""The README of an exported model: a model card with the metadata header of the Hugging Face hub."""

import html
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from diffusion_distillation.diffusion import samplers
from diffusion_distillation.networks.conditioning import WEIGHT


class Described(Protocol):
  """The attributes of a format that a card uses; see `exporting.Format`."""

  @property
  def library(self) -> str: ...
  @property
  def files(self) -> Mapping[str, str]: ...
  @property
  def usage(self) -> Callable[[Mapping[str, Any]], str]: ...


PICTURE = 'samples.png'
_OTHER_FILES = {
  'model.json': 'description of the model: network, parameterization, schedule, sampler, provenance, measurements',
  PICTURE: 'images drawn with these files',
}


def render(description: Mapping[str, Any], to: Described, dataset: str | None) -> str:
  """Returns the card in Markdown.

  Args:
    description: content of the model's `model.json`.
    to: the format of the other files.
    dataset: name of the dataset that the model was trained on; None if not known.
  """
  description, dataset = _plain(description), _plain(dataset)
  made, name = description['provenance'], description['sampler']
  stage, steps = made.get('stage', 'model'), description['num_steps']
  height, width, channels = description['image_shape']
  calls = samplers.SAMPLERS[name]().calls(steps)
  label, weights = (description['conditioning'].get(key) for key in ('label', WEIGHT))
  guidance_note = (
    f' It takes the weight of guidance as an input: {weights["low"]:g} to {weights["high"]:g}.'
    if weights
    else ''
  )
  of_texts = 'text' in description['conditioning']  # no picture: it would need a prompt
  kind = f'Class-conditional ({label["count"]} classes)' if label else 'Unconditional'
  kind = 'Text-conditional' if of_texts else kind
  files = to.files | {
    name: text for name, text in _OTHER_FILES.items() if name != PICTURE or not of_texts
  }  # type: ignore[operator]
  parts = [
    _header(origin(made), to.library, 'text-to-image' if of_texts else 'unconditional-image-generation'),
    f'# {stage}\n',
    *([] if of_texts else [f'![samples]({PICTURE})\n']),
    f'{kind} diffusion model of images with {height} x {width} pixels and {channels} '
    f'channel{"s" if channels > 1 else ""}. '
    f'An image takes {steps} {name} step{"s" if steps > 1 else ""}: '
    f'{calls} network evaluation{"s" if calls > 1 else ""}.{guidance_note}\n',
    f'## How to run it\n\n{to.usage(description)}',
    '## Training\n\n' + _training(made, dataset),
    '## Measurements\n\n' + _measurements(description['metrics'], bool(weights)),
    '## Files\n\n' + _table(('file', 'content'), [(f'`{k}`', v) for k, v in files.items()]),
  ]
  if label and label.get('names'):
    rows = [(str(k), text) for k, text in enumerate(label['names'])]
    parts.append('## Classes\n\n' + _table(('label', 'class'), rows))
  return '\n'.join(parts)


def _plain(value: Any) -> Any:
  """Escapes all text in JSON, such as the names of classes, so that it is neither Markdown, nor HTML, nor several lines."""
  if isinstance(value, Mapping):
    return {_plain(key): _plain(part) for key, part in value.items()}
  if isinstance(value, list):
    return [_plain(part) for part in value]
  if not isinstance(value, str):
    return value
  return re.sub(r'([\\`*\[\]|~])', r'\\\1', html.escape(' '.join(value.split()), quote=False))


def origin(made: Mapping[str, Any]) -> Mapping[str, Any]:
  """Returns the provenance of the training; for an imported model, the provenance of its source, if known."""
  imported = made.get('imported')
  return origin(imported.get('provenance') or {}) if imported else made


def _header(made: Mapping[str, Any], library: str, task: str) -> str:
  tags = ['diffusion', *(['distillation'] if made.get('parent') else []), made.get('method')]
  words = [re.sub(r'[^\w-]+', '-', str(tag)) for tag in tags if tag]
  lines = ''.join(f'- {word}\n' for word in words)
  return f'---\nlibrary_name: {library}\npipeline_tag: {task}\ntags:\n{lines}---\n'


def _training(made: Mapping[str, Any], dataset: str | None) -> str:
  lines = [f'- Dataset: {dataset or "not recorded with the model"}']
  trained = origin(made)
  for key, text in (('method', 'Method'), ('updates', 'Updates'), ('distance', 'Distance')):
    if trained.get(key) is not None:
      lines.append(f'- {text}: {trained[key]}')
  for key, text in (('parent', 'Teacher'), ('start', 'Initialized from')):
    if source := trained.get(key):
      lines.append(
        f'- {text}: {source["stage"]} (weights {source["weights"]}, digest {source["digest"][:12]})'
      )
  if imported := made.get('imported'):
    lines.append(
      f'- Imported from: {imported.get("source")}, {imported.get("file") or imported.get("folder")}'
    )
  if packages := made.get('versions'):
    lines.append(f'- Versions: {", ".join(f"{key} {text}" for key, text in packages.items())}')
  return '\n'.join(lines) + '\n'


def _measurements(rows: Sequence[Mapping[str, Any]], takes_weight: bool) -> str:
  """Returns a table with one row per measurement of the model."""
  if not rows:
    return 'No measurements are recorded with the model.\n'
  table = [
    (
      f'{row.get("num_steps")} {row.get("sampler")} ({row.get("grid")}){_circumstances(row)}',
      *(str(row.get(key)) for key in ('nfe', 'weights', 'num_samples')),
      ', '.join(f'{key} {value:.4g}' for key, value in row.get('metrics', {}).items()),
    )
    for row in rows
  ]
  columns = ('steps', 'network evaluations', 'weights', 'samples', 'metrics')
  return f'{_table(columns, table)}\n{" ".join(_meanings(rows))}{_notes(rows, takes_weight)}\n'


def _meanings(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
  """Yields sentences on the metrics that the rows have."""
  names = sorted(
    {str(row.get('metric')) for row in rows if 'frechet' in row.get('metrics', {'frechet'})}
  )
  if names:
    yield (
      f'`frechet` is the Fréchet distance {", ".join(names)} between features of generated images and of training images; '
      'the name of the feature extractor follows `FD-`. Smaller distances (`frechet`, `kid`, `sfid`, `fd_dinov2`) are better, and '
      'larger `precision`, `recall` and `inception_score`. All are only comparable for the same extractor and number of samples.'
    )
  if any('clip_score' in row.get('metrics', ()) for row in rows):
    yield (
      '`clip_score` is the mean of 100 cos(image, text) over the images and the texts that they were drawn for; larger is better. It '
      'is only comparable for the same CLIP model and texts.'
    )


def _circumstances(row: Mapping[str, Any]) -> str:
  """Returns what else distinguishes a measurement: guidance, where in noise levels it applied, and a dtype other than float32."""
  text = ''
  if row.get('guidance'):
    text += f', guidance W = {row["guidance"]:g}'
    if row.get('guidance_interval'):
      low, high = row['guidance_interval']
      text += f' for {low:g} < sigma / alpha' + ('' if high is None else f' <= {high:g}')
  return text + (f', {row["dtype"]}' if row.get('dtype', 'float32') != 'float32' else '')


def _notes(rows: Sequence[Mapping[str, Any]], takes_weight: bool) -> str:
  """Explains guidance and the dtype if a row has them."""
  text = ''
  if any(row.get('guidance') for row in rows):
    text += (
      ' Guidance W draws with x + W (x - x without the class), for which many programs state 1 + W; these files '
      + ('take W as an input.' if takes_weight else 'draw without guidance.')
    )
  if any(row.get('dtype', 'float32') != 'float32' for row in rows):
    text += ' A dtype is that of the activations while measuring; these files compute in float32.'
  return text


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  lines = [columns, ['---'] * len(columns), *rows]
  return ''.join(f'| {" | ".join(line)} |\n' for line in lines)
