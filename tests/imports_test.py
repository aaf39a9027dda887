"""Imports point one way, are quick, and start nothing."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGE = ROOT / 'diffusion_distillation'

# A module imports only from lines above its own. Modules on one line do not know each other.
LAYERS = [
  ['errors', 'compilation'],
  ['files'],
  [
    'schedules',
    'diffusion',
    'interrupts',
    'progress',
    'metrics',
    'train_state',
    'optimizers',
    'sharding',
    'configuration',
    'pixels',
    'classifier',
  ],
  ['cluster'],
  ['datasets.image_set', 'datasets.orders'],
  ['datasets.decoding', 'datasets.splits', 'datasets.workers'],
  ['datasets.settings', 'datasets.loading'],
  ['datasets.digits', 'datasets.shapes', 'datasets.folder', 'datasets.tfds', 'datasets.prepared'],
  ['datasets'],
  ['datasets.preparing'],
  ['times', 'distances', 'weightings', 'samplers', 'unet', 'checkpoints', 'interop.google'],
  ['methods.method'],
  [
    'methods.denoising',
    'methods.progressive',
    'methods.knowledge',
    'methods.consistency',
    'methods.gan',
  ],
  ['methods.dmd'],
  ['methods'],
  ['recipe'],
  ['building', 'update'],
  ['students'],
  ['stages'],
  ['workdir'],
  ['lineage'],
  ['evaluation.frechet', 'evaluation.pictures', 'evaluation.drawing'],
  ['evaluation.features', 'evaluation.report', 'pairs', 'importing'],
  ['evaluation.measure'],
  ['preflight', 'health'],
  ['forecast', 'sources'],
  ['replay'],
  ['train'],
  ['cli'],
  ['', 'evaluation', 'interop'],  # the packages' own files: documentation only
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def module_name(path):
  parts = path.relative_to(PACKAGE).with_suffix('').parts
  return '.'.join(part for part in parts if part != '__init__')


def imported(path):
  """The package's modules that a file imports, and the names of all other top-level ones."""
  inside, outside = set(), set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative import'
      deeper = [f'{node.module}.{alias.name}' for alias in node.names]
      names = [name for name in deeper if name.removeprefix('diffusion_distillation.') in RANK]
      if len(names) < len(deeper):  # something of the package's own file, not modules in it alone
        names.append(node.module)
    else:
      continue
    for name in names:
      if name.split('.')[0] == 'diffusion_distillation':
        inside.add(name.removeprefix('diffusion_distillation').removeprefix('.'))
      else:
        outside.add(name.split('.')[0])
  return inside, outside


FILES = sorted(PACKAGE.rglob('*.py'))


def test_every_module_has_a_layer():
  assert sorted(module_name(path) for path in FILES) == sorted(RANK)


@pytest.mark.parametrize('path', FILES, ids=module_name)
def test_imports_point_one_way(path):
  name = module_name(path)
  below = {other for other in imported(path)[0] if other not in LAYERS[-1]}
  assert all(RANK[other] < RANK[name] for other in below), f'{name} imports {sorted(below)}'


@pytest.mark.parametrize('path', sorted((PACKAGE / 'methods').glob('*.py')), ids=lambda p: p.stem)
def test_methods_import_neither_network_nor_devices(path):
  assert not imported(path)[0] & {'unet', 'sharding', 'train_state', 'checkpoints', 'datasets'}


MATHEMATICS = [
  *sorted((PACKAGE / 'methods').glob('*.py')),
  *(PACKAGE / f'{name}.py' for name in ('samplers', 'diffusion', 'schedules', 'weightings', 'times')),
  *(PACKAGE / f'{name}.py' for name in ('unet', 'update', 'optimizers', 'train_state', 'recipe')),
]


@pytest.mark.parametrize('path', MATHEMATICS, ids=lambda p: p.stem)
def test_mathematics_does_not_know_devices_or_processes(path):
  assert not imported(path)[0] & {'sharding', 'cluster'}
  for word in ('shard', 'mesh', 'fsdp', 'device_count', 'process_index', 'process_count', 'addressable'):
    assert word not in path.read_text().lower(), word


@pytest.mark.parametrize('path', FILES, ids=module_name)
def test_nothing_needs_tensorflow_torch_or_pickle(path):
  assert not imported(path)[1] & {'tensorflow', 'torch', 'pickle', 'configs'}


@pytest.mark.parametrize('path', FILES, ids=module_name)
def test_only_sharding_names_devices(path):
  text = path.read_text()
  if module_name(path) != 'sharding':
    for word in ('Mesh', 'PartitionSpec', 'NamedSharding', 'jax.devices', 'axis_name', 'pmean'):
      assert word not in text, word


@pytest.mark.parametrize('path', sorted((PACKAGE / 'datasets').glob('*.py')), ids=lambda p: p.stem)
def test_what_worker_processes_import_is_without_jax(path):
  """Nor do they import a module that imports it, at whatever distance."""
  files, seen = {module_name(p): p for p in FILES}, set()
  waiting = ['datasets', module_name(path)]  # Python runs a package's own file first
  while waiting:
    name = waiting.pop()
    if name not in seen and name not in LAYERS[-1]:
      seen.add(name)
      inside, outside = imported(files[name])
      assert not outside & {'jax', 'flax', 'optax', 'orbax', 'tensorflow'}, name
      waiting += inside


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
    'import diffusion_distillation.cli;'
    'import jax._src.xla_bridge as bridge;'
    'assert not bridge._backends, bridge._backends;'
    'assert "tensorflow" not in sys.modules and "torch" not in sys.modules'
  )
  subprocess.run([sys.executable, '-c', program], check=True, cwd=ROOT)
