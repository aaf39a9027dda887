"""How programs are compiled."""

import jax
import pytest

from diffusion_distillation.system import compilation

KERNELS = 'xla_cpu_experimental_ynn_fusion_type'


@pytest.fixture(autouse=True)
def restored(monkeypatch):
  monkeypatch.setattr(compilation, '_fast_cpu', True)
  monkeypatch.delenv('XLA_FLAGS')  # read by us alone: jax has started
  compilation._is_free.cache_clear()
  yield
  compilation._is_free.cache_clear()


def devices(monkeypatch, count):
  monkeypatch.setattr(jax, 'local_device_count', lambda: count)


def test_one_device_has_the_kernels_and_several_have_not(monkeypatch):
  devices(monkeypatch, 1)
  assert compilation.options() == compilation._KERNELS | compilation._QUICK
  devices(monkeypatch, 2)
  assert compilation.options() == compilation._QUICK


@pytest.mark.parametrize('function', [lambda x: x @ x.T, lambda x: x.sum((0, 1))])
def test_products_and_sums_are_computed_by_the_kernels(monkeypatch, function):
  devices(monkeypatch, 1)
  program = jax.jit(function, compiler_options=compilation.options())
  assert 'ynn_fusion' in program.lower(jax.numpy.ones((64, 64))).compile().as_text()


def test_choices_of_the_user_take_precedence(monkeypatch):
  devices(monkeypatch, 1)
  monkeypatch.setenv('XLA_FLAGS', f'--{KERNELS}= --xla_something=1')
  assert compilation.options() == compilation._QUICK


def test_what_this_jaxlib_does_not_know_is_left_out(monkeypatch):
  devices(monkeypatch, 1)
  monkeypatch.setattr(compilation, '_KERNELS', {'xla_cpu_no_such_option': '1', KERNELS: 'NO_SUCH_VALUE'})
  assert compilation.options() == compilation._QUICK


def test_it_can_be_switched_off_and_is_for_cpus(monkeypatch):
  monkeypatch.setattr(compilation, '_fast_cpu', False)
  assert compilation.options() == {}
  monkeypatch.setattr(compilation, '_fast_cpu', True)
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  assert compilation.options() == {}


def test_functions_are_compiled_with_the_options_of_their_first_call(monkeypatch):
  asked = []
  monkeypatch.setattr(compilation, 'options', lambda: asked.append(1) or {})
  double = compilation.jit(lambda x: 2 * x)
  assert not asked
  assert (double(2.0), double(3.0)) == (4.0, 6.0)
  assert len(asked) == 1


def test_what_runs_once_uses_the_options_that_are_free(monkeypatch):
  seen, jit = [], jax.jit
  monkeypatch.setattr(jax, 'jit', lambda f, **given: seen.append(given) or jit(f, **given))
  monkeypatch.setenv('XLA_FLAGS', '--xla_cpu_use_fusion_emitters=true')
  compilation.run_once(lambda: 1.0)
  wanted = {k: v for k, v in compilation._ONCE.items() if k != 'xla_cpu_use_fusion_emitters'}
  assert seen[-1] == {'compiler_options': wanted}
  monkeypatch.delenv('XLA_FLAGS')
  compilation._is_free.cache_clear()
  compilation.run_once(lambda: 1.0)
  assert seen[-1] == {'compiler_options': compilation._ONCE}


def test_what_runs_once_is_what_it_would_be():
  assert float(compilation.run_once(lambda x, y: x - y, 5.0, 2.0)) == 3.0
