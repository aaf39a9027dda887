"""Training metrics of a stage: lines of JSON, and TensorBoard events."""

import json
import os
import pathlib

import tensorboardX


class MetricsWriter:
  """Appends to `stage_dir/metrics.jsonl` and to an events file beside it.

  Args:
    stage_dir: an existing directory.
    step: the step that the stage goes on from; what an interrupted run wrote beyond it is dropped, so that
      no step stands in the file twice.
  """

  def __init__(self, stage_dir: pathlib.Path, step: int) -> None:
    path = stage_dir / 'metrics.jsonl'
    _drop_after(path, step)
    self._file = path.open('a')
    self._events = tensorboardX.SummaryWriter(str(stage_dir), purge_step=step + 1)

  def write(self, step: int, values: dict[str, float]) -> None:
    """One line, and one event a value."""
    self._file.write(json.dumps({'step': step, **values}) + '\n')
    self._file.flush()
    for name, value in values.items():
      self._events.add_scalar(name, value, step)

  def close(self) -> None:
    """Flushes and closes both files."""
    self._file.close()
    self._events.close()


def _drop_after(path: pathlib.Path, step: int) -> None:
  if not path.exists():
    return
  kept = []
  for line in path.read_text(errors='replace').splitlines():
    try:
      if json.loads(line)['step'] <= step:
        kept.append(line + '\n')
    except (ValueError, KeyError, TypeError):
      continue  # the last line of a killed run can be half written
  temporary = path.with_suffix('.tmp')
  temporary.write_text(''.join(kept))
  os.replace(temporary, path)
