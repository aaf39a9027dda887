"""Executes the notebooks of the repository, each in a kernel and an empty directory of its own.

  python -m tests.notebooks            executes them all and says how long it took; changes nothing
  python -m tests.notebooks --write    also stores the new outputs in the files

What a run prints on stderr, its plan and progress, is left out of the stored outputs. A warning there is an error.
"""

import argparse
import copy
import hashlib
import json
import os
import pathlib
import re
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / 'notebooks').glob('*.ipynb'))
WARNING = re.compile(r'warning|error|traceback', re.IGNORECASE)
METADATA = {
  'kernelspec': {'display_name': 'Python 3', 'language': 'python', 'name': 'python3'},
  'language_info': {'name': 'python'},
}


def execute(path, folder):
  """The notebook with its new outputs; it runs in `folder`, on one device. Raises for a cell that fails."""
  import nbclient  # only where notebooks are executed
  import nbformat
  from jupyter_client.manager import AsyncKernelManager

  notebook = nbformat.read(path, as_version=4)
  left_out = ('XLA_FLAGS', 'JAX_NUMPY_RANK_PROMOTION', 'MPLBACKEND')  # of the tests, not of a user
  environment = {key: value for key, value in os.environ.items() if key not in left_out}
  environment |= {'JAX_PLATFORMS': 'cpu', 'PYTHONPATH': str(ROOT), 'IPYTHONDIR': str(folder / 'ipython')}
  client = nbclient.NotebookClient(
    notebook,
    timeout=1800,
    km=AsyncKernelManager(kernel_name='python3', transport='ipc', ip=str(folder / 'kernel')),  # sockets
    record_timing=False,
    coalesce_streams=True,
    resources={'metadata': {'path': str(folder)}},
  )
  client.execute(env=environment, cleanup_kc=True)
  return notebook


def stderr(notebook):
  """What the cells printed on stderr."""
  outputs = [output for cell in notebook.cells for output in cell.get('outputs', ())]
  return ''.join(output['text'] for output in outputs if output.get('name') == 'stderr')


def warnings(notebook):
  """The lines on stderr that are warnings or errors."""
  return [line for line in stderr(notebook).splitlines() if WARNING.search(line)]


def digest(notebook):
  """Of the code cells: stored with the outputs, it says which code they are from."""
  code = [''.join(cell['source']) for cell in notebook['cells'] if cell['cell_type'] == 'code']
  return hashlib.sha256(json.dumps(code).encode()).hexdigest()[:16]


def store(notebook, path):
  """Writes the notebook without stderr and without traces of this machine."""
  import nbformat

  notebook, path = copy.deepcopy(notebook), pathlib.Path(path)
  notebook.metadata = nbformat.from_dict(METADATA | {'executed': digest(notebook)})
  for cell in notebook.cells:
    cell.metadata = nbformat.from_dict({})
    if cell.cell_type == 'code':
      cell.outputs = [output for output in cell.outputs if output.get('name') != 'stderr']
  temporary = path.with_suffix('.tmp')
  nbformat.write(notebook, temporary)
  os.replace(temporary, path)


def main(argv):
  parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
  parser.add_argument('--write', action='store_true', help='store the new outputs')
  write = parser.parse_args(argv).write
  for path in NOTEBOOKS:
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
      notebook = execute(path, pathlib.Path(folder))
    print(f'{path.relative_to(ROOT)}: executed in {time.monotonic() - began:.0f} s')
    if found := warnings(notebook):
      print(*found, sep='\n')
      return 1
    if write:
      store(notebook, path)
  return 0


if __name__ == '__main__':
  sys.exit(main(sys.argv[1:]))
