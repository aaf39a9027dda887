"""Deliberate breaks: mistakes that a person makes, each of which a test must catch.

  python -m tests.breaks                 all of them; the exit code is 1 unless all are caught
  python -m tests.breaks --list          what there is
  python -m tests.breaks --only samplers those whose title, file or test contains a text
  python -m tests.breaks --check         first runs the tests on the unbroken copy, where they must pass

The breaks are in tests/breaks_tables/. One break is a title, the file below diffusion_distillation/ (or main.py) with the
test that catches it, and the lines that are replaced:

  The velocity has the wrong sign.
  diffusion/process.py tests/diffusion/process_test.py::test_velocity_inverts_from_v_at_any_logsnr
  - return alpha * prediction.eps - sigma * prediction.x
  + return alpha * prediction.eps + sigma * prediction.x

The old text must occur exactly once. Each break is made in a copy of the repository, by itself, in a process that is forked
from one which has imported all libraries; all of them share one cache of compiled programs.
"""

import argparse
import importlib
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from typing import NamedTuple

import pytest

from tests import conftest  # noqa: F401 (sets the environment of all tests, before jax is imported)

ROOT = pathlib.Path(__file__).parent.parent
TABLES = pathlib.Path(__file__).parent / 'breaks_tables'
PACKAGE = 'diffusion_distillation'
_OWN = ('tests', 'configs', 'main', PACKAGE)  # imported anew by every process
_LIBRARIES = (
  *('numpy', 'scipy.special', 'scipy.linalg', 'jax', 'flax.linen', 'optax', 'orbax.checkpoint'),
  *('sklearn.datasets', 'matplotlib.figure', 'PIL.Image', 'safetensors.numpy', 'tensorboardX'),
  *('ml_collections.config_flags', 'absl.testing.flagsaver'),
)
_LIMIT = 300  # seconds of one break, after which it counts as an error of the table


class Break(NamedTuple):
  """A mistake.

  Attributes:
    title: what is wrong, in a sentence.
    file: that it is made in, below the root.
    test: a test file or one test of it, which must fail.
    old: text of the file.
    new: what stands there instead.
  """

  title: str
  file: str
  test: str
  old: str
  new: str


def read(text: str) -> list[Break]:
  """The breaks of a table, as the module's docstring has them; ValueError, naming the break, if one is not of that form."""
  found = []
  for block in filter(None, (block.strip('\n') for block in text.split('\n\n'))):
    title, where, *lines = block.splitlines()
    old = '\n'.join(line[2:] for line in lines if line.startswith('-'))
    new = '\n'.join(line[2:] for line in lines if line.startswith('+'))
    if len(where.split()) != 2 or not old or any(line[:1] not in ('-', '+') for line in lines):
      raise ValueError(f'not the form of a break:\n{block}')
    file, test = where.split()
    path = file if (ROOT / file).is_file() else f'{PACKAGE}/{file}'
    found.append(Break(title, path, test, old, new))
  return found


def read_all() -> list[Break]:
  """The breaks of all tables."""
  return [found for path in sorted(TABLES.glob('*.txt')) for found in read(path.read_text())]


def problem(broken: Break) -> str:
  """What is wrong with a break itself, or ''."""
  path = ROOT / broken.file
  count = path.read_text().count(broken.old) if path.is_file() else 0
  if count != 1:
    return f'its old text occurs {count} times in {broken.file}'
  test, _, name = broken.test.partition('::')
  if not (ROOT / test).is_file() or f'def {name.partition("[")[0]}' not in (ROOT / test).read_text():
    return f'there is no {broken.test}'
  return ''


def copy(target: pathlib.Path) -> None:
  """Copies the repository: what git knows, and Python files that it does not know yet."""

  def listed(*options: str) -> list[str]:
    command = ['git', 'ls-files', '-z', *options]
    return subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout.split(
      '\0'
    )

  for name in {*listed(), *listed('--others', '--exclude-standard', '*.py')} - {''}:
    if (ROOT / name).is_file():
      (target / name).parent.mkdir(parents=True, exist_ok=True)
      shutil.copy2(ROOT / name, target / name)


def run_test(repository: pathlib.Path, test: str) -> tuple[int | None, str]:
  """Runs a test of a copy in a forked process; pytest's exit code, or None if it crashed or hung, and its output."""
  scratch = pathlib.Path(tempfile.mkdtemp(dir=repository.parent))
  log = scratch / 'output'
  sys.stdout.flush()
  if (process := os.fork()) == 0:
    code = 3
    try:
      code = _in_child(repository, test, scratch, log)
    finally:
      os._exit(code)  # not the parent's exit handlers, which remove the shared cache
  deadline = time.monotonic() + _LIMIT
  while (status := os.waitpid(process, os.WNOHANG))[0] == 0:
    if time.monotonic() > deadline:
      os.kill(process, signal.SIGKILL)
      status = os.waitpid(process, 0)
      break
    time.sleep(0.02)
  output = log.read_text(errors='replace') if log.is_file() else ''
  shutil.rmtree(scratch, ignore_errors=True)
  return os.WEXITSTATUS(status[1]) if os.WIFEXITED(status[1]) else None, output


def _in_child(repository: pathlib.Path, test: str, scratch: pathlib.Path, log: pathlib.Path) -> int:
  file = os.open(log, os.O_WRONLY | os.O_CREAT)
  os.dup2(file, 1)
  os.dup2(file, 2)
  for name in [name for name in sys.modules if name.split('.')[0] in _OWN]:
    del sys.modules[name]
  os.chdir(repository)
  sys.path[:] = [str(repository), *(path for path in sys.path if path not in ('', str(ROOT)))]
  sys.argv = ['pytest']
  os.environ['TMPDIR'] = tempfile.tempdir = str(scratch)
  options = ('-n', '0', '-x', '-q', '-p', 'no:cacheprovider', f'--basetemp={scratch / "pytest"}')
  code = pytest.main([*options, test])
  sys.stdout.flush()
  return int(code)


def try_break(repository: pathlib.Path, broken: Break, number: int) -> tuple[str, str]:
  """Makes a break in the copy, runs its test, and mends it; 'caught', 'SURVIVED' or 'ERROR', and the output."""
  path = repository / broken.file
  text, written = path.read_text(), path.stat().st_mtime
  path.write_text(text.replace(broken.old, broken.new))
  # A time of its own: Python takes a file of the same time and size for the one that it has compiled.
  os.utime(path, times=(written, written + 10 * (number + 1)))
  try:
    code, output = run_test(repository, broken.test)
  finally:
    path.write_text(text)
    os.utime(path, times=(written, written))
  return {0: 'SURVIVED', 1: 'caught'}.get(code, 'ERROR') if code is not None else 'ERROR', output


def failing(repository: pathlib.Path, breaks: list[Break]) -> set[str]:
  """The tests that fail on the unbroken copy, which catch nothing; printed with their output."""
  found = set()
  for test in dict.fromkeys(broken.test for broken in breaks):
    code, output = run_test(repository, test)
    if code != 0:
      found.add(test)
      print(f'FAILS UNBROKEN  {test}\n{output[-3000:]}', flush=True)
  return found


def main() -> int:
  """Returns the exit code."""
  parser = argparse.ArgumentParser(prog='python -m tests.breaks', description=__doc__.splitlines()[0])
  parser.add_argument('--only', default='', help='those whose title, file or test contains this')
  parser.add_argument('--list', action='store_true', help='print the breaks, and run nothing')
  parser.add_argument('--check', action='store_true', help='first run all tests on the unbroken copy')
  options = parser.parse_args()
  every = read_all()
  breaks = [b for b in every if options.only in '\n'.join((b.title, b.file, b.test))]
  if options.list:
    for broken in breaks:
      print(f'{broken.file}: {broken.title} {broken.test}')
    print(f'{len(breaks)} breaks')
    return 0
  wrong = [f'{b.file}: {b.title} {text}' for b in breaks if (text := problem(b))]
  if wrong or not breaks:
    print('\n'.join(wrong) or f'no break contains {options.only!r}')
    return 1
  for library in _LIBRARIES:
    importlib.import_module(library)
  began, counts = time.monotonic(), dict.fromkeys(('caught', 'SURVIVED', 'ERROR'), 0)
  with tempfile.TemporaryDirectory(prefix='breaks-') as directory:
    repository = pathlib.Path(directory).resolve() / 'repository'
    copy(repository)
    unusable = failing(repository, breaks) if options.check else set()
    for number, broken in enumerate(breaks):
      start = time.monotonic()
      if broken.test in unusable:
        verdict, output = 'ERROR', f'{broken.test} fails on the unbroken copy'
      else:
        verdict, output = try_break(repository, broken, number)
      counts[verdict] += 1
      seconds = time.monotonic() - start
      print(f'{verdict:8} {seconds:5.1f} s  {broken.file}: {broken.title}', flush=True)
      if verdict == 'ERROR':
        print(output[-3000:], flush=True)
  errors = f', {counts["ERROR"]} errors' if counts['ERROR'] else ''
  print(
    f'{counts["caught"]} caught, {counts["SURVIVED"]} survived{errors} ({time.monotonic() - began:.0f} s)'
  )
  return int(counts['caught'] < len(breaks))


if __name__ == '__main__':
  sys.exit(main())
