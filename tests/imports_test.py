"""Imports go down the floors of the package, are quick, and start nothing."""

import ast
import functools
import subprocess
import sys

import pytest

from tests.tiny import ROOT

PACKAGE = ROOT / 'diffusion_distillation'

# The floors, top to bottom: a file imports from its own folder and from the floors below it.
FLOORS = [
  ['__main__'],
  ['command'],
  ['cli', 'api'],
  ['modes'],
  ['arguments'],
  ['options'],
  ['run'],
  ['interop'],
  ['serving'],
  ['evaluation'],
  ['stages'],
  ['training'],
  ['methods'],
  ['networks'],
  ['diffusion'],
  ['config'],
  ['paths'],
  ['errors'],
]
RANK = {name: -k for k, names in enumerate(FLOORS) for name in names}
# They stand beside the floors: from `stages` up everything may use them; the mathematics below does not know them.
BESIDE = {
  'system': {'system', 'config', 'paths', 'errors'},
  'datasets': {'datasets', 'system', 'config', 'paths', 'errors'},
}


def module_name(path):
  parts = path.relative_to(PACKAGE).with_suffix('').parts
  return '.'.join(part for part in parts if part != '__init__')


FILES = sorted(PACKAGE.rglob('*.py'))
MODULES = {module_name(path): path for path in FILES}


def top(module):
  """The folder of a module, or its own name if it lies in none."""
  return module.split('.')[0]


@functools.cache
def imported(path):
  """The package's modules that a file imports, and the names of all other top-level ones."""
  inside, outside = set(), set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      deeper = [f'{node.module}.{alias.name}' for alias in node.names]
      names = [name for name in deeper if name.removeprefix('diffusion_distillation.') in MODULES]
      if len(names) < len(deeper):  # something of the package's own file, not modules in it alone
        names.append(node.module)
    else:
      continue
    for name in names:
      if name.split('.')[0] == 'diffusion_distillation':
        inside.add(name.removeprefix('diffusion_distillation').removeprefix('.'))
      else:
        outside.add(name.split('.')[0])
  return frozenset(inside - {''}), frozenset(outside)


def allowed(folder):
  """The folders that a file in `folder` may import from."""
  if folder in BESIDE:
    return BESIDE[folder]
  below = {name for name in RANK if RANK[name] < RANK[folder]} | {folder}
  return below | (set(BESIDE) if RANK[folder] >= RANK['stages'] else set())


@pytest.mark.parametrize('path', FILES, ids=module_name)
def test_imports_go_down_the_floors(path):
  name = module_name(path)
  if name:
    wrong = {other for other in imported(path)[0] if top(other) not in allowed(top(name))}
    assert not wrong, f'{name} must not import {sorted(wrong)}'


def test_no_two_modules_need_each_other():
  done = set()

  def visit(name, path):
    assert name not in path, f'a cycle: {" -> ".join((*path, name))}'
    if name not in done:
      for other in imported(MODULES[name])[0]:
        visit(other, (*path, name))
      done.add(name)

  for name in MODULES:
    visit(name, ())


@pytest.mark.parametrize('path', sorted((PACKAGE / 'methods').glob('*.py')), ids=lambda p: p.stem)
def test_methods_do_not_import_networks_of_images(path):
  """They receive networks; only a head of their own and the classifier of distances are theirs to make."""
  known = {f'networks.{name}' for name in ('classifier', 'conditioning', 'denoiser', 'guidance', 'head')}
  assert {name for name in imported(path)[0] if top(name) == 'networks'} <= known


MATHEMATICS = [
  path
  for folder in ('methods', 'networks', 'diffusion', 'training')
  for path in sorted((PACKAGE / folder).glob('*.py'))
]


@pytest.mark.parametrize('path', MATHEMATICS, ids=module_name)
def test_mathematics_does_not_know_devices_or_processes(path):
  for word in ('shard', 'mesh', 'fsdp', 'device_count', 'process_index', 'process_count', 'addressable'):
    assert word not in path.read_text().lower(), word


@pytest.mark.parametrize('path', FILES, ids=module_name)
def test_nothing_needs_tensorflow_torch_or_pickle(path):
  assert not imported(path)[1] & {'tensorflow', 'torch', 'pickle', 'configs'}


@pytest.mark.parametrize('path', FILES, ids=module_name)
def test_only_sharding_names_devices(path):
  text = path.read_text()
  if module_name(path) != 'system.sharding':
    for word in ('Mesh', 'PartitionSpec', 'NamedSharding', 'jax.devices', 'axis_name', 'pmean'):
      assert word not in text, word


@pytest.mark.parametrize('path', sorted((PACKAGE / 'datasets').glob('*.py')), ids=lambda p: p.stem)
def test_what_worker_processes_import_is_without_jax(path):
  """Nor do they import a module that imports it, at whatever distance."""
  seen = set()
  waiting = ['datasets', module_name(path)]  # Python runs a package's own file first
  while waiting:
    name = waiting.pop()
    if name not in seen:
      seen.add(name)
      inside, outside = imported(MODULES[name])
      assert not outside & {'jax', 'flax', 'optax', 'orbax', 'tensorflow'}, name
      waiting += [*inside, *({top(name)} if '.' in name else ())]


def test_a_worker_process_starts_without_jax_and_tensorflow():
  program = (
    'import sys, diffusion_distillation.datasets.loading, diffusion_distillation.datasets.prepared;'
    'found = {"jax", "jaxlib", "flax", "tensorflow", "tensorflow_datasets"} & set(sys.modules);'
    'assert not found, found'
  )
  subprocess.run([sys.executable, '-c', program], check=True, cwd=ROOT)


def test_import_is_quick_and_starts_no_backend():
  program = (
    'import sys, diffusion_distillation;'
    'assert "jax" not in sys.modules, "importing the package alone imports jax";'
    'assert callable(diffusion_distillation.load) and "jax" in sys.modules;'
    'import diffusion_distillation.cli;'
    'import jax._src.xla_bridge as bridge;'
    'assert not bridge._backends, bridge._backends;'
    'found = {"tensorflow", "torch", "gradio", "uvicorn"} & set(sys.modules); assert not found, found'
  )
  subprocess.run([sys.executable, '-c', program], check=True, cwd=ROOT)


def test_imports_of_the_program_are_rarely_interrupted_by_garbage_collection():
  program = (
    'import atexit, gc, runpy, sys; sys.argv = ["main.py", "--help"];'
    'atexit.register(lambda: print(sum(each["collections"] for each in gc.get_stats()), file=sys.stderr));'
    'runpy.run_path("main.py", run_name="__main__")'
  )
  done = subprocess.run([sys.executable, '-c', program], capture_output=True, text=True, cwd=ROOT)
  assert '--workdir' in done.stdout and int(done.stderr) < 100, done.stderr
