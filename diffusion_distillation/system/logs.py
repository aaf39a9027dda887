"""Training metrics of a stage, written as lines of JSON and as TensorBoard events."""

import dataclasses
import json
import os
import pathlib
import time
from typing import IO

from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from diffusion_distillation.config import AT_LEAST_TWO, NOT_NEGATIVE, POSITIVE, key
from diffusion_distillation.system import files

_FLUSH = 30.0  # seconds between two flushes of the events


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
  frechet_every: int = key(
    0,
    "Number of updates between two measurements of a stage's Frechet distance during training, which also keep the best "
    'weights; 0 for none.',
    NOT_NEGATIVE,
  )
  frechet_samples: int = key(1000, 'Number of samples of each of these measurements.', AT_LEAST_TWO)
  seconds: float = key(
    15.0, 'Seconds between two lines of progress if stderr is not a terminal.', NOT_NEGATIVE
  )


class MetricsWriter:
  """Appends to `stage_dir/metrics.jsonl` and to an events file next to it.

  Args:
    stage_dir: an existing directory.
    step: the step that the stage resumes from; later lines of an interrupted run are removed, so that no step appears twice.
  """

  def __init__(self, stage_dir: pathlib.Path, step: int) -> None:
    self._file: IO[str] | None = None
    if not files.writes():
      return
    path = stage_dir / 'metrics.jsonl'
    _drop_after(path, step)
    self._file = path.open('a')
    # Not the writer with a thread: a full disk would kill the thread, and its queue would then block.
    self._events = event_file_writer.EventsWriter(str(stage_dir / 'events'))
    start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
    self._add(step + 1, session_log=start)  # makes TensorBoard hide later events in older files
    self._flushed = time.monotonic()

  def _add(self, step: int, **what: object) -> None:
    self._events.write_event(event_pb2.Event(wall_time=time.time(), step=step, **what))

  def write(self, step: int, values: dict[str, float]) -> None:
    """Writes one line, and one event per value; of several processes, only the first one writes."""
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
  """Reads the lines of a metrics.jsonl; skips incomplete lines, which a killed run may leave."""
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
