"""The benchmarks of speed: their arithmetic, their flags, and each of them at the smallest size."""

import dataclasses
import json
import os
import subprocess
import time

import pytest

from benchmarks import cases, growth, measuring, rival, step, workloads
from benchmarks.cases import Case
from benchmarks.workloads import Row
from configs import digits
from tests import sides, tiny


def smallest():
  config = digits.get_config()
  config.update_from_flattened_dict(tiny.OVERRIDES)
  return config


@pytest.fixture(autouse=True)
def smallest_network(monkeypatch):
  """A network of few layers, by the name `smallest`."""
  networks = cases.NETWORKS | {'smallest': cases.Network(smallest, (8, 8, 1), 10, 8)}
  monkeypatch.setattr(cases, 'NETWORKS', networks)


def a_row(**changes):
  row = Row(
    case=Case('smallest', 'base'),
    backend='cpu',
    devices=2,
    parameters=1000,
    batch=8,
    seconds=measuring.Spread(0.1, 0.2, 0.4),
    repeats=3,
    flops=1e9,
    peak=2e10,
    memory=3 * 10**8,
    planned=10**6,
    compile_seconds=1.5,
  )
  return dataclasses.replace(row, **changes)


def test_quartiles_of_known_numbers():
  assert measuring.spread([5.0]) == (5.0, 5.0, 5.0)
  assert measuring.spread([4.0, 1.0, 3.0, 2.0, 5.0]) == (2.0, 3.0, 4.0)
  assert measuring.spread([1.0, 2.0]) == pytest.approx((1.25, 1.5, 1.75))
  assert f'{measuring.Spread(0.001, 0.002, 0.0035).scaled(1e3):.1f}' == '2.0 (1.0-3.5)'


def test_exponents_of_known_powers():
  xs = [1, 2, 4, 8]
  assert measuring.exponent(xs, [3.0 * x**1.5 for x in xs]) == pytest.approx(1.5)
  assert measuring.exponent(xs, [7.0] * 4) == pytest.approx(0.0)
  # Least squares in logarithms: the ends of 4 equally spaced points weigh 3, those between them 1; over 10.
  assert measuring.exponent(xs, [1.0, 1.0, 1.0, 2.0]) == pytest.approx(0.3)


def test_quick_calls_are_timed_together_and_slow_ones_one_by_one():
  calls, waits = [], []
  quick = measuring.repeat(lambda: calls.append(0), lambda: waits.append(0), 0.2)
  assert len(calls) > 10 * len(waits)  # 10 ms a measurement
  assert len(quick) >= 2 and max(quick) < 0.01
  slow = measuring.repeat(lambda: time.sleep(0.03), lambda: None, 0.1)
  assert 2 <= len(slow) <= 4 and min(slow) >= 0.03
  assert len(measuring.repeat(lambda: time.sleep(0.01), lambda: None, 0.0, least=5)) == 5


@pytest.mark.skipif(not os.path.exists('/proc/self/clear_refs'), reason='of Linux alone')
def test_peak_memory_can_be_forgotten():
  size = 200_000_000
  measuring.forget_peak_memory()
  before = measuring.peak_memory()
  held = b'1' * size
  peak = measuring.peak_memory()
  assert peak > before + 0.9 * size
  del held
  assert measuring.peak_memory() == pytest.approx(peak, rel=0.01)
  measuring.forget_peak_memory()
  assert measuring.peak_memory() == pytest.approx(before, abs=0.1 * size)


def test_share_of_the_peak_and_cells_of_a_row():
  row = a_row()
  assert row.share == pytest.approx(1e9 / 0.2 / 2e10)
  expected = 'smallest base 8 40 200.0 (100.0-400.0) 1 25.0 0.300 0.001 1.5'
  assert ' '.join(step.cells(row)) == expected
  sampled = a_row(case=Case('smallest', 'sampling', calls=2), planned=None)
  assert step.cells(sampled)[1] == 'sampling, NFE 2'
  assert step.cells(sampled)[-2] == '-'
  assert Row.from_dict(json.loads(json.dumps(row.to_dict()))) == row


def test_a_case_says_batch_type_width_and_resolution():
  case = Case('tiny', 'round', batch=24, dtype='bfloat16', wider=2, larger=4)
  stage = case.stage()
  assert stage.name == 'progressive_0016'
  assert stage.recipe.shape == (24, 32, 32, 1)
  assert stage.teacher_dtype == 'bfloat16'
  network = stage.denoise.network
  assert (network.ch, network.emb_ch, network.dtype) == (16, 32, 'bfloat16')
  assert network.attn_resolutions == (16,)
  assert Case.from_json(case.to_json()) == case
  assert Case('tiny', 'base', batch=9).batch_size == 16  # there are 8 devices


@pytest.mark.parametrize('name', cases.NETWORKS)
def test_every_network_has_every_work(name):
  for work, stage in cases.WORKS.items():
    found = Case(name, work).stage()
    assert found.name.startswith(stage)
    assert found.batch_size == cases.NETWORKS[name].batch_size
  if name == 'cifar10-small':
    assert 3.7e6 < workloads.num_parameters(found) < 3.9e6


def test_flops_of_sampling_grow_with_its_calls():
  one, three = (workloads.count_flops(Case('smallest', 'sampling', calls=n)) for n in (1, 3))
  assert three == 3 * one > 0
  base = workloads.count_flops(Case('smallest', 'base'))
  assert 2.5 < base / one < 4.0  # forwards, and backwards twice as much, and the optimizer


@pytest.mark.slow
@pytest.mark.parametrize('work', ['round', 'dmd', 'sampling'])
def test_measures_every_kind_of_work(work):
  row = workloads.measure(Case('smallest', work, calls=2), seconds=0.0)
  assert row.seconds.low > 0.0
  assert row.repeats >= 2
  assert 0.0 < row.share < 1.0
  assert row.devices == 8
  assert (row.planned is None) == (work == 'sampling')
  assert row.memory > 10**8
  assert Row.from_dict(json.loads(json.dumps(row.to_dict()))) == row


def test_prints_a_table_and_says_what_failed(monkeypatch, capsys, tmp_path):
  def measured(case, seconds):
    return 'failed (signal 9): no message' if case.work == 'dmd' else a_row(case=case)

  monkeypatch.setattr(step, 'measure_apart', measured)
  path = tmp_path / 'rows.json'
  code = step.main(['--network=tiny,digits', '--work=base,dmd', f'--json={path}'])
  out, err = capsys.readouterr()
  assert code == 1
  assert err.splitlines() == [
    f'{name}, dmd: failed (signal 9): no message' for name in ('tiny', 'digits')
  ]
  assert '2 cpu device(s), float32; measured matrix peak 20 GFLOP/s' in out
  assert [line.split(' | ')[0] for line in out.splitlines() if ' base ' in line] == [
    '| tiny',
    '| digits',
  ]
  assert [row['case']['network'] for row in json.loads(path.read_text())] == ['tiny', 'digits']


@pytest.mark.slow
def test_a_row_is_measured_in_a_process_of_its_own(capsys):
  assert step.main(['--network=tiny', '--work=sampling', '--calls=1', '--seconds=0']) == 0
  out = capsys.readouterr().out
  assert 'tiny: 47,961 parameters; 8 cpu device(s)' in out
  assert out.splitlines()[-1].startswith('| tiny | sampling, NFE 1 | 16 | ')


@pytest.mark.parametrize(
  'code, err, expected',
  [
    (-9, '', 'failed (signal 9): no message'),
    (1, 'Traceback\n  line\nMemoryError: full\n\n', 'failed (exit code 1): MemoryError: full'),
  ],
)
def test_a_process_that_fails_says_why(code, err, expected, monkeypatch):
  done = subprocess.CompletedProcess([], code, '', err)
  monkeypatch.setattr(step.subprocess, 'run', lambda command, **options: done)
  assert step.measure_apart(Case('tiny', 'base'), 0.0) == expected


def test_growth_fits_what_it_has_measured(capsys):
  def measured(case):
    k = case.batch // 16 if case.work == 'base' else case.calls
    seconds = measuring.Spread(0.1, 0.2 * k**0.5, 1.0)
    planned = 10 * k**2 if case.work == 'base' else None
    return a_row(case=case, batch=16 * k, seconds=seconds, flops=1e9 * k, memory=100, planned=planned)

  found = growth.show('batch', Case('tiny', 'base'), 3, measured)
  assert [row['batch'] for row in found['rows']] == [16, 32, 64]
  assert found['exponents'] == pytest.approx(
    {'seconds': 0.5, 'flops': 1.0, 'memory': 0.0, 'planned': 2.0}
  )
  out = capsys.readouterr().out
  assert [line[-15:] for line in out.splitlines() if line.startswith(('| 16', '| 32', '| 64'))] == [
    '.0000 | - | - |',
    '| 0.50 | 1.00 |',
    '| 0.50 | 1.00 |',
  ]
  assert 'time 0.50, expected from FLOPs 1.00; peak memory 0.00, planned memory 2.00' in out
  of_steps = growth.show('steps', Case('tiny', 'base'), 2, measured)
  assert [row['steps'] for row in of_steps['rows']] == [1, 2]
  assert of_steps['exponents']['planned'] is None


def test_growth_stops_where_a_point_fails(capsys):
  def measured(case):
    return 'failed (signal 9): no message' if case.larger > 1 else a_row(case=case)

  found = growth.show('resolution', Case('tiny', 'base'), 4, measured)
  assert [row['resolution'] for row in found['rows']] == [8]
  assert found['exponents'] is None
  assert found['failed'] == 'failed (signal 9): no message'
  assert capsys.readouterr().err == 'resolution: failed (signal 9): no message\n'


BAD = {
  (step, '--network=foo'): "unknown network 'foo'; choose from tiny, digits, ",
  (step, '--work=base,foo'): "unknown work 'foo'; choose from base, round, dmd, sampling",
  (step, '--dtype=int8'): "unknown type 'int8'; choose from float32, bfloat16",
  (step, '--batch=0'): "'0' is not an integer of at least 1",
  (step, '--seconds=-1'): "'-1' is not a duration",
  (step, '--quick'): 'unrecognized arguments: --quick',
  (growth, '--axes=depth'): "unknown axis 'depth'; choose from batch, resolution, channels, steps",
  (rival, '--work=dmd'): "unknown work 'dmd'; choose from base, round, sampling",
  (rival, '--network=foo'): "unknown network 'foo'",
}


@pytest.mark.parametrize('module, flag', BAD, ids=lambda value: getattr(value, '__name__', value))
def test_bad_flags_are_one_line_and_exit_code_2(module, flag, capsys):
  with pytest.raises(SystemExit) as end:
    module.main([flag])
  assert end.value.code == 2
  error = capsys.readouterr().err
  assert error.startswith('error: ')
  assert BAD[module, flag] in error
  assert error.count('\n') == 1


def test_without_pytorch_there_is_nothing_to_compare_with(monkeypatch, capsys):
  monkeypatch.setattr(rival.importlib.util, 'find_spec', lambda name: None)
  assert rival.main(['--network=tiny']) == 2
  assert capsys.readouterr().err.startswith('error: PyTorch is not installed')


def test_ratios_are_taken_pair_by_pair():
  # The machine becomes three times slower, and neither side better than the other.
  found = {
    'case': {'work': 'sampling', 'calls': 4},
    'batch': 8,
    'kind': 'eager',
    'pairs': [(0.1, 0.2), (0.3, 0.6), (0.1, 0.2)],
    'flops': 1e9,
    'peak': 1e11,
    'memory_ours': 2e9,
    'memory_torch': 1e9,
  }
  cells = rival.cells(found)
  assert cells[:3] == ('sampling, NFE 4', '8', 'eager')
  assert cells[3:6] == ('100.0 (100.0-200.0)', '200.0 (200.0-400.0)', '2.00 (2.00-2.00)')
  assert cells[6:] == ('10.0', '5.0', '2.000', '1.000')


def test_sides_do_what_they_are_asked_and_say_what_goes_wrong():
  side, late, failing = (
    rival.Side('a', sides.sleeper, 0.0),
    rival.Side('b', sides.sleeper, 60.0),
    rival.Side('c', sides.broken),
  )
  try:
    deadline = time.monotonic() + 60.0
    assert side.answer(deadline) == {'ready': True}
    assert min(side.ask(0.1, deadline)) >= 0.02
    assert side.ask('memory', deadline) == 7
    with pytest.raises(rival.Failed, match='c: ZeroDivisionError: division by zero'):
      failing.answer(deadline)
    with pytest.raises(rival.Failed, match='b was not ready in time'):
      late.answer(time.monotonic())
    side._process.kill()
    with pytest.raises(rival.Failed, match='a ended with exit code -9'):
      side.ask(0.1, deadline)
  finally:
    for one in (side, late, failing):
      one.end()


def test_turns_stop_at_the_deadline():
  class Taken:
    def ask(self, seconds, deadline):
      time.sleep(0.05)
      return [1.0, 2.0, 9.0]

  args = rival.parse(['--network=tiny', '--turns=1000'])
  pairs = rival.take_turns(Taken(), Taken(), args, time.monotonic() + 0.35)
  assert 2 <= len(pairs) <= 3
  assert pairs[0] == (2.0, 2.0)


@pytest.mark.slow
@pytest.mark.parametrize('network', ['tiny', 'conditional'])
def test_pytorch_computes_the_same(network, monkeypatch):
  pytest.importorskip('torch')
  from benchmarks import rival_check

  monkeypatch.setitem(cases.NETWORKS, 'conditional', cases.Network(conditional, (8, 8, 3), 10, 8))
  found = rival_check.errors(network, list(rival.WORKS))
  assert set(found) == {'output', *rival.WORKS}
  assert max(found.values()) < 1e-4


def conditional():
  """What the tiny network does not have: classes, heads, both x and eps."""
  config = cases.NETWORKS['tiny'].config()
  config.model.conditional, config.model.output, config.model.head_dim = True, 'both', 4
  config.model.num_res_blocks = 2
  return config
