"""What a run shows and refuses before it trains."""

import shutil

import pytest

from diffusion_distillation.errors import UserError
from diffusion_distillation.run import preflight
from diffusion_distillation.run import run as run_module
from tests import tiny


def test_a_plan_refuses_what_this_machine_cannot_hold_unless_it_is_for_others(
  tmp_path, monkeypatch, capsys
):
  monkeypatch.setattr(preflight, '_free', lambda path: 0)
  run_module.show_plan(tiny.config(methods=(), compute__device_gb=40.0), tmp_path)
  assert 'fits 1 device of 40 GB' in capsys.readouterr().err
  with pytest.raises(UserError, match='checkpoints and pairs will take'):
    run_module.show_plan(tiny.config(methods=(), log__measured_updates=0), tmp_path)
  assert 'disk, GB: 0.00' in capsys.readouterr().err


@pytest.mark.parametrize('is_new', [True, False])
def test_needs_are_shown_once_and_early_unless_the_first_program_is_compiled_first(
  is_new, finished, tmp_path, monkeypatch, capsys
):
  workdir, told = tmp_path / 'new' if is_new else shutil.copytree(finished, tmp_path / 'old'), []

  def train(*args):
    for _ in range(3):
      told.append(capsys.readouterr().err.count('memory of each device'))
      args[-1]()
    return []

  monkeypatch.setattr(run_module, '_train', train)
  monkeypatch.setattr('diffusion_distillation.evaluation.measure.evaluate', lambda *_, **__: None)
  run_module.run(tiny.config(), workdir)
  assert told == ([0, 1, 0] if is_new else [1, 0, 0])
