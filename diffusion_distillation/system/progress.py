"""How far, how fast, how long still: a bar on a terminal, a line now and then elsewhere."""

import sys
import time

import tqdm

from diffusion_distillation.system import files, interrupts


class Progress:
  """Counts steps of `total`; use as a context manager.

  Args:
    name: of the stage or the work.
    total: steps in all.
    start: steps done before.
    images_per_step: for the rate that is shown.
    line_seconds: time between lines where there is no terminal.
    work_after: the work that follows, as a multiple of all `total` steps; above 0, the time that both take is shown, too.
  """

  def __init__(
    self,
    name: str,
    total: int,
    start: int = 0,
    images_per_step: int = 1,
    line_seconds: float = 15.0,
    work_after: float = 0.0,
  ) -> None:
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
    """`steps` more are done."""
    self._done += steps
    if self._first is None:
      self._first = (self._done, time.monotonic())
    if self._bar is not None:
      self._bar.set_postfix_str(self._status(), refresh=False)
      self._bar.update(steps)
    elif not self._silent and time.monotonic() - self._last_line >= self._line_seconds:
      self._line()

  def note(self, text: str) -> None:
    """What stands beside the count, such as the loss."""
    self._note = text

  def _status(self) -> str:
    """The note, the rate, and the time that is left."""
    rate = self._rate()
    left = (self._total - self._done) / max(rate, 1e-9)
    parts = [self._note] if self._note else []
    parts += [f'{rate * self._images_per_step:.0f} images/s', f'{_clock(left)} left']
    if self._work_after:
      in_all = left + self._work_after * self._total / max(rate, 1e-9)
      parts[-1] += f' ({_clock(in_all)} in all)'
    return ', '.join(parts)

  def _rate(self) -> float:
    """Steps per second since the first advance, which leaves compilation out; after a single advance, since the beginning."""
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
    except BrokenPipeError:  # nobody reads it any more: the work is saved before it ends
      self._silent = True
      interrupts.request('SIGPIPE')


def _clock(seconds: float) -> str:
  text: str = tqdm.tqdm.format_interval(seconds)
  return text
