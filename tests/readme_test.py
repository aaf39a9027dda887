"""What the README points to is there."""

import re

import pytest

from configs import default
from diffusion_distillation import cli, config
from tests import tiny

TEXT = (tiny.ROOT / 'README.md').read_text()
PAGES = [tiny.ROOT / 'README.md', *sorted((tiny.ROOT / 'docs').glob('*.md'))]


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.name)
def test_links_lead_to_files(path):
  links = re.findall(r'\]\(([^)#]+)\)', path.read_text())
  links = [link for link in links if not link.startswith('http')]
  assert links and all((path.parent / link).exists() for link in links), links


@pytest.mark.parametrize('path', PAGES, ids=lambda path: path.name)
def test_nothing_is_left_to_be_filled_in(path):
  assert not re.findall(r'@\w+@|TODO|XXX', path.read_text())


def test_its_make_targets_and_modes_exist():
  makefile = (tiny.ROOT / 'Makefile').read_text()
  for target in re.findall(r'^make (\w+)', TEXT, re.MULTILINE):
    assert re.search(rf'^{target}:', makefile, re.MULTILINE), target
  assert set(re.findall(r'--mode=(\w+)', TEXT)) <= set(cli.MODES)


def test_every_key_it_overrides_exists():
  known = dict(config.flatten(default.get_config()))
  keys = re.findall(r'--config\.([\w.]+)=', ''.join(path.read_text() for path in PAGES))
  assert keys and all(key in known for key in keys)


def test_every_folder_and_file_at_the_top_of_the_package_is_in_the_layout():
  text = (tiny.ROOT / 'docs' / 'extend.md').read_text()
  layout = text[text.index('## Layout') :]
  for path in (tiny.ROOT / 'diffusion_distillation').iterdir():
    name = f'{path.name}/' if path.is_dir() else path.name
    assert name in (*('__init__.py', '__pycache__/'), *layout.split()), name
