"""The command line before absl sees it: configs by name, numbers such as 1e3; and the installed command."""

import importlib.metadata
import pathlib
import subprocess
import sys

import pytest

from diffusion_distillation import arguments, config
from diffusion_distillation.errors import UserError
from tests import breaks, tiny

WHOLE = {
  '1e3': '1000',
  '1E+3': '1000',
  '2.5e1': '25',
  '1_0e2': '1000',
  '1000.0': '1000',
  '1_000': '1000',
  '-1e0': '-1',
  '(1e3, 2e4)': '(1000, 20000)',
  '(1e3,)': '(1000,)',
  '1.5': '1.5',
  '1e-3': '1e-3',
  '1e400': '1e400',
  'v1e3': 'v1e3',
  'many': 'many',
}


@pytest.mark.parametrize('text', WHOLE)
def test_whole_numbers_are_integers_however_they_are_written(text):
  assert arguments.rewrite_integers(text) == WHOLE[text]


def test_only_keys_that_are_integers_are_read_so():
  tiny.config()  # which says what keys there are
  given = ['--config=digits', '--config.train.num_updates', '1e3', '--config.distill.factor=(2e0,4)']
  given += ['--config.train.learning_rate=1e3', '--config.dataset.split=1e3', '--config.time.stratified']
  _, *found = arguments.prepare([*given, '--steps=1e1', '--', 'more'])
  assert found[:2] == ['--config.train.num_updates=1000', '--config.distill.factor=(2,4)']
  assert found[2:5] == given[4:] and found[5:] == ['--steps=1e1', '--', 'more']


def test_of_a_tuple_that_is_given_twice_the_last_counts_as_of_other_values():
  tiny.config()
  later = '--config.distill.num_updates=(2,)'
  given = ['--config.distill.num_updates', '(1,)', '--config.train.num_updates=1', later]
  _, *found = arguments.prepare(['--config=digits', *given, '--config.train.num_updates=2'])
  assert found == ['--config.train.num_updates=1', later, '--config.train.num_updates=2']
  same = ['--times=0,1', '--times=0,1', '--', later, later]
  assert arguments.prepare(same) == same


@pytest.mark.parametrize(
  ('given', 'words'),
  [
    ('--config.train.num_updates=1.5', 'train.num_updates=1.5 must be an integer'),
    ('--config.train.num_updates=1e-3', 'train.num_updates=1e-3 must be an integer'),
    ('--config.train.num_updates=2k', 'train.num_updates=2k must be an integer'),
    ('--config.train.num_updates=nan', 'train.num_updates=nan must be an integer'),
    ('--config.dataset.channels=2.5', 'dataset.channels=2.5 must be an integer'),
    ('--config.distill.num_updates=(1e1,1.5)', 'distill.num_updates=(10, 1.5) must hold integers'),
    ('--num_samples=1.5', '--num_samples=1.5'),
  ],
)
def test_other_numbers_are_refused_where_integers_are_asked_for(given, words):
  code, _, err = tiny.run_cli('--config=digits', '--workdir=nowhere', '--mode=plan', given)
  assert code == 2 and words in err and err.count('\n') == 1


def test_a_plan_takes_updates_as_people_write_them():
  given = tiny.flags(train__num_updates='1.2e1', distill__num_updates='(8.,)', log__measured_updates=0)
  code, _, err = tiny.run_cli(*given, '--workdir=nowhere', '--mode=plan')
  assert code == 0 and '12 updates of 16 images' in err and '8 updates of 16 images' in err


@pytest.mark.parametrize('given', ['digits', 'digits.py', 'configs/digits.py', 'configs/digits'])
def test_configs_of_the_program_are_found_from_anywhere(given, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert pathlib.Path(arguments.find_config(given)).samefile(tiny.ROOT / 'configs' / 'digits.py')
  assert arguments.find_config(f'{given}:fast').endswith('digits.py:fast')


def test_a_file_goes_before_a_config_of_its_name(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / 'digits.py').write_text('')
  assert arguments.find_config('digits.py') == 'digits.py'
  assert arguments.find_config('digits').endswith('configs/digits.py')


@pytest.mark.parametrize('given', ['digit', 'no/digits.py', 'configs/none.py', 'paper', 'digits.json'])
def test_an_unknown_config_is_answered_with_what_there_is(given, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(
    UserError, match=f'--config={given}: .*the configs are cifar10, ddpm_cifar10, default, digits, '
  ):
    arguments.find_config(given)


@pytest.mark.slow
def test_configs_of_ones_own_find_what_lies_beside_them(tmp_path, monkeypatch):
  import configs

  monkeypatch.setattr(configs, '__path__', list(configs.__path__))
  (tmp_path / 'configs').mkdir()
  (tmp_path / 'configs' / 'mine_base.py').write_text('NUMBER = 7\n')
  mine = tmp_path / 'configs' / 'mine.py'
  mine.write_text(
    'from configs import digits, mine_base\n\n\ndef get_config():\n'
    '  c = digits.get_config()\n  c.seed = mine_base.NUMBER\n  return c\n'
  )
  flags = [f'--config={mine}', '--mode=plan', '--workdir=nowhere', '--config.log.measured_updates=0']
  code, _, err = tiny.run_cli(*flags)
  assert code == 0, err
  sys.modules.pop('configs.mine_base')


def test_a_file_beside_a_config_of_ones_own_that_is_not_read_is_named(tmp_path, monkeypatch, caplog):
  import configs

  monkeypatch.setattr(configs, '__path__', list(configs.__path__))
  (tmp_path / 'configs').mkdir()
  copies = {'default.py': '# mine', 'digits.py': (tiny.ROOT / 'configs' / 'digits.py').read_text()}
  for name, text in (copies | {'mine.py': ''}).items():
    (tmp_path / 'configs' / name).write_text(text)
  arguments.find_config(str(tmp_path / 'configs' / 'mine.py'))
  (message,) = caplog.messages
  assert message.startswith(f'{tmp_path}/configs/default.py is ignored: configs.default is ')
  caplog.clear()
  arguments.find_config(str(tmp_path / 'configs' / 'default.py'))  # this one is
  assert not caplog.messages


@pytest.mark.parametrize('number', ['1e99999999999999999999', '-1e-99999999999999999999'])
def test_a_number_that_nothing_can_hold_is_named_by_its_key(number):
  assert arguments.rewrite_integers(number) == number
  code, _, err = tiny.run_cli(*tiny.flags(train__num_updates=number), '--mode=plan')
  assert code == 2 and f'train.num_updates={number} must be an integer' in err
  code, _, err = tiny.run_cli(*tiny.flags(), '--mode=plan', f'--steps={number}')
  assert code == 2 and '--steps' in err and len(err.splitlines()) == 1


def test_every_key_of_a_type_is_known_to_the_reader_of_arguments():
  tiny.config()
  assert set(config.types()) == set(config.all_keys())


@pytest.mark.slow
def test_what_is_installed_runs_from_an_empty_directory(tmp_path):
  """The configs and the command are part of it, and nothing of the clone is needed."""
  source, site, empty = tmp_path / 'source', tmp_path / 'site', tmp_path / 'empty'
  site.mkdir()
  empty.mkdir()
  breaks.copy(source)
  build = [
    'build',
    '--build-base',
    tmp_path / 'build',
    '--build-lib',
    site,
    'egg_info',
    '--egg-base',
    site,
  ]
  subprocess.run([sys.executable, 'setup.py', '-q', *build], cwd=source, check=True)
  assert (site / 'diffusion_distillation' / 'configs' / 'digits.py').is_file()
  assert {path.suffix or path.name for path in site.iterdir()} == {'diffusion_distillation', '.egg-info'}
  (distribution,) = importlib.metadata.distributions(path=[str(site)])
  (command,) = distribution.entry_points.select(group='console_scripts')
  assert command.name == 'diffusion-distillation'
  module, _, function = command.value.partition(':')
  program = f'import sys; sys.path.insert(0, sys.argv.pop(1)); import {module} as m; m.{function}()'
  flags = [*tiny.flags(log__measured_updates=0)[1:], '--mode=plan', '--workdir=run']
  run = [sys.executable, '-P', '-c', program, site, '--config=digits', *flags]
  done = subprocess.run(run, cwd=empty, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert '12 updates of 16 images' in done.stderr and not list(empty.iterdir())
