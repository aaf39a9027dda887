"""What a run is told, and refused, before anything is compiled. (Against the compiler's own figures: scaling_test.py.)"""

import collections
import dataclasses
import functools
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import sd15_dmd
from diffusion_distillation.errors import UserError
from diffusion_distillation.interop import stable_diffusion
from diffusion_distillation.networks.denoiser import Denoiser
from diffusion_distillation.networks.spaces import Latents
from diffusion_distillation.run import device_memory, preflight
from diffusion_distillation.stages import workdir
from diffusion_distillation.stages.plan import plan
from diffusion_distillation.system import sharding
from diffusion_distillation.training.state import TrainState
from tests import text_model, tiny
from tests.interop import stable_diffusion_test as full_size

BLOCKS = {
  'down_block_types': ['CrossAttnDownBlock2D'] * 3 + ['DownBlock2D'],
  'up_block_types': ['UpBlock2D'] + ['CrossAttnUpBlock2D'] * 3,
}

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


def check(tmp_path, finished=()):
  preflight.check(STAGES, set(finished), tmp_path / 'not' / 'there', {})


@pytest.mark.parametrize(('name', 'networks'), [('base', 1), ('progressive_0001', 1), ('dmd', 2)])
def test_memory_is_counted_by_networks(name, networks):
  stage = STAGES[NAMES.index(name)]
  found, network = memory_of(name), size(stage.abstract_params)
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


def test_sharded_networks_are_held_in_parts_and_gathered_by_layers(monkeypatch):
  stage = STAGES[1]
  whole = preflight.memory(stage)
  monkeypatch.setattr(sharding, '_in_use', [sharding._make(jax.devices(), 8)])
  found = preflight.memory(stage)
  assert found.params < 0.25 * whole.params and found.frozen < 0.25 * whole.frozen
  kernels = [leaf.size for leaf in jax.tree.leaves(stage.abstract_params) if leaf.ndim > 1]
  assert found.gathered == 2 * 4 * max(kernels) * 7 / 8  # the student's largest, and the teacher's
  assert found.activations == whole.activations


def test_a_teacher_in_bfloat16_is_half():
  stage = tiny.plan(compute__teacher_dtype='bfloat16')[0][1]
  assert 2 * preflight.memory(stage).frozen == preflight.memory(tiny.plan()[0][1]).frozen


def test_the_disk_holds_two_checkpoints_a_stage_one_more_and_the_pairs():
  states = {stage.name: size(stage.abstract_state) for stage in STAGES}
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


def test_what_does_not_fit_a_device_is_refused_and_nothing_is_traced_for_that(tmp_path, monkeypatch):
  monkeypatch.setattr(preflight, 'memory', None)
  largest = max(memory_of(name).arguments for name in NAMES)
  monkeypatch.setattr(sharding, 'memory_per_device', lambda: largest)
  check(tmp_path)
  monkeypatch.setattr(sharding, 'memory_per_device', lambda: largest - 1)
  with pytest.raises(UserError, match=r'stage dmd: '):
    check(tmp_path)
  check(tmp_path, finished=['dmd'])
  monkeypatch.setattr(sharding, 'memory_per_device', lambda: 100_000)
  with pytest.raises(
    UserError, match=r'stage base: .* GB of a device; raise mesh\.fsdp, or set compute'
  ):
    check(tmp_path)


def test_what_may_not_fit_a_device_is_a_warning(once, tmp_path, monkeypatch):
  figures = [preflight.memory(stage) for stage in STAGES]
  limit = max(of.arguments for of in figures) + 1
  assert all(of.total > limit for of in figures)
  monkeypatch.setattr(sharding, 'memory_per_device', lambda: limit)
  warnings = [line for line in needs(tmp_path) if 'warning' in line]
  assert len(warnings) == len(STAGES) and 'compute.remat=True' in warnings[0]


def test_the_host_holds_what_later_stages_come_from_and_a_state_that_is_being_written():
  base = STAGES[0]
  network, states = size(base.abstract_params), [size(stage.abstract_state) for stage in STAGES]
  assert all({stage.parent, stage.start} <= {'base', None} for stage in STAGES[1:])
  during = [states[0], states[1] + network, states[2] + network]
  assert preflight.host(STAGES, set()) == max(during)
  assert preflight.host(STAGES, {'dmd'}) == max(during[:2])
  assert preflight.host(STAGES, set(NAMES)) == 0


def test_a_host_that_is_too_small_is_refused(tmp_path, monkeypatch):
  monkeypatch.setattr(sharding, 'memory_per_device', lambda: 10**12)
  needed = preflight.host(STAGES, set())
  monkeypatch.setattr(preflight, '_memory_of_the_host', lambda: needed)
  check(tmp_path)
  monkeypatch.setattr(preflight, '_memory_of_the_host', lambda: needed - 1)
  with pytest.raises(UserError, match=r"weights that later stages need .* of this host's memory"):
    check(tmp_path)


def test_a_disk_that_is_too_small_is_refused(tmp_path, monkeypatch):
  needed = preflight.disk(STAGES, set())
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: Usage(0, 0, needed))
  check(tmp_path)
  monkeypatch.setattr(shutil, 'disk_usage', lambda path: Usage(0, 0, needed - 1))
  with pytest.raises(
    UserError, match=r'checkpoints and pairs will take .* free up space, or choose another disk'
  ):
    check(tmp_path)
  check(tmp_path, finished=['base'])


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


def shapes(activations=10, batch_size=8, params=1000):
  """A network of one matrix with two moments; its teacher is another one."""
  one = jax.ShapeDtypeStruct((params // 8, 8), np.float32)
  counters = np.zeros((3, 0))
  state = TrainState(counters[0], {'student': one}, (one,), {'student': (one, one)}, *counters[1:])
  return device_memory.Shapes(state, {'student': one}, {'teacher': one}, activations, batch_size)


def test_the_smallest_layout_has_few_devices_then_little_sharding_then_few_micro_batches():
  """On one device: networks of 4000 bytes in 4 + 1 + 2 + 4 (snapshot) places, and 8 examples of 10 bytes."""
  fixed = 11 * 4000
  whole = shapes().on(1, 1, 1)
  assert whole.total == fixed + 80 and shapes().on(2, 2, 2).activations == 20

  def layout(limit, **changes):
    found = device_memory.smallest_layout(shapes(**changes), limit)
    return found and (found[:3], found.memory.total <= limit)

  assert layout(fixed + 80) == ((1, 1, 1), True)
  assert layout(fixed + 79) == ((1, 1, 2), True)
  assert layout(fixed + 10) == ((1, 1, 8), True)
  assert layout(fixed + 9) == ((2, 2, 1), True)  # as each device then holds half
  of_four = fixed / 4 + 2 * 3000 + 20  # two layers, of which each device fetches three quarters
  assert layout(of_four) == ((4, 4, 1), True) and layout(of_four - 1) == ((4, 4, 2), True)
  assert layout(of_four, batch_size=6) is None  # which four devices cannot share
  assert layout(100) is None


def test_a_plan_for_other_devices_names_their_layout_and_refuses_nothing(tmp_path, monkeypatch):
  monkeypatch.setattr(preflight, '_free', lambda path: 0)
  monkeypatch.setattr(preflight, '_memory_of_the_host', lambda: 0)
  lines = list(preflight.needs(STAGES[:2], {'base'}, tmp_path, {}, device_gb=40.0))
  assert any('fits 1 device of 40 GB: 0.0 GB on each' in line for line in lines)
  lines = list(preflight.needs(STAGES[:2], {'base'}, tmp_path, {}, device_gb=1e-6))
  said = 'fits no layout of devices of 1e-06 GB; set compute.remat=True and compute.dtype=bfloat16'
  assert any(line.endswith(f'{said}, and compute.teacher_dtype=bfloat16') for line in lines)
  adapted = tiny.plan(lora__rank=2, lora__modules='.*')[0][1]
  assert any(
    line.endswith(said) for line in preflight.needs([adapted], set(), tmp_path, {}, device_gb=1e-6)
  )
  beside = tiny.plan(  # whose student adapts other weights than its teacher's
    methods=('progressive', 'dmd'), dmd__start='progressive_0001', lora__rank=2, lora__modules='.*'
  )
  needs = preflight.needs([beside[0][-1]], set(), tmp_path, {}, device_gb=1e-6)
  assert any(line.endswith(f'{said}, and compute.teacher_dtype=bfloat16') for line in needs)


@pytest.mark.slow
def test_stable_diffusion_at_full_size_is_counted_from_shapes(tmp_path):
  """Four networks' parameters in float32 are 16 bytes of 859,520,964; nothing of that size is allocated."""
  unet = stable_diffusion.unet_of(tmp_path, full_size.UNETS['1.5'][1] | BLOCKS, text_model.SCHEDULE)
  vae = stable_diffusion.vae_of(tmp_path, full_size.VAE)
  stored = dataclasses.replace(
    text_model.stored(),
    denoise=Denoiser(unet, 'eps'),
    space=Latents(vae, 'digest', None),
    image_shape=(512, 512, 3),
  )
  c = sd15_dmd.get_config()
  c.update_from_flattened_dict({'dmd.batch_size': 64, 'dmd.micro_batches': 1})
  (stage,) = plan(c, (512, 512, 3), 0, workdir.origin_of(stored))[1:]
  found = device_memory.count(stage)
  one = 4 * 859_520_964
  memory = found.on(1, 1, 1)
  assert (memory.params, memory.averages, memory.frozen) == (2 * one, one, one // 2)
  assert 4 * one <= memory.optimizer < 4 * one + 100
  assert (
    1.0e9 < found.activations < 1.5e9
  )  # in bfloat16; of them, 0.3e9 are kept and the others are of one block
  layout = device_memory.smallest_layout(found, 80e9)
  assert layout[:2] == (1, 1) and layout.micro_batches > 1
  assert device_memory.smallest_layout(found, 40e9)[:2] == (2, 2)
  (stage,) = plan(sd15_dmd.get_config('lora'), (512, 512, 3), 0, workdir.origin_of(stored))[1:]
  state = stage.abstract_state
  # A block of width d has 14 d + 1536 rows and columns of kernels: of pixels 8 d, of the text 6 d + 2 x 768. (797,184 at rank 4.)
  blocks = {320: 5, 640: 5, 1280: 6}
  of_adapters = 64 * sum(count * (14 * width + 2 * 768) for width, count in blocks.items())
  assert of_adapters == 64 * 797_184 // 4
  for name in ('student', 'fake_score'):
    assert size(state.params[name]) == 4 * of_adapters
  assert size(state) < 0.03 * size(found.state)


def test_the_largest_recomputed_block_is_counted_by_what_its_gradient_needs():
  """Of sin(sin(x w)): x, and the cosines of both sines' arguments; another block is smaller."""
  x, w = (jax.ShapeDtypeStruct(shape, np.float32) for shape in ((device_memory._PRIME, 4), (4, 5)))
  large = jax.checkpoint(lambda x, w: jnp.sin(jnp.sin(x @ w)))
  small = jax.checkpoint(lambda h: jnp.sin(h))
  jaxpr = jax.make_jaxpr(jax.jit(lambda x, w: small(large(x, w)).sum()))(x, w).jaxpr
  sizes = [
    device_memory._growing(device_memory._residuals_of(block))
    for block in device_memory._recomputed(jaxpr)
  ]
  assert sizes == [4 * (4 + 5 + 5), 4 * 5]
