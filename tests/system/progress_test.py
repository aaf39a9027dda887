import io
import re
import sys

from diffusion_distillation.system.progress import Progress


class Terminal(io.StringIO):
  def isatty(self):
    return True


def test_lines_where_there_is_no_terminal(monkeypatch, capsys):
  now = [0.0]
  monkeypatch.setattr('time.monotonic', lambda: now[0])
  with Progress('base', total=10, start=2, images_per_step=64, line_seconds=15.0) as progress:
    for _ in range(8):
      now[0] += 4.0
      progress.note('loss 0.5')
      progress.advance()
  lines = capsys.readouterr().err.splitlines()
  assert lines == [
    'base: 6/10, loss 0.5, 16 images/s, 00:16 left',
    'base: 10/10, loss 0.5, 16 images/s, 00:00 left',
    'base: 10/10, loss 0.5, 16 images/s, 00:00 left',
  ]


def test_the_rate_leaves_out_what_happens_before_the_first_advance(monkeypatch, capsys):
  now = [0.0]
  monkeypatch.setattr('time.monotonic', lambda: now[0])
  with Progress('base', total=8, line_seconds=15.0) as progress:
    for seconds in (100.0, 5.0, 5.0):
      now[0] += seconds
      progress.advance(2)
  first, last = capsys.readouterr().err.splitlines()
  assert first.endswith('2/8, 0 images/s, 05:00 left') and last.endswith('6/8, 0 images/s, 00:05 left')


def test_the_time_of_all_that_follows_is_shown_beside_the_time_that_is_left(monkeypatch, capsys):
  """4 steps of 10 seconds are left, and then 2.5 times as much as all 8."""
  now = [0.0]
  monkeypatch.setattr('time.monotonic', lambda: now[0])
  with Progress('base', total=8, line_seconds=15.0, work_after=2.5) as progress:
    for _ in range(4):
      now[0] += 10.0
      progress.advance()
  assert capsys.readouterr().err.splitlines()[-1] == 'base: 4/8, 0 images/s, 00:40 left (04:00 in all)'


def test_a_bar_on_a_terminal(monkeypatch):
  terminal = Terminal()
  monkeypatch.setattr(sys, 'stderr', terminal)
  with Progress('base', total=4, images_per_step=64) as progress:
    for _ in range(4):
      progress.note('loss 0.25')
      progress.advance()
  last = terminal.getvalue().split('\r')[-1]
  assert re.search(r'base +100%\|.*\| 4/4, loss 0\.25, \d+ images/s, 00:00 left', last)
