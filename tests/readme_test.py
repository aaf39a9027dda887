"""What README and docs say is so: links lead somewhere, commands parse, Python blocks run, messages exist."""

import ast
import contextlib
import pathlib
import re
import shlex
import sys
import types
from unittest import mock

import numpy as np
import pytest
from absl.testing import flagsaver

from configs import default
from diffusion_distillation import cli, command, config, datasets, errors
from diffusion_distillation.arguments import config_names
from diffusion_distillation.diffusion import samplers, schedules, times
from diffusion_distillation.evaluation.metrics import METRICS
from diffusion_distillation.interop import importing
from diffusion_distillation.methods import METHODS
from diffusion_distillation.networks import NETWORKS
from diffusion_distillation.run import encoding, preflight
from diffusion_distillation.stages import model, own_companions
from tests import tiny
from tests.stages.model_test import stored

README = (tiny.ROOT / 'README.md').read_text()
DOCS = {path.name: path.read_text() for path in sorted((tiny.ROOT / 'docs').glob('*.md'))}
PAGES = {'README.md': README, **DOCS}


def blocks(text, language):
  """The fenced blocks of a language."""
  return re.findall(rf'^```{language}\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)


def commands(text):
  """The arguments of every call of main.py in the sh blocks; shell variables are numbers."""
  joined = '\n'.join(blocks(text, 'sh')).replace('\\\n', ' ')
  lines = re.findall(r'\bpython main\.py (.*)$', joined, re.MULTILINE)
  lines = [line[:-1] if line.count("'") % 2 else line for line in lines]  # of a command in quotes
  words = [shlex.split(re.sub(r'\$\w+', '0', line), comments=True) for line in lines]
  return [[word for word in line if word.startswith('-')] for line in words]


def anchors(text):
  """The anchors that GitHub gives the headings."""
  titles = re.findall(r'^#+ (.*)$', text, re.MULTILINE)
  return {re.sub(r'[^\w\- ]', '', title.lower()).replace(' ', '-') for title in titles}


@pytest.mark.parametrize('name', PAGES)
def test_links_lead_to_files_and_headings(name):
  folder = tiny.ROOT if name == 'README.md' else tiny.ROOT / 'docs'
  prose = re.sub(r'^```.*?^```$', '', PAGES[name], flags=re.MULTILINE | re.DOTALL)
  links = [link for link in re.findall(r'\]\(([^)]+)\)', prose) if not link.startswith('http')]
  assert links
  for link in links:
    target, _, anchor = link.partition('#')
    path = folder / target if target else folder / name
    assert path.exists(), link
    assert not anchor or anchor in anchors(path.read_text()), link


def test_every_page_is_linked_from_the_readme_which_is_short():
  linked = set(re.findall(r'\]\(docs/(\w+\.md)', README))
  assert linked == set(DOCS)
  assert len(README.splitlines()) <= 180


@pytest.mark.parametrize('name', PAGES)
def test_nothing_is_left_to_be_filled_in(name):
  assert not re.findall(r'@\w+@|TODO|XXX', PAGES[name])


@pytest.mark.parametrize('name', PAGES)
def test_commands_parse(name, monkeypatch):
  monkeypatch.chdir(tiny.ROOT)
  for arguments in commands(PAGES[name]):
    argv = ['main.py', *arguments]
    with flagsaver.flagsaver(), mock.patch.object(sys, 'argv', argv):
      try:
        assert command.parse_flags(argv) == argv[:1]
      except SystemExit:
        pytest.fail(' '.join(argv))


def test_commands_are_found():
  assert len(commands(README)) == 7 and len(commands(DOCS['scaling.md'])) > 7
  assert ['--mode=sample', '--workdir=runs/mine', '--num_samples=64', '--out=digits.png'] in commands(
    README
  )


def test_commands_of_benchmarks_have_flags_that_exist():
  sources = ''.join(path.read_text() for path in (tiny.ROOT / 'benchmarks').glob('*.py'))
  found = set()
  for text in PAGES.values():
    for program, arguments in re.findall(r'python (benchmarks/\w+\.py)([^`\n]*)', text):
      assert (tiny.ROOT / program).is_file(), program
      found |= set(re.findall(r'--(\w+)', arguments))
  assert found and all(re.search(rf"""['"](--)?{flag}['"]""", sources) for flag in found), found


def test_flags_modes_and_make_targets_exist():
  makefile = (tiny.ROOT / 'Makefile').read_text()
  for text in PAGES.values():
    for line in re.findall(r'^make ([\w -]+)', text, re.MULTILINE):
      for target in line.split():
        assert re.search(rf'^{target}:', makefile, re.MULTILINE), target
    assert set(re.findall(r'--mode=(\w+)', text)) <= set(cli.MODES)
  known = {f'--{name}' for name in flagsaver.flags.FLAGS} | {
    f'--no{name}' for name in flagsaver.flags.FLAGS
  }
  table = DOCS['sample.md'][: DOCS['sample.md'].index('## From Python')]
  named = set(re.findall(r'`(--\w+)', table))
  assert named <= known, named - known


def test_every_key_that_is_overridden_exists():
  known = dict(config.flatten(default.get_config()))
  keys = set(re.findall(r'--config\.([a-z][\w.]*)=', ''.join(PAGES.values())))
  examples = {'model.width', 'student.width'}  # of the network in extend.md
  assert keys and keys - examples <= set(known), keys - examples - set(known)


def test_every_key_in_a_table_of_options_exists():
  known = dict(config.flatten(default.get_config()))
  sections = {key.partition('.')[0] for key in known}
  for name in ('train.md', 'distill.md', 'scaling.md', 'troubleshooting.md', 'evaluate.md', 'sample.md'):
    rows = '\n'.join(line for line in DOCS[name].splitlines() if line.startswith('|'))
    keys = re.findall(r'`([a-z]\w*\.[a-z]\w*)`', rows)
    keys = [
      key for key in keys if key.partition('.')[0] in sections and not key.endswith(('.py', '.json'))
    ]
    assert all(key in known for key in keys), (name, [key for key in keys if key not in known])


def cell(page, first):
  """The row of a table in docs/ that begins with this cell."""
  (row,) = [line for line in DOCS[page].splitlines() if line.startswith(f'| {first} |')]
  return row


def test_tables_have_every_sampler_grid_network_and_schedule():
  for row, table in (
    (cell('sample.md', '`--sampler`'), samplers.SAMPLERS),
    (cell('sample.md', '`--grid`'), times.GRIDS),
    (cell('train.md', 'network'), NETWORKS),
    (cell('train.md', 'noise schedule'), schedules.SCHEDULES),
  ):
    assert [name for name in table if f'`{name}`' not in row] == [], row


def test_every_dataset_and_what_a_run_keeps_for_texts_is_listed():
  section = DOCS['train.md'].partition('## Datasets')[2].partition('\n## ')[0]
  listed = {
    name for line in section.splitlines() for name in re.findall(r'`([\w/]+)`', line.split(' | ')[0])
  }
  assert {*datasets.SOURCES, datasets.PROMPTS, datasets.NONE} <= listed
  layout = DOCS['train.md'].partition('## The workdir')[2]
  for folder in (own_companions.FOLDER, encoding.directory_of('', pathlib.Path()).name):
    assert f'\n    {folder}/ ' in layout


def test_every_config_is_in_the_table_of_configs():
  listed = re.findall(r'\]\(\.\./configs/(\w+)\.py\)', DOCS['train.md'])
  assert set(config_names()) == set(listed)


def test_what_is_new_comes_first():
  """Sections in docs/upgrading.md are newest first, as it says: those of this version before those of the last one."""
  titles = re.findall(r'^## (.*)$', DOCS['upgrading.md'], re.MULTILINE)
  assert titles[-2:] == ['Speed', 'Four seams']
  newest_first = (
    'Guidance',
    'A page to look at models',
    'Runs from Python',
    'Export',
    'Models of diffusers',
    'The command line',
    'Speed',
  )
  places = [titles.index(title) for title in newest_first]
  assert places == sorted(places)


def test_extras_that_are_installed_exist():
  setup = (tiny.ROOT / 'setup.py').read_text()
  for text in PAGES.values():
    for extra in re.findall(r"pip install (?:-e )?'\.\[(\w+)\]'", text):
      assert re.search(rf"^    '{extra}': \[", setup, re.MULTILINE), extra
  assert {'cuda', 'tpu'} <= set(re.findall(r"'\.\[(\w+)\]'", README))


def test_every_folder_and_file_at_the_top_of_the_package_is_in_the_layout():
  layout = DOCS['extend.md'][DOCS['extend.md'].index('## Layout') :]
  for path in (tiny.ROOT / 'diffusion_distillation').iterdir():
    name = f'{path.name}/' if path.is_dir() else path.name
    assert name in (*('__init__.py', '__pycache__/'), *layout.split()), name


def test_every_exit_code_is_in_the_table():
  table = DOCS['troubleshooting.md'].partition('## Exit codes')[2].partition('\n## ')[0]
  listed = [int(code) for code in re.findall(r'^\| (\d+)', table, re.MULTILINE)]
  kinds = [kind for kind in vars(errors).values() if isinstance(kind, type)]
  assert listed == sorted({0, 1, 134} | {kind.exit_code for kind in kinds})


def pieces_of_messages():
  """Every constant text in the package, whitespace squeezed, joined; parts of one message next to each other."""
  found = []
  for path in (tiny.ROOT / 'diffusion_distillation').rglob('*.py'):
    for node in ast.walk(ast.parse(path.read_text())):
      if isinstance(node, ast.Constant) and isinstance(node.value, str):
        found.append(node.value)
  return '\n'.join(found)


def test_messages_that_are_explained_are_those_of_the_program():
  text, known = DOCS['troubleshooting.md'], pieces_of_messages()
  rows = re.findall(r'^\| (`.*?) \| ', text.partition('## Flags')[2], re.MULTILINE)
  quoted = [message for row in rows for message in re.findall(r'`([^`]+)`', row)]
  pieces = {piece.strip(' :;') for message in quoted for piece in message.split('...')}
  ours = pieces - {'RESOURCE_EXHAUSTED', ''}
  assert len(ours) > 50
  missing = sorted(piece for piece in ours if piece not in known)
  assert not missing


@pytest.fixture
def runs(finished, tmp_path, monkeypatch):
  """A directory with a finished run in runs/digits."""
  (tmp_path / 'runs').mkdir()
  (tmp_path / 'runs' / 'digits').symlink_to(finished)
  monkeypatch.chdir(tmp_path)
  return tmp_path


@pytest.mark.parametrize('name', ['README.md', 'sample.md'])
def test_python_blocks_run(runs, name):
  found, namespace = blocks(PAGES[name], 'python'), {}
  assert found
  for block in found:
    exec(compile(block, name, 'exec'), namespace)
  assert namespace['images'].shape == (16, 8, 8, 1) and namespace['images'].dtype == np.uint8


@pytest.fixture
def examples():
  """The names that the examples of extend.md define, as long as they are in the tables."""
  tables, namespace = (METHODS, NETWORKS, METRICS, datasets.SOURCES, importing.READERS), {}
  with contextlib.ExitStack() as stack:
    for table in tables:
      stack.enter_context(mock.patch.dict(table))
    for block in blocks(DOCS['extend.md'], 'python'):
      exec(compile(block, 'extend.md', 'exec'), namespace)
    yield namespace


def test_the_examples_of_a_method_a_network_and_a_dataset_make_stages_that_can_be_trained(examples):
  own = {'model__name': 'conv', 'model__conditional': True, 'student__width': 8}
  stages, images = tiny.plan(**own, dataset__name='stripes', methods=('imitation',))
  assert [(stage.name, stage.num_steps) for stage in stages] == [('base', 4), ('imitation', 16)]
  assert images.images.classes == ('horizontal', 'vertical')
  assert images.images.read(0)[0][0].std() == 0.0 and images.images.read(1)[0][:, 0].std() == 0.0
  for stage in stages:
    assert preflight.memory(stage, None).activations > 0  # from tracing the loss and its gradient


def test_the_example_of_a_metric_is_the_largest_difference(examples):
  samples, reference = (types.SimpleNamespace(some=np.array(a)) for a in ([[1.0, 2.0]], [[1.5, 0.0]]))
  assert METRICS['mean_gap'](samples, reference).value == 2.0


def test_the_example_of_a_reader_averages(examples, tmp_path):
  models = [stored(examples['Conv'](1, width=4), seed=seed) for seed in (0, 1)]
  for k, written in enumerate(models):
    model.write(tmp_path / 'models' / str(k), written)
  importing.READERS['average'](tiny.config(), None, tmp_path / 'models', tmp_path / 'run')
  found = model.read(tmp_path / 'run' / 'base' / 'model')
  kernels = [m.params['Conv_0']['kernel'] for m in (found, *models)]
  np.testing.assert_allclose(kernels[0], (kernels[1] + kernels[2]) / 2, rtol=1e-6)
