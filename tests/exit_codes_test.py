"""Errors of each kind have an exit code of their own, and one line on stderr."""

import errno

import pytest

from configs import default
from diffusion_distillation import cli
from diffusion_distillation.errors import (
  DamagedError,
  NumericalError,
  Preempted,
  StorageError,
  UserError,
)
from diffusion_distillation.evaluation import sample_flags
from diffusion_distillation.stages import workdir as workdirs


def options(workdir, **changes):
  fields = {'mode': 'sample', 'config': None, 'default': default.get_config(), 'workdir': workdir}
  return cli.Options(**fields | {'num_samples': 12} | changes)


def test_every_kind_of_error_has_its_exit_code(tmp_path, monkeypatch, capsys):
  kinds = {UserError: 2, DamagedError: 3, NumericalError: 4, StorageError: 5, Preempted: 75, OSError: 2}
  for kind, code in kinds.items():

    def fail(_, kind=kind):
      raise kind('what is wrong')

    monkeypatch.setitem(cli.MODES, 'sample', fail)
    monkeypatch.setattr('diffusion_distillation.system.interrupts.install', lambda: None)
    assert cli.run(options(tmp_path)) == code
    assert capsys.readouterr().err == 'error: what is wrong\n'


def test_what_a_disk_says_has_the_exit_code_of_the_disk(tmp_path, monkeypatch, capsys):
  numbers = (errno.ENOSPC, errno.EROFS, errno.EIO, errno.ESTALE, errno.EDQUOT)
  for number, code in (*((number, 5) for number in numbers), (errno.EACCES, 2)):

    def fail(_, number=number):
      raise OSError(number, 'what is wrong', 'some/file')

    monkeypatch.setitem(cli.MODES, 'sample', fail)
    monkeypatch.setattr('diffusion_distillation.system.interrupts.install', lambda: None)
    assert cli.run(options(tmp_path)) == code
    assert 'some/file' in capsys.readouterr().err


def test_a_directory_of_the_workdir_that_vanishes_is_the_disks_fault(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr('diffusion_distillation.system.interrupts.install', lambda: None)
  (tmp_path / 'there').mkdir()
  outside = tmp_path.parent / 'nowhere' / 'file'
  for path, code in ((tmp_path / 'gone' / 'file', 5), (tmp_path / 'there' / 'file', 2), (outside, 2)):

    def fail(_, path=path):
      path.open()

    monkeypatch.setitem(cli.MODES, 'sample', fail)
    assert cli.run(options(tmp_path)) == code
    err = capsys.readouterr().err
    assert str(path) in err if code == 2 else f'{path.parent} has vanished; restore it' in err


def test_gamma_is_for_ancestral_sampling_alone(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr('diffusion_distillation.system.interrupts.install', lambda: None)
  for sampler, word in (('ancestral', 'no model'), ('ddim', '--gamma only'), (None, '--gamma only')):
    given = options(tmp_path, out=tmp_path / 'x.png', gamma=0.5, sampler=sampler)
    assert cli.run(given) == 2 and word in capsys.readouterr().err


def test_steps_and_times_exclude_each_other():
  with pytest.raises(UserError, match='not both'):
    sample_flags.grid(None, ['0', '1'], 2, None)


def test_times_that_are_no_numbers_are_one_line():
  with pytest.raises(UserError, match=r'^--times=0,a,1: must be numbers, such as 0,0\.25,1$'):
    sample_flags.grid(None, ['0', 'a', '1'], None, None)


def test_a_second_run_in_one_workdir_is_refused(tmp_path):
  with workdirs.lock_workdir(tmp_path), pytest.raises(UserError, match='another run is using'):
    workdirs.lock_workdir(tmp_path)
  workdirs.lock_workdir(tmp_path).close()
