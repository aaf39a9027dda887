"""Shows progress, rate and remaining time: a bar on a terminal, otherwise a line at intervals."""

import sys
import time

import tqdm

from diffusion_distillation.system import files, interrupts


class Progress:
  """Counts steps of `total`; use as a context manager.

  Args:
    name: name of the stage or the work.
    total: total number of steps.
    start: number of steps that are already done.
    images_per_step: images per step, for the displayed rate.
    line_seconds: seconds between two lines if there is no terminal.
    work_after: the work that follows, in multiples of `total` steps; if it is above 0, the time for both is shown, too.
    unit: what is counted.
  """

  def __init__(
    self,
    name: str,
    total: int,
    start: int = 0,
    images_per_step: int = 1,
    line_seconds: float = 15.0,
    work_after: float = 0.0,
    unit: str = 'images',
  ) -> None:
    self._unit = unit
    self._name, self._total, self._start, self._done = name, total, start, start
    self._images_per_step, self._line_seconds = images_per_step, line_seconds
    self._note, self._work_after = '', work_after
    self._began = self._last_line = time.monotonic()
    self._first: tuple[int, float] | None = None
    self._bar = None
    self._silent = not files.writes()
    if sys.stderr.isatty() and not self._silent:
      layout = '{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}'
      self._bar = tqdm.tqdm(
        desc=f'{name:<16}', total=total, initial=start, bar_format=layout, dynamic_ncols=True
      )

  def __enter__(self) -> 'Progress':
    return self

  def __exit__(self, *exc: object) -> None:
    if self._bar is not None:
      self._bar.close()
    elif self._done > self._start and not self._silent:
      self._line()

  def advance(self, steps: int = 1) -> None:
    """Counts `steps` more steps as done."""
    self._done += steps
    if self._first is None:
      self._first = (self._done, time.monotonic())
    if self._bar is not None:
      self._bar.set_postfix_str(self._status(), refresh=False)
      self._bar.update(steps)
    elif not self._silent and time.monotonic() - self._last_line >= self._line_seconds:
      self._line()

  def note(self, text: str) -> None:
    """Sets the text that is shown next to the count, such as the loss."""
    self._note = text

  def _status(self) -> str:
    """Returns the note, the rate, and the remaining time as text."""
    rate = self._rate()
    left = (self._total - self._done) / max(rate, 1e-9)
    parts = [self._note] if self._note else []
    parts += [f'{rate * self._images_per_step:.0f} {self._unit}/s', f'{_clock(left)} left']
    if self._work_after:
      in_all = left + self._work_after * self._total / max(rate, 1e-9)
      parts[-1] += f' ({_clock(in_all)} in all)'
    return ', '.join(parts)

  def _rate(self) -> float:
    """Returns steps per second since the first advance, to exclude compilation; before the second advance, since the start."""
    if self._first is None or self._first[0] == self._done:
      since, began = self._start, self._began
    else:
      since, began = self._first
    return (self._done - since) / max(time.monotonic() - began, 1e-9)

  def _line(self) -> None:
    self._last_line = time.monotonic()
    line = f'{self._name}: {self._done}/{self._total}, {self._status()}'
    try:
      print(line, file=sys.stderr, flush=True)
    except BrokenPipeError:  # stderr is closed: save the work and stop
      self._silent = True
      interrupts.request('SIGPIPE')


def _clock(seconds: float) -> str:
  text: str = tqdm.tqdm.format_interval(seconds)
  return text
