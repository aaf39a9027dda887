"""What a run is told, and refused, before anything is compiled. (Against the compiler's own figures: scaling_test.py.)"""

import collections
import functools
import shutil

import jax
import pytest

from diffusion_distillation.errors import UserError
from diffusion_distillation.run import preflight
from diffusion_distillation.stages import workdir
from diffusion_distillation.system import sharding
from tests import tiny

STAGES, _ = tiny.plan(
  methods=('progressive', 'dmd'),
  dmd__batch_size=16,
  dmd__num_updates=10,
  dmd__fake_updates=5,
  pairs__num_pairs=1000,
  distill__start_steps=2,
)
NAMES = [stage.name for stage in STAGES]
Usage = collections.namedtuple('Usage', 'total used free')


def size(tree):
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


MEMORY = preflight.memory  # a second of tracing for every stage


@functools.cache
def memory_of(name):
  return MEMORY(STAGES[NAMES.index(name)])


@pytest.fixture
def once(monkeypatch):
  """What the stages need of each of eight devices is found out once for all tests that ask for it."""
  monkeypatch.setattr(preflight, 'memory', lambda stage, *_: memory_of(stage.name))


def needs(tmp_path, finished=()):
  return list(preflight.needs(STAGES, set(finished), tmp_path / 'not' / 'there', {}))


@pytest.mark.parametrize(('name', 'networks'), [('base', 1), ('progressive_0001', 1), ('dmd', 2)])
def test_memory_is_counted_by_networks(name, networks):
  stage = STAGES[NAMES.index(name)]
  found, network = memory_of(name), size(stage.abstract_params())
  assert found.params == networks * network and found.averages == network
  assert found.gradients == 2 * networks * network and found.gathered == 0
  assert 2 * networks * network <= found.optimizer <= 2 * networks * network + 64  # and a count each
  assert found.frozen == (0 if name == 'base' else network)
  assert found.arguments == found.params + found.averages + found.optimizer + found.frozen
  assert found.snapshot == found.params + found.averages + found.optimizer + 12  # and three counters
  assert found.total == found.arguments + found.gradients + found.activations + found.snapshot


def test_activations_go_with_the_images_of_a_micro_batch():
  def activations(**changes):
    return preflight.memory(tiny.plan(**changes)[0][0]).activations

  one = activations()
  assert one > 0
  assert activations(train__batch_size=32) == 2 * one
  assert activations(train__batch_size=32, train__micro_batches=2) == one
  assert activations(compute__remat=True) < 0.6 * one


def test_split_networks_are_held_in_parts_and_gathered_whole(monkeypatch):
  stage = STAGES[1]
  whole = preflight.memory(stage)
  monkeypatch.setattr(sharding, '_in_use', [sharding._make(jax.devices(), 8)])
  found = preflight.memory(stage)
  assert found.params < 0.25 * whole.params and found.frozen < 0.25 * whole.frozen
  assert found.params + found.frozen + found.gathered == whole.params + whole.frozen
  assert found.activations == whole.activations


def test_a_teacher_in_bfloat16_is_half():
  stage = tiny.plan(compute__teacher_dtype='bfloat16')[0][1]
  assert 2 * preflight.memory(stage).frozen == preflight.memory(tiny.plan()[0][1]).frozen


def test_the_disk_holds_two_checkpoints_a_stage_one_more_and_the_pairs():
  states = {stage.name: size(stage.abstract_state()) for stage in STAGES}
  pairs = 1000 * (2 * 4 * 8 * 8 + 4)
  assert preflight.disk(STAGES, set()) == 2 * sum(states.values()) + max(states.values()) + pairs
  assert preflight.disk(STAGES, {'base'}) == (
    2 * (states['progressive_0001'] + states['dmd']) + states['dmd'] + pairs
  )
  assert preflight.disk(STAGES, {'dmd'}) == 2 * (states['base'] + states['progressive_0001']) + max(
    states['base'], states['progressive_0001']
  )
  assert preflight.disk(STAGES, set(NAMES)) == 0


def test_a_line_a_stage_and_one_of_the_disk(once, tmp_path):
  lines = needs(tmp_path)
  assert [line.split()[0] for line in lines[1:-2]] == NAMES
  assert all('(2 images)' in line for line in lines[1:-2])  # of 16, on 8 devices
  assert lines[-2].startswith('memory of the host, GB: 0.00')
  assert lines[-1].startswith('disk, GB: 0.00')
  assert not (tmp_path / 'not').exists()
  left = needs(tmp_path, finished=['base', 'dmd'])
  assert [line.split()[0] for line in left[1:-2]] == ['progressive_0001']


def test_what_does_not_fit_a_device_is_refused(once, tmp_path, monkeypatch):
  monkeypatch.setattr(sharding, 'memory_per_device', lambda: 100_000)
  with pytest.raises(
    UserError, match=r'stage base: .* GB of a device; raise mesh\.fsdp, or set compute'
  ):
    needs(tmp_path)


def test_what_may_not_fit_a_device_is_a_warning(once, tmp_path, monkeypatch):
  figures = [preflight.memory(stage) for stage in STAGES]
  limit = max(of.arguments for of in figures) + 1
  assert all(of.total > limit for of in figures)
  monkeypatch.setattr(sharding, 'memory_per_device', lambda: limit)
  warnings = [line for line in needs(tmp_path) if 'warning' in line]
  assert len(warnings) == len(STAGES) and 'compute.remat=True' in warnings[0]


def test_the_host_holds_what_later_stages_come_from_and_a_state_that_is_being_written():
  base = STAGES[0]
  network, states = size(base.abstract_params()), [size(stage.abstract_state()) for stage in STAGES]
  assert all({stage.parent, stage.start} <= {'base', None} for stage in STAGES[1:])
  during = [states[0], states[1] + network, states[2] + network]
  assert preflight.host(STAGES, set()) == max(during)
  assert preflight.host(STAGES, {'dmd'}) == max(during[:2])
  assert preflight.host(STAGES, set(NAMES)) == 0


def test_a_host_that_is_too_small_is_refused(once, tmp_path, monkeypatch):
  monkeypatch.setattr(sharding, 'memory_per_device', lambda: 10**12)
  needed = preflight.host(STAGES, set())
  monkeypatch.setattr(preflight, '_memory_of_the_host', lambda: needed)
  needs(tmp_path)
  monkeypatch.setattr(preflight, '_memory_of_the_host', lambda: needed - 1)
  with pytest.raises(UserError, match=r"weights that later stages need .* of this host's memory"):
    needs(tmp_path)


def test_a_disk_that_is_too_small_is_refused(once, tmp_path, monkeypatch):
  needed = preflight.disk(STAGES, set())
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: Usage(0, 0, needed))
  needs(tmp_path)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: Usage(0, 0, needed - 1))
  with pytest.raises(
    UserError, match=r'checkpoints and pairs will take .* free up space, or choose another disk'
  ):
    needs(tmp_path)
  needs(tmp_path, finished=['base'])


def test_layout_and_precision_may_change_in_a_workdir(tmp_path):
  workdir.claim(tmp_path, tiny.config())
  other = {'mesh__fsdp': 4, 'compute__dtype': 'bfloat16', 'compute__remat': True}
  workdir.claim(tmp_path, tiny.config(**other))
  with pytest.raises(UserError, match='another config: seed was 0, is 1'):
    workdir.claim(tmp_path, tiny.config(seed=1, **other))


@pytest.mark.parametrize(
  ('groups', 'files', 'expected'),
  [
    ('0::/\n', {'memory.max': '5000\n'}, [5000]),  # version 2, in a container
    (
      '0::/a/b\n',
      {'a/b/memory.max': 'max\n', 'a/memory.max': '700\n'},
      [700],
    ),  # a limit of the group above
    ('5:cpu:/x\n4:memory:/x/y\n0::/\n', {'memory/x/memory.limit_in_bytes': '900\n'}, [900]),  # version 1
    ('4:memory:/gone\n', {}, []),
    (None, {'memory.max': '5000\n'}, []),  # no control groups: not Linux
  ],
)
def test_a_container_has_what_its_control_groups_allow(tmp_path, groups, files, expected):
  if groups is not None:
    (tmp_path / 'proc/self').mkdir(parents=True)
    (tmp_path / 'proc/self/cgroup').write_text(groups)
  for name, text in files.items():
    path = tmp_path / 'sys/fs/cgroup' / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
  assert preflight._container_limits(tmp_path) == expected


def test_the_memory_of_the_host_ends_at_the_limit_of_the_container(monkeypatch):
  monkeypatch.setattr(preflight, '_container_limits', lambda: [10**18, 8 * 10**6])
  assert preflight._memory_of_the_host() == 8 * 10**6
  monkeypatch.setattr(preflight, '_container_limits', list)
  assert preflight._memory_of_the_host() > 10**7
