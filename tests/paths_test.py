"""Paths that users give: `~` is expanded wherever they may stand, and URLs are refused where a disk is needed."""

import os
import pathlib
import pwd

import pytest

import diffusion_distillation
from configs import default
from diffusion_distillation import config, paths
from diffusion_distillation.errors import UserError
from tests import tiny


@pytest.fixture
def home(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path / 'home'))
  (tmp_path / 'home').mkdir()
  return tmp_path / 'home'


def test_the_home_directory_of_oneself_and_of_others_is_known(home):
  me = pwd.getpwuid(os.getuid())
  assert paths.expand('--x', '~/runs') == f'{home}/runs'
  assert paths.expand('--x', f'~{me.pw_name}/runs') == f'{me.pw_dir}/runs'
  assert paths.expand('--x', 'a~b/~') == 'a~b/~'
  with pytest.raises(UserError, match=r'--x=~nobody-there/x: the home directory ~nobody-there'):
    paths.expand('--x', '~nobody-there/x')


def test_without_a_home_and_a_user_of_this_number_the_whole_path_is_asked_for(monkeypatch):
  def unknown(number):
    raise KeyError(number)

  monkeypatch.delenv('HOME')
  monkeypatch.setattr(pwd, 'getpwuid', unknown)
  with pytest.raises(UserError, match=r'--workdir=~/x: .*set \$HOME'):
    paths.on_disk('--workdir', '~/x')


@pytest.mark.parametrize('url', ['gs://b/x', 's3://b/x', 'gs:/b/x', 'file:///x', 'HDFS://h/x'])
def test_urls_are_refused_with_what_to_do(url):
  with pytest.raises(UserError, match=rf'^--workdir={url} is a URL, .* give a path on a disk'):
    paths.on_disk('--workdir', url)
  assert paths.on_disk('--workdir', './gs:/b') == pathlib.Path.cwd() / 'gs:' / 'b'


def test_of_what_is_only_read_a_url_is_to_be_copied():
  with pytest.raises(
    UserError, match=r'^--checkpoint=gs://b/x is a URL, but must be a path: .*copy it to a disk'
  ):
    paths.on_disk('--checkpoint', 'gs://b/x')


FLAGS = {
  '--workdir': ['--mode=sample', '--workdir={}/run', '--out=x.png'],
  '--out': ['--mode=sample', '--workdir=x', '--out={}/none/x.png'],
  '--checkpoint': [
    *('--mode=import', '--config=digits', '--workdir=x', '--source=workdir'),
    '--checkpoint={}/base',
  ],
  '--config': ['--mode=plan', '--workdir=x', '--config={}/mine.py'],
  'dmd.distance_weights': [
    *('--mode=plan', '--config=digits', '--workdir=x', '--config.methods=("dmd",)'),
    *('--config.dmd.distance=lpips', '--config.dmd.distance_weights={}/lpips.safetensors'),
  ],
  'dataset.path': [
    *('--mode=plan', '--config=images', '--workdir=x', '--config.dataset.name=folder'),
    '--config.dataset.path={}/none',
  ],
}


@pytest.mark.parametrize('name', FLAGS)
def test_every_flag_and_key_that_is_a_path_is_expanded(home, name):
  code, _, err = tiny.run_cli(*(argument.format('~') for argument in FLAGS[name]))
  assert code == 2 and err.startswith('error: ') and err.count('\n') == 1
  assert name == '--config' or str(home) in err, err
  assert not (tiny.ROOT / '~').exists()


@pytest.mark.parametrize('name', ['--workdir', '--out', '--checkpoint', 'dmd.distance_weights'])
def test_every_flag_and_key_that_must_be_on_a_disk_refuses_urls(name):
  code, _, err = tiny.run_cli(*(argument.format('gs://bucket') for argument in FLAGS[name]))
  assert code == 2 and f'{name}=gs://bucket' in err and 'is a URL' in err and err.count('\n') == 1
  assert not (tiny.ROOT / 'gs:').exists()


def test_every_key_that_is_a_path_is_expanded_and_no_other(home):
  c = default.get_config().unlock()
  declared = config.all_keys()
  strings = [name for name, value in config.flatten(c) if isinstance(value, str)]
  c.update_from_flattened_dict(dict.fromkeys(strings, '~/x'))
  config.expand_paths(c)
  found = {name for name, value in config.flatten(c) if value == f'{home}/x'}
  assert found == {name for name in strings if declared[name].path}
  assert {'dataset.path', 'dataset.prepared', 'compute.cache', 'dmd.distance_weights'} <= found
  c.dataset.path = 's3://bucket/images'  # which fsspec reads
  config.expand_paths(c)
  assert c.dataset.path == 's3://bucket/images'
  c.compute.cache = 'gs://bucket/cache'
  with pytest.raises(UserError, match=r'compute\.cache=gs://bucket/cache is a URL'):
    config.expand_paths(c)


def test_load_expands_and_refuses_too(home):
  with pytest.raises(UserError, match=f'{home}/run holds no model'):
    diffusion_distillation.load('~/run')
  with pytest.raises(UserError, match='gs://bucket/run is a URL'):
    diffusion_distillation.load('gs://bucket/run')
