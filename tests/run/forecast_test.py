"""The plan of a run, and the time it will take, before it runs."""

import contextlib
import dataclasses

import jax
import pytest

from configs import default
from diffusion_distillation import cli
from diffusion_distillation.run import forecast
from diffusion_distillation.run import run as run_module
from diffusion_distillation.system import sharding
from tests import tiny

OVERRIDES = {
  'distill__start_steps': 8,
  'distill__factor': (4, 2),
  'distill__num_updates': (20, 30),
  'evaluation__samplers': ('ddim', 'heun', 'rk4'),
  'log__measured_updates': 3,
}
STAGES = tiny.plan(**OVERRIDES)[0]
NAMES = ['base', 'progressive_0002', 'progressive_0001']

# Network calls of one image: a student's own, and one for each of its teacher's steps.
TRAINING = {
  'base': 12 * 16,
  'progressive_0002': 20 * 16 * (1 + 4),
  'progressive_0001': 30 * 16 * (1 + 2),
}
# The base in 8, 2 and 1 steps under each sampler, and each student in its own; 48 images a row.
EVALUATION = 48 * ((8 + 2 + 1) * (1 + 2 + 4) + 2 + 1)


def parse(lines):
  """The first word of each line that tells network calls, its calls, and whether it is finished."""
  told = {}
  for line in lines:
    words = line.split()
    if 'network' in words:
      told[words[0]] = float(words[words.index('network') - 1]), words[-1] == 'finished'
  return told


def seconds_of(text):
  """'2.5 min' and the like, in seconds."""
  words = text.split()
  units = {'s': 1, 'min': 60, 'h': 3600}
  return sum(float(n) * units[unit] for n, unit in zip(words[::2], words[1::2], strict=True))


@pytest.fixture
def measured(monkeypatch):
  """Replaces measuring: 2 s an update of the base, 4 s of a round, 1/16 s a call; returns what was measured."""
  names = []

  def seconds_per_update(stage, step, repeats, distance):
    assert (step, repeats, distance) == ('the step', 3, None)
    names.append(stage.name)
    return 4.0 if stage.parent else 2.0

  monkeypatch.setattr(forecast, 'seconds_per_update', seconds_per_update)
  monkeypatch.setattr(forecast, 'seconds_per_call', lambda stage, config: 1 / 16)
  return names


def show(capsys, finished=(), stages=STAGES, **overrides):
  """Lines that are shown: those of the plan, and those of the estimate."""
  config = tiny.config(**OVERRIDES | overrides)
  forecast.show(stages, set(finished), config, tiny.ROOT / 'nowhere')
  told = capsys.readouterr()
  forecast.show_times(stages, set(finished), 'the step', config)
  timed = capsys.readouterr()
  assert told.out == timed.out == ''
  plan, _, _ = told.err.partition('images of ')
  _, _, estimate = timed.err.partition('measuring')
  return plan.splitlines(), estimate.splitlines()


def test_the_table_has_updates_and_network_calls_of_every_stage(capsys, measured):
  plan, _ = show(capsys)
  parameters = sum(leaf.size for leaf in jax.tree.leaves(STAGES[0].abstract_params))
  assert plan[0] == f'{parameters:,} parameters; 8 cpu device(s)'
  lines = {line.split()[0]: ' '.join(line.split()[1:]) for line in plan[1:]}
  assert list(lines) == [*NAMES, 'evaluation']
  assert lines['base'].startswith('8 steps 12 updates of 16 images ')
  assert lines['progressive_0002'].startswith('2 steps 20 updates of 16 images ')
  assert lines['progressive_0001'].startswith('1 steps 30 updates of 16 images ')
  expected = {**TRAINING, 'evaluation': EVALUATION}
  told = parse(plan)
  assert {name: calls for name, (calls, _) in told.items()} == pytest.approx(expected, rel=5e-3)
  assert not any(done for _, done in told.values())


def test_a_run_without_images_forecasts_no_evaluation(capsys, measured, monkeypatch):
  monkeypatch.setattr(forecast, 'seconds_per_call', None)  # nor is an image drawn: it may need a text
  assert forecast.evaluation_calls(STAGES, tiny.config(**OVERRIDES, dataset__name='none')) == 0
  plan, estimate = show(capsys, dataset__name='none')
  assert [line.split()[0] for line in plan[1:]] == NAMES
  assert not any('evaluation' in line for line in estimate)


def test_network_calls_are_counted_without_rounding():
  assert {stage.name: forecast.network_calls(stage) for stage in STAGES} == TRAINING
  assert forecast.evaluation_calls(STAGES, tiny.config(**OVERRIDES)) == EVALUATION


def test_the_estimate_is_updates_times_the_measured_time(capsys, measured):
  _, estimate = show(capsys)
  took = {line.split()[0]: line for line in estimate[1:]}
  assert list(took) == [*NAMES, 'evaluation', 'together']
  seconds = {name: seconds_of(line[20:].partition('(')[0]) for name, line in took.items()}
  training = {'base': 12 * 2.0, 'progressive_0002': 20 * 4.0, 'progressive_0001': 30 * 4.0}
  evaluation = EVALUATION / 16
  expected = {**training, 'evaluation': evaluation, 'together': sum(training.values()) + evaluation}
  assert seconds == pytest.approx(expected, rel=0.03)
  assert '(2e+03 ms an update)' in took['base'] and '(62.5 ms an image' in took['evaluation']


def test_stages_of_one_kind_are_measured_once(capsys, measured):
  """Rounds by one factor share a program; those by another do not."""
  show(capsys)
  assert measured == NAMES
  measured.clear()
  show(capsys, stages=tiny.plan(**OVERRIDES | {'distill__factor': (2,)})[0])
  assert measured == ['base', 'progressive_0004']


def test_finished_stages_are_marked_and_not_measured(capsys, measured):
  plan, estimate = show(capsys, finished=['base', 'progressive_0002'])
  marked = {name: done for name, (_, done) in parse(plan).items()}
  assert marked == {name: name in NAMES[:2] for name in (*NAMES, 'evaluation')}
  assert measured == ['progressive_0001']
  took = {line.split()[0]: line for line in estimate[1:]}
  assert list(took) == ['progressive_0001', 'evaluation', 'together']
  assert seconds_of(took['together'][20:]) == pytest.approx(120 + EVALUATION / 16, rel=0.03)


def test_without_updates_to_measure_there_is_no_estimate(capsys, measured):
  plan, estimate = show(capsys, log__measured_updates=0)
  assert len(plan) == 5 and not estimate and not measured


@pytest.mark.parametrize(
  ('seconds', 'text'),
  [(0.4, '0 s'), (59, '59 s'), (90, '1.5 min'), (3599, '1 h 00 min'), (9000, '2 h 30 min')],
)
def test_times_are_told_in_units_that_fit(capsys, monkeypatch, seconds, text):
  monkeypatch.setattr(forecast, 'seconds_per_update', lambda *_: seconds / 12)
  monkeypatch.setattr(forecast, 'seconds_per_call', lambda *_: 0.0)
  _, estimate = show(capsys, stages=STAGES[:1])
  assert estimate[1].split('(')[0].split(maxsplit=1)[1].strip() == text


def test_an_update_is_timed_without_its_compilation(monkeypatch):
  """A clock that only the step moves: 100 s the first time, 2 s an update after that."""
  now, seen = [0.0], []
  monkeypatch.setattr('time.monotonic', lambda: now[0])

  def step(recipe, state, frozen, batch):
    now[0] += 2.0 if seen else 100.0
    cond = batch['cond']
    seen.append((list(frozen), batch['image'].shape, None if cond is None else cond['label'].shape))
    return state, {}

  told = tiny.plan(model__conditional=True, model__ch_mult=(1,))[0]
  for stage, shape in ((STAGES[0], None), (STAGES[1], None), (told[0], (24,))):
    recipe = stage.recipe.replace(shape=(24, *stage.image_shape))
    stage = dataclasses.replace(stage, recipe=recipe)
    seen.clear()
    assert forecast.seconds_per_update(stage, step, 4) == 2.0
    assert seen == [(['teacher'] if stage.parent else [], (24, 8, 8, 1), shape)] * 5


def test_a_plan_announces_what_it_compiles_where_a_signal_ends_it_at_once(monkeypatch):
  inside, seen = [], []

  @contextlib.contextmanager
  def compiling(what):
    inside.append(what)
    yield
    inside.clear()

  def step(recipe, state, frozen, batch):
    seen.append(list(inside))
    return state, {}

  monkeypatch.setattr(forecast.announcing, 'compiling', compiling)
  forecast.seconds_per_update(STAGES[0], step, 2)
  assert seen == [['stage base'], [], []]


PAIRED = OVERRIDES | {
  'methods': ('knowledge', 'dmd', 'dmd2'),
  **{
    f'{name}__{key}': 16
    for name in ('knowledge', 'dmd', 'dmd2')
    for key in ('num_updates', 'batch_size')
  },
  'dmd2__num_updates': 15,
  'pairs__num_pairs': 160,
  'pairs__sampler': 'heun',
  'pairs__num_steps': 6,
}


def test_pairs_are_drawn_once_for_all_that_learn_from_them(capsys, measured):
  """160 pairs by 6 steps of Heun; no more once all that need them are finished."""
  stages = tiny.plan(**PAIRED)[0]
  plan, estimate = show(capsys, stages=stages, **PAIRED)
  assert list(parse(plan)) == ['base', 'pairs', 'knowledge', 'dmd', 'dmd2', 'evaluation']
  assert parse(plan)['pairs'] == (pytest.approx(160 * 6 * 2, rel=5e-3), False)
  took = {line.split()[0]: line for line in estimate[1:]}
  assert seconds_of(took['pairs'][20:]) == pytest.approx(160 * 6 * 2 / 16, rel=0.03)
  whole = (
    12 * 2.0
    + (16 + 16 + 15) * 4.0
    + (1920 + forecast.evaluation_calls(stages, tiny.config(**PAIRED))) / 16
  )
  assert seconds_of(took['together'][20:]) == pytest.approx(whole, rel=0.03)
  plan, estimate = show(capsys, finished=['base', 'knowledge'], stages=stages, **PAIRED)
  assert list(parse(plan)) == ['base', 'knowledge', 'pairs', 'dmd', 'dmd2', 'evaluation']
  plan, estimate = show(capsys, finished=['base', 'knowledge', 'dmd'], stages=stages, **PAIRED)
  assert 'pairs' not in parse(plan) and not [line for line in estimate if 'pairs' in line]


def test_networks_that_take_turns_are_timed_in_whole_periods(monkeypatch):
  """DMD2: the generator's update, every fifth, takes 11 s, the others 1 s; 4 are asked for, 5 are timed."""
  now, turns = [0.0], []
  monkeypatch.setattr('time.monotonic', lambda: now[0])

  def step(recipe, state, frozen, batch):
    turns.append(recipe.method.generator_turn)
    now[0] += 11.0 if turns[-1] else 1.0
    return state, {}

  stage = tiny.plan(**PAIRED)[0][-1]
  assert stage.name == 'dmd2'
  assert forecast.seconds_per_update(stage, step, 4) == (11 + 4) / 5
  assert turns == [False, False, False, False, True] * 2


@pytest.mark.slow
@pytest.mark.parametrize('conditional', [False, True])
def test_a_run_has_one_program_for_its_base_and_one_for_all_rounds(tmp_path, monkeypatch, conditional):
  traced, done = [], []

  def train_step(recipe, state, frozen, batch):
    traced.append((list(frozen), jax.tree.map(jax.typeof, batch)))
    counts = {'skipped': state.skipped, 'skipped_in_a_row': state.skipped_in_a_row}
    return state.replace(step=state.step + 1), counts | {'loss': 0.0 * state.step}

  def compile_step(step):
    compiled = compile_really(step)

    def counting(*arguments):
      done.append(int(arguments[1].step))
      return compiled(*arguments)

    return counting

  compile_really = sharding.compile_step
  monkeypatch.setattr(sharding, 'compile_step', compile_step)
  monkeypatch.setattr(run_module, 'train_steps', train_step)
  monkeypatch.setattr('diffusion_distillation.evaluation.measure.evaluate', lambda *_, **__: None)
  run_module.run(tiny.config(model__conditional=conditional, model__ch_mult=(1,)), tmp_path / 'run')
  assert done == [*range(12), *range(8), *range(8)]
  assert len(traced) == 2, traced


def test_the_work_after_a_stage_counts_differentiated_calls_as_three():
  """By stage, in network calls: an update of the base is one call and its gradient; of a round, the teacher's too."""
  calls = {'base': 3, 'progressive_0002': 3 + 4, 'progressive_0001': 3 + 2}
  work = {
    name: {'base': 12, 'progressive_0002': 20, 'progressive_0001': 30}[name] * 16 * calls[name]
    for name in NAMES
  }
  config = tiny.config(**OVERRIDES)
  found = forecast.work_after(STAGES, {'base'}, config)
  assert found == pytest.approx(
    {
      'progressive_0002': (work['progressive_0001'] + EVALUATION) / work['progressive_0002'],
      'progressive_0001': EVALUATION / work['progressive_0001'],
    }
  )
  all_of_it = forecast.work_after(STAGES, set(), config)['base'] * work['base']
  assert all_of_it == pytest.approx(sum(work.values()) - work['base'] + EVALUATION)


def test_a_call_is_timed_for_one_image_of_a_full_batch(monkeypatch):
  """The time of an image, over the network calls that it took."""
  asked = []

  def seconds_per_image(self, params, grid, num_samples, seed, then, use):
    asked.append((len(grid) - 1, num_samples))
    return 6.0

  monkeypatch.setattr(
    'diffusion_distillation.evaluation.sampling.Drawer.seconds_per_image', seconds_per_image
  )
  changes = {'evaluation__samplers': ('heun', 'ddim'), 'evaluation__batch_size': 30}
  assert forecast.seconds_per_call(STAGES[0], tiny.config(**changes)) == 6.0 / (2 * 2)
  assert asked == [(2, 32)]  # 30 images rounded up to a multiple of 8 devices


def plan_mode(workdir, monkeypatch, **overrides):
  monkeypatch.setattr('diffusion_distillation.system.interrupts.install', lambda: None)
  config = tiny.config(**overrides)
  return cli.run(cli.Options('plan', config, default.get_config(), workdir))


def test_planning_writes_nothing(tmp_path, monkeypatch, capsys):
  """Not even the workdir; nor does it need data that this version can read."""
  changes = {'dataset__name': 'cifar10', 'dataset__image_size': 32, 'log__measured_updates': 0}
  assert plan_mode(tmp_path / 'runs' / 'new', monkeypatch, **changes) == 0
  assert not list(tmp_path.iterdir())
  assert list(parse(capsys.readouterr().err.splitlines())) == [*NAMES, 'evaluation']


def test_planning_a_finished_run_marks_its_stages_and_changes_nothing(finished, monkeypatch, capsys):
  before = {path: path.stat().st_mtime_ns for path in finished.rglob('*')}
  assert plan_mode(finished, monkeypatch, log__measured_updates=0) == 0
  assert before == {path: path.stat().st_mtime_ns for path in finished.rglob('*')}
  told = parse(capsys.readouterr().err.splitlines())
  assert [name for name, (_, done) in told.items() if done] == NAMES
