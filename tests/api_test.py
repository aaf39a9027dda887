"""From Python: configs by name with overrides, and a run that returns its results."""

import json
import os
import signal
import time

import pytest

import diffusion_distillation
from diffusion_distillation import api
from diffusion_distillation.errors import Preempted, UserError
from diffusion_distillation.system import interrupts
from tests import tiny


def test_overrides_replace_what_the_named_config_says():
  plain = diffusion_distillation.get_config('digits')
  config = diffusion_distillation.get_config(
    'digits', {'train.num_updates': 7, 'train.ema_decay': [0.5], 'methods': ()}
  )
  assert (plain.train.num_updates, config.train.num_updates) == (2600, 7)
  assert config.train.ema_decay == (0.5,) and config.methods == ()
  assert config.train.batch_size == plain.train.batch_size == 64


def test_a_config_file_is_read_by_its_path_and_its_variant(tmp_path):
  text = (
    'from configs import default\n\n'
    'def get_config(seed="0"):\n  c = default.get_config()\n  c.seed = int(seed)\n  return c\n'
  )
  (tmp_path / 'own.py').write_text(text)
  assert diffusion_distillation.get_config(f'{tmp_path}/own.py').seed == 0
  assert diffusion_distillation.get_config(f'{tmp_path}/own.py:3').seed == 3


@pytest.mark.parametrize(
  ('name', 'overrides', 'message'),
  [
    ('digit', {}, "no config with this name.*did you mean 'digits'"),
    ('digits:small', {}, 'digits:small: the config has no variants'),
    ('tests/tiny.py', {}, 'tests/tiny.py has no function get_config'),
    ('digits', {'train.num_update': 3}, "no key 'train.num_update'; did you mean 'train.num_updates'"),
    ('digits', {'train.num_updates': 'many'}, "train.num_updates='many' has the wrong type: "),
  ],
)
def test_what_is_not_known_or_does_not_fit_is_refused(name, overrides, message):
  with pytest.raises(UserError, match=message) as found:
    diffusion_distillation.get_config(name, overrides)
  assert '\n' not in str(found.value)


@pytest.mark.slow
def test_a_run_returns_its_results_and_leaves_config_and_signals_as_they_were(finished, monkeypatch):
  monkeypatch.chdir(finished.parent)
  config, handler = tiny.config(), signal.getsignal(signal.SIGINT)
  config.compute.cache = '~/compiled'
  monkeypatch.setattr('diffusion_distillation.system.compilation.use', lambda *args: used.append(args))
  used = []
  results = diffusion_distillation.train(config, finished.name)
  assert results == json.loads((finished / 'results.json').read_text())
  assert {row['stage'] for row in results['rows']} >= {'base', 'progressive_0001'}
  assert config.compute.cache == '~/compiled' and not used[0][0].startswith('~')
  assert signal.getsignal(signal.SIGINT) is handler


def test_a_workdir_that_does_not_fit_is_refused(finished):
  with pytest.raises(UserError, match='seed'):
    diffusion_distillation.train(tiny.config(seed=5), finished)
  with pytest.raises(UserError, match='is a URL'):
    diffusion_distillation.train(tiny.config(), 'gs://bucket/run')


def test_an_interrupt_while_something_compiles_raises_instead_of_ending_the_process(
  monkeypatch, tmp_path
):
  """A notebook's kernel holds what only it has."""
  ended = []
  monkeypatch.setattr('diffusion_distillation.system.interrupts.os._exit', ended.append)

  def compiling(config, directory):
    with interrupts.at_once('compiling'):
      os.kill(os.getpid(), signal.SIGINT)
      time.sleep(0.2)
    interrupts.check()

  monkeypatch.setattr(api, 'run', compiling)
  config, handler = tiny.config(), signal.getsignal(signal.SIGINT)
  with pytest.raises(Preempted, match='SIGINT'):
    diffusion_distillation.train(config, tmp_path / 'run')
  assert not ended and signal.getsignal(signal.SIGINT) is handler
