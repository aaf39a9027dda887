"""Training metrics of a stage: lines of JSON, and TensorBoard events."""

import dataclasses
import json
import os
import pathlib
import time
from typing import IO

from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from diffusion_distillation.config import NOT_NEGATIVE, POSITIVE, key
from diffusion_distillation.system import files

_FLUSH = 30.0  # seconds after which events are on the disk


@dataclasses.dataclass(frozen=True)
class LogSection:
  """What a run reports while it trains."""

  every: int = key(100, 'Number of updates between two lines of `metrics.jsonl`.', POSITIVE)
  measured_updates: int = key(
    3,
    'Number of updates of each kind that `--mode=plan` times to estimate how long a run takes; 0 for no estimate.',
    NOT_NEGATIVE,
  )
  health_every: int = key(
    1000,
    "Number of updates between two checks of a student's samples (`health.json`); 0 for no checks.",
    NOT_NEGATIVE,
  )
  seconds: float = key(
    15.0, 'Seconds between two lines of progress where stderr is not a terminal.', NOT_NEGATIVE
  )


class MetricsWriter:
  """Appends to `stage_dir/metrics.jsonl` and to an events file beside it.

  Args:
    stage_dir: an existing directory.
    step: the step that the stage goes on from; what an interrupted run wrote beyond it is dropped, so that
      no step stands in the file twice.
  """

  def __init__(self, stage_dir: pathlib.Path, step: int) -> None:
    self._file: IO[str] | None = None
    if not files.writes():
      return
    path = stage_dir / 'metrics.jsonl'
    _drop_after(path, step)
    self._file = path.open('a')
    # Without its thread, which a full disk would kill, and whose queue then never takes another event.
    self._events = event_file_writer.EventsWriter(str(stage_dir / 'events'))
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add(step + 1, session_log=start)  # hides what comes later than it in older files
    self._flushed = time.monotonic()

  def _add(self, step: int, **what: object) -> None:
    self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step, **what))

  def write(self, step: int, values: dict[str, float]) -> None:
    """One line, and one event a value; by the first process of several."""
    if self._file is None:
      return
    self._file.write(json.dumps({'step': step, **values}) + '\n')
    self._file.flush()
    for name, value in values.items():
      self._add(step, summary=summary.scalar(name, value))
    if time.monotonic() - self._flushed > _FLUSH:
      self._events.flush()
      self._flushed = time.monotonic()

  def close(self) -> None:
    """Flushes and closes both files."""
    if self._file is None:
      return
    try:
      self._file.close()
    finally:
      self._events.close()


def read(path: pathlib.Path) -> list[dict[str, float]]:
  """The lines of a metrics.jsonl; not one that a killed run has half written."""
  found = []
  for line in path.read_text(errors='replace').splitlines() if path.is_file() else []:
    try:
      values = json.loads(line)
      found.append({'step': int(values['step']), **values})
    except (ValueError, KeyError, TypeError):
      continue
  return found


def _drop_after(path: pathlib.Path, step: int) -> None:
  if not path.exists():
    return
  kept = [json.dumps(line) + '\n' for line in read(path) if line['step'] <= step]
  temporary = path.with_suffix('.tmp')
  temporary.write_text(''.join(kept))
  os.replace(temporary, path)
