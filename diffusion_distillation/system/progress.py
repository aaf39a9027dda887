"""How far, how fast, how long still: a bar on a terminal, a line now and then elsewhere."""

import sys
import time

import tqdm

from diffusion_distillation.system import files


class Progress:
  """Counts steps of `total`; use as a context manager.

  Args:
    name: of the stage or the work.
    total: steps in all.
    start: steps done before.
    images_per_step: for the rate that is shown.
    line_seconds: time between lines where there is no terminal.
  """

  def __init__(
    self,
    name: str,
    total: int,
    start: int = 0,
    images_per_step: int = 1,
    line_seconds: float = 15.0,
  ) -> None:
    self._name, self._total, self._start, self._done = name, total, start, start
    self._images_per_step, self._line_seconds = images_per_step, line_seconds
    self._note = ''
    self._began = self._last_line = time.monotonic()
    self._bar = None
    self._silent = not files.writes()
    if sys.stderr.isatty() and not self._silent:
      layout = '{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}{postfix}, {remaining} left'
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
    if self._bar is not None:
      self._bar.set_postfix_str(self._status(), refresh=False)
      self._bar.update(steps)
    elif not self._silent and time.monotonic() - self._last_line >= self._line_seconds:
      self._line()

  def note(self, text: str) -> None:
    """What stands beside the count, such as the loss."""
    self._note = text

  def _rate(self) -> float:
    return (self._done - self._start) / max(time.monotonic() - self._began, 1e-9)

  def _status(self) -> str:
    rate = f'{self._rate() * self._images_per_step:.0f} images/s'
    return f'{self._note}, {rate}' if self._note else rate

  def _line(self) -> None:
    self._last_line = time.monotonic()
    left = (self._total - self._done) / max(self._rate(), 1e-9)
    clock = tqdm.tqdm.format_interval(left)
    line = f'{self._name}: {self._done}/{self._total}, {self._status()}, {clock} left'
    print(line, file=sys.stderr, flush=True)
