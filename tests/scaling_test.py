"""The benchmark of scaling: how it reads programs, its arithmetic, and what the step really moves."""

import jax
import pytest

from benchmarks import collectives, projection, scaling
from configs import digits
from tests import tiny

LOOP = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %sum = f32[] add(%a, %b)
}

%body (carry: (s32[], f32[8])) -> (s32[], f32[8]) {
  %carry = (s32[], f32[8]{0}) parameter(0)
  %part = f32[8]{0} get-tuple-element(%carry), index=1
  %all-reduce.1 = f32[8]{0} all-reduce(%part), channel_id=1, replica_groups=[4,2]<=[8], to_apply=%add
}

ENTRY %main (x: f32[8]) -> f32[8] {
  %x = f32[8]{0} parameter(0)
  %while.1 = (s32[], f32[8]{0}) while(%x), body=%body, backend_config={"known_trip_count":{"n":"5"}}
  %gather = bf16[8,4]{1,0} all-gather(%x), replica_groups={{0,1,2,3},{4,5,6,7}}, dimensions={0}
  %all-gather-start.2 = (f32[1]{0}, pred[8]{0}) all-gather-start(%x), replica_groups=[1,8]<=[8]
  %all-gather-done.2 = pred[8]{0} all-gather-done(%all-gather-start.2)
  ROOT %reduce-scatter.3 = f32[2]{0} reduce-scatter(%x), replica_groups={{0,1},{2,3}}, to_apply=%add
}
"""

LINES = {
  '%a.1 = f32[16,3]{1,0} all-reduce(%x), replica_groups={}, to_apply=%add': ('all-reduce', 192, 0),
  '%a.2 = (f32[8]{0}, f32[], /*index=2*/bf16[2,2]{1,0}) all-reduce(%x, /*index=2*/%z)': (
    *('all-reduce', 44, 0),
  ),
  'ROOT %p = u8[5]{0} collective-permute(%x), source_target_pairs={{0,1},{1,0}}': (
    *('collective-permute', 5, 0),
  ),
  '%t = (s32[4]{0}, s32[4]{0}) all-to-all(%x, %y), replica_groups={{0,1},{2,3}}': ('all-to-all', 32, 2),
  "%g = f32[4]{0} all-gather(%x), replica_groups=mesh['axis_0'=1,'axis_1'=2,'axis_2'=4], "
  "device_ids=([4,2]T(1,0)) {'axis_2'}, dimensions={0}": ('all-gather', 16, 4),
  "%h = f32[4]{0} all-gather(%x), replica_groups=mesh['a'=2,'b'=4] {'a','b':(1)2}, dimensions={0}": (
    *('all-gather', 16, 4),
  ),
}


@pytest.mark.parametrize('line', LINES, ids=lambda line: line.split()[-1])
def test_bytes_and_groups_of_a_line(line):
  found = collectives.read(f'ENTRY %main (x: f32[8]) -> f32[8] {{\n  {line}\n}}\n')
  assert [(one.kind, one.bytes, one.devices) for one in found] == [LINES[line]]


def test_loops_count_as_often_as_they_run_and_starts_not_at_all():
  found = collectives.read(LOOP)
  assert collectives.by_kind(found) == {
    'all-reduce': 5 * 32,
    'all-gather': 64 + 8,
    'reduce-scatter': 8,
  }
  assert [one.devices for one in found] == [2, 4, 8, 2]
  assert [one.calls for one in found] == [5, 1, 1, 1]


@pytest.mark.parametrize('shape, size', [('f32[]', 4), ('(s8[3], c64[2])', 19), ('s4[6]{0:E(4)}', 3)])
def test_bytes_of_shapes(shape, size):
  assert collectives.array_bytes(shape) == size


def test_a_ring_sends_all_but_one_part_twice():
  assert projection.ring_seconds(100.0, 1, 10.0) == 0
  assert projection.ring_seconds(100.0, 4, 10.0) == pytest.approx(15.0)
  assert projection.ring_seconds(100.0, 10**9, 10.0) == pytest.approx(20.0)


def test_time_of_an_update():
  chip = projection.Chip(flops=1e12, memory=100.0, bandwidth=1e3, ring=50.0, few=8, far=5.0)
  update = projection.Update(images=64, flops=1e9, gradients=200.0, kept=50.0, activations=10.0)
  # 8 images a chip; 40 bytes are left for them at 90 %, that is 4: two micro-batches.
  assert projection.micro_batches(update, chip, 8) == 2
  assert projection.micro_batches(update, chip, 64) == 1
  computing, adding = projection.seconds(update, chip, 8, mfu=0.5)
  assert computing == pytest.approx(64e9 / (8 * 0.5e12) + 9 * 200.0 / 1e3)
  assert adding == pytest.approx(2 * (2 * 7 / 8 * 200.0 / 50.0))
  _, far = projection.seconds(update, chip, 16, mfu=0.5)
  assert far == pytest.approx(2 * 15 / 16 * 200.0 / 5.0)
  assert projection.micro_batches(update, projection.Chip(1.0, 60.0, 1.0, 1.0), 8) == 0


@pytest.mark.slow
def test_flops_of_an_image_do_not_count_the_optimizer():
  stages, _ = tiny.plan(model__ch_mult=(1,))
  by_hand = projection.count_flops(stages[0])
  params = sum(leaf.size for leaf in jax.tree.leaves(stages[0].abstract_params))
  whole = projection.lowered_flops(stages[0], 4)
  assert 5 * params < whole - 4 * by_hand < 60 * params
  rounds = projection.count_flops(stages[1])
  assert 1.5 < rounds / by_hand < 1.8  # two calls of the teacher: 5/3


@pytest.fixture(scope='module')
def found():
  """What the compiled steps of a small network say, by layout and update."""
  scaling.NETWORKS['small'] = (small, (8, 8, 1), 10)
  cases = [('base', 8, 1), ('round', 4, 2)]
  yield {case: scaling.measure(scaling.Case('small', *case)) for case in cases}
  del scaling.NETWORKS['small']


def small():
  config = digits.get_config()
  config.update_from_flattened_dict(tiny.OVERRIDES | {'model.ch_mult': (1,)})
  return config


@pytest.mark.slow
def test_data_parallel_adds_the_gradients_up_once_and_moves_nothing_else(found):
  base = found['base', 8, 1]
  assert set(base.moved) == {'all-reduce'}
  assert 0 < base.moved['all-reduce'] - base.memory.params <= 16  # the loss, and such numbers


@pytest.mark.slow
def test_sharded_parameters_are_gathered_for_each_pass_and_gradients_reduced_once(found):
  of_round = found['round', 4, 2]
  assert set(of_round.moved) == {'all-gather', 'all-reduce'}
  first = of_round.expected['all-gather'] - of_round.moved['all-gather']
  assert (
    0 < first < 0.01 * of_round.expected['all-gather']
  )  # the way back does not need the first layer's
  scalars = of_round.moved['all-reduce'] - of_round.expected['all-reduce']
  assert 0 < scalars < 1000  # norms, array by array


@pytest.mark.slow
def test_preflight_knows_the_arguments_and_estimates_the_rest(found):
  for one in found.values():
    others = one.arguments - one.batch - one.memory.arguments
    assert 0 < others <= 64  # counters, and numbers of the recipe
    assert 0.5 < (one.memory.total - one.memory.arguments - one.memory.snapshot) / one.temporary < 2.0
