"""The notebooks: they need what the library needs, their stored outputs are those of their cells, and they can be executed."""

import ast
import importlib.metadata
import json
import pathlib
import re
import shutil
import sys
import tempfile

import pytest

import diffusion_distillation
from diffusion_distillation.errors import UserError
from tests import notebooks, tiny
from tests.readme_test import anchors

TUTORIAL = tiny.ROOT / 'notebooks' / 'tutorial.ipynb'
KNOWN = {path.name: json.loads(path.read_text()) for path in notebooks.NOTEBOOKS}
each = pytest.mark.parametrize('name', KNOWN)
FEWER = {
  "'train.num_updates': 1000": "'train.num_updates': 400",
  "'distill.num_updates': (150, 150, 250)": "'distill.num_updates': (60, 60, 100)",
  "'evaluation.num_samples': 2000": "'evaluation.num_samples': 500",
}


def cells(notebook, kind):
  return [cell for cell in notebook['cells'] if cell['cell_type'] == kind]


def source(cell):
  return ''.join(cell['source'])


def texts(output):
  """What an output shows as text."""
  shown = {kind: text for kind, text in output.get('data', {}).items() if kind.startswith('text/')}
  return [''.join(text) for text in (output.get('text', ''), *shown.values())]


def absolute_paths(text):
  """Paths such as /home/me/x; not what follows a name, a dot or the :// of a URL."""
  return re.findall(r'(?<![\w.:/)*~-])(?:/[\w.-]+){2,}', text)


def check_outputs(notebook):
  """All cells were executed, one after the other, and show neither a failure nor the machine."""
  code = cells(notebook, 'code')
  assert [cell['execution_count'] for cell in code] == list(range(1, len(code) + 1))
  outputs = [output for cell in code for output in cell['outputs']]
  assert {output['output_type'] for output in outputs} <= {'stream', 'display_data', 'execute_result'}
  assert 'stderr' not in {output.get('name') for output in outputs}
  assert sum('image/png' in output.get('data', {}) for output in outputs) >= 5
  assert not [path for output in outputs for text in texts(output) for path in absolute_paths(text)]


def check_tutorial(notebook):
  """Its table of distances: each student is better than the base model in as many steps, and much better in one."""
  shown = '\n'.join(
    text for cell in cells(notebook, 'code') for output in cell['outputs'] for text in texts(output)
  )
  rows = re.findall(r'^ +([421]) +([\d.]+) +([\d.]+)$', shown, re.MULTILINE)
  table = {int(steps): (float(base), float(student)) for steps, base, student in rows}
  assert list(table) == [4, 2, 1]
  assert all(student < base for base, student in table.values())
  assert table[1][1] < 0.1 * table[1][0]
  differences = re.findall(r'student and teacher differ by (\S+)', shown)
  assert len(differences) == 4 and max(map(float, differences)) < 1e-5


@each
def test_code_parses_and_imports_what_the_library_needs(name):
  needed = {
    re.split(r'[<>=\[]', requirement)[0].lower().replace('_', '-')
    for requirement in importlib.metadata.requires('diffusion_distillation')
    if 'extra ==' not in requirement
  }
  owners = importlib.metadata.packages_distributions()
  for cell in cells(KNOWN[name], 'code'):
    for node in ast.walk(ast.parse(source(cell))):
      if isinstance(node, ast.Import | ast.ImportFrom):
        modules = (
          [node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
        )
        for module in {module.partition('.')[0] for module in modules}:
          if module != 'diffusion_distillation' and module not in sys.stdlib_module_names:
            assert {owner.lower().replace('_', '-') for owner in owners.get(module, ())} & needed, module


@each
def test_neither_code_nor_text_names_a_place_on_a_disk(name):
  assert not [path for cell in KNOWN[name]['cells'] for path in absolute_paths(source(cell))]


def test_paths_are_told_from_links_and_fractions():
  assert absolute_paths('in /home/me/run, "/tmp/x"') == ['/home/me/run', '/tmp/x']
  assert not absolute_paths('https://a.org/abs/2 ../docs/x.md configs/digits.py 1/2/3 $a / b / c$')


@each
def test_links_lead_to_files_and_headings(name):
  text = '\n'.join(source(cell) for cell in cells(KNOWN[name], 'markdown'))
  headings = {title.replace(' ', '-') for title in re.findall(r'^#+ (.*)$', text, re.MULTILINE)}
  for link in re.findall(r'\]\(([^)]+)\)', text):
    target, _, anchor = link.partition('#')
    if not target:
      assert anchor in headings, link
    elif not target.startswith('https://'):
      page = (TUTORIAL.parent / target).resolve()
      assert page.is_file(), link
      assert not anchor or anchor in anchors(page.read_text()), link


@each
def test_stored_outputs_are_those_of_the_cells(name):
  """`python -m tests.notebooks --write` makes them."""
  assert KNOWN[name]['metadata']['executed'] == notebooks.digest(KNOWN[name])
  assert (TUTORIAL.parent / name).stat().st_size < 600_000
  check_outputs(KNOWN[name])


def test_the_tutorial_shows_what_it_says():
  check_tutorial(KNOWN['tutorial.ipynb'])


@pytest.mark.parametrize(
  ('pattern', 'other'),
  [
    (r'^( +4 +)([\d.]+)( +)[\d.]+$', r'\1\2\3\2'),  # a student as good as the base model
    (r'^( +1 +)([\d.]+)( +)[\d.]+$', r'\1\2\g<3>200'),
    (r'differ by \S+', 'differ by 2e-4'),
  ],
)
def test_a_tutorial_that_shows_something_else_is_noticed(pattern, other):
  changed = json.loads(TUTORIAL.read_text())
  for cell in cells(changed, 'code'):
    for output in cell['outputs']:
      if 'text' in output:
        output['text'] = re.sub(pattern, other, ''.join(output['text']), flags=re.MULTILINE)
  with pytest.raises(AssertionError):
    check_tutorial(changed)


@pytest.mark.parametrize(
  'output',
  [
    {'output_type': 'stream', 'name': 'stderr', 'text': ['a warning\n']},
    {'output_type': 'stream', 'name': 'stdout', 'text': ['saved in /home/me/runs\n']},
    {'output_type': 'execute_result', 'data': {'text/plain': ["PosixPath('/home/me/runs')"]}},
    {'output_type': 'error', 'ename': 'KeyError', 'evalue': 'x', 'traceback': []},
  ],
)
def test_outputs_of_a_failure_or_a_machine_are_noticed(output):
  changed = json.loads(TUTORIAL.read_text())
  cells(changed, 'code')[3]['outputs'].append(output)
  with pytest.raises(AssertionError):
    check_outputs(changed)


def test_the_settings_of_the_tutorial_are_keys_of_the_config():
  code = '\n'.join(source(cell) for cell in cells(KNOWN['tutorial.ipynb'], 'code'))
  (found,) = re.findall(r'^SETTINGS = (\{.*?^\})', code, re.MULTILINE | re.DOTALL)
  settings = ast.literal_eval(found)
  config = diffusion_distillation.get_config('digits', settings)
  assert config.distill.num_updates == settings['distill.num_updates']
  with pytest.raises(UserError, match='no key'):
    diffusion_distillation.get_config('digits', settings | {'train.no_such_key': 1})


def test_a_cell_that_changes_makes_the_outputs_stale():
  notebook = json.loads(TUTORIAL.read_text())
  before = notebooks.digest(notebook)
  cells(notebook, 'markdown')[0]['source'] = ['# Another title']
  assert notebooks.digest(notebook) == before
  cells(notebook, 'code')[0]['source'].append('\n')
  assert notebooks.digest(notebook) != before


@pytest.mark.slow
@pytest.mark.timeout(2400)
@each
def test_a_notebook_is_executed_without_failures_and_warnings(name, tmp_path):
  """With fewer updates and samples than those of the stored outputs."""
  copy = pathlib.Path(shutil.copy(TUTORIAL.parent / name, tmp_path))
  text = copy.read_text()
  for setting, fewer in FEWER.items():
    assert text.count(setting) == 1
    text = text.replace(setting, fewer)
  copy.write_text(text)
  with tempfile.TemporaryDirectory() as folder:  # a short path, for its sockets
    executed = notebooks.execute(copy, pathlib.Path(folder))
    assert not (pathlib.Path(folder) / 'runs').exists()
  assert not notebooks.warnings(executed)
  notebooks.store(executed, copy)
  stored = json.loads(copy.read_text())
  assert stored['metadata']['executed'] == notebooks.digest(json.loads(text))
  check_outputs(stored)
  if name == TUTORIAL.name:
    check_tutorial(stored)
    assert '400 updates of 64 images' in notebooks.stderr(executed)  # the plan, which is not stored
