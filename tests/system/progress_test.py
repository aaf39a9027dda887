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


def test_a_bar_on_a_terminal(monkeypatch):
  terminal = Terminal()
  monkeypatch.setattr(sys, 'stderr', terminal)
  with Progress('base', total=4, images_per_step=64) as progress:
    for _ in range(4):
      progress.note('loss 0.25')
      progress.advance()
  last = terminal.getvalue().split('\r')[-1]
  assert re.search(r'base +100%\|.*\| 4/4, loss 0\.25, \d+ images/s, 00:00 left', last)
