"""The plan of students that go to few steps at once, what is refused of it, and what it costs."""

import itertools
import json
import math

import pytest

from configs import default
from diffusion_distillation import cli
from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.samplers import DDIM, DPMSolver2M, Euler, Heun
from diffusion_distillation.diffusion.weightings import Constant, SnrPlusOne, SnrTrunc
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import measure, results
from diffusion_distillation.interop import importing
from diffusion_distillation.methods import DMD, DMD2, Consistency, Gan, Knowledge, distances
from diffusion_distillation.networks.spaces import Pixels
from diffusion_distillation.run import forecast
from diffusion_distillation.stages import plan as stages
from diffusion_distillation.stages import workdir as workdirs
from tests import tiny

ALL = ('progressive', 'knowledge', 'consistency', 'dmd', 'dmd2')
ROUNDS = ['progressive_0002', 'progressive_0001']


def plan(*methods, **overrides):
  return {s.name: s for s in stages.plan(tiny.config(methods=methods, **overrides), (8, 8, 1), 10)}


@pytest.mark.parametrize('methods', [*itertools.permutations(ALL, 2), ALL, ALL[::-1], ('dmd',), ()])
def test_methods_follow_the_base_in_the_order_that_they_are_named_in(methods):
  planned = plan(*methods)
  named = [ROUNDS if name == 'progressive' else [name] for name in methods]
  assert list(planned) == ['base', *itertools.chain(*named)]
  parents = {name: stage.parent for name, stage in planned.items()}
  expected = dict.fromkeys(planned, 'base') | {'base': None}
  assert parents == expected | ({ROUNDS[1]: ROUNDS[0]} if 'progressive' in methods else {})
  students = [name for name in methods if name != 'progressive']
  assert all(planned[name].start == 'base' for name in students)
  assert all(planned[name].parent_weights == 'ema' for name in students)
  assert planned['base'].start is planned['base'].pairs is None
  seeds = [stage.recipe.seed for stage in planned.values()]
  seeds += list({stage.pairs.seed for stage in planned.values() if stage.pairs})
  assert len(set(seeds)) == len(seeds)


def test_no_method_s_noise_depends_on_the_others_beside_it():
  """Adding one later leaves the rest as they are; another seed of the config is another noise for all."""
  whole, other = plan(*ALL), plan(*ALL, seed=1)
  for methods in (('dmd',), ('dmd2', 'knowledge'), ALL[::-1]):
    assert all(stage == whole[name] for name, stage in plan(*methods).items())
  assert not {s.recipe.seed for s in whole.values()} & {s.recipe.seed for s in other.values()}
  assert whole['dmd'].pairs.seed != other['dmd'].pairs.seed


def test_pairs_are_the_same_for_all_that_learn_from_them():
  section = {'sampler': 'heun', 'num_steps': 5, 'grid': 'karras', 'num_pairs': 33, 'batch_size': 7}
  planned = plan(*ALL, **{f'pairs__{key}': value for key, value in section.items()})
  assert {name for name, stage in planned.items() if stage.pairs} == {'knowledge', 'dmd'}
  pairs = planned['dmd'].pairs
  assert pairs == planned['knowledge'].pairs
  assert (pairs.count, pairs.sampler, pairs.num_steps) == (33, Heun(), 5)
  assert (pairs.grid, pairs.batch_size) == ('karras', 7)
  assert pairs.clip_x and not plan('knowledge', pairs__clip_x=False)['knowledge'].pairs.clip_x
  assert plan('dmd', dmd__regression=0.0)['dmd'].pairs is None
  assert plan('dmd2', dmd2__regression=0.1)['dmd2'].pairs == plan('dmd')['dmd'].pairs


@pytest.mark.parametrize('name', ['ddim', 'euler', 'heun', 'rk4', 'edm_heun', 'dpm_solver_2m'])
def test_pairs_may_be_drawn_by_any_deterministic_sampler(name):
  pairs = plan('knowledge', pairs__sampler=name)['knowledge'].pairs
  expected = {'ddim': DDIM, 'euler': Euler, 'heun': Heun, 'dpm_solver_2m': DPMSolver2M}
  assert type(pairs.sampler) is expected.get(name, type(pairs.sampler)) and pairs.clip_x


def test_each_section_has_its_own_updates_batches_averages_and_optimizer():
  numbers = {'num_updates': 30, 'batch_size': 8, 'ema_decay': (0.5, 0.9), 'clip_norm': 3.0}
  numbers |= {'weight_decay': 0.25, 'warmup': 7, 'decay': 'linear', 'micro_batches': 2}
  for name in ALL[1:]:
    changed = {f'{name}__{key}': value for key, value in numbers.items()}
    planned = plan(*ALL, **changed)
    recipe = planned[name].recipe
    assert (planned[name].num_updates, planned[name].batch_size) == (30, 8)
    assert planned[name].weights == ('ema', 'ema_0.9', 'last') and recipe.ema_decay == (0.5, 0.9)
    assert recipe.micro_batches == 2
    assert (recipe.optimizer.clip_norm, recipe.optimizer.weight_decay) == (3.0, 0.25)
    rates = recipe.learning_rate.values()
    assert {(r.num_updates, r.warmup, r.decay) for r in rates} == {(30, 7, 'linear')}
    rest = [other for other in planned if other != name]
    assert all(planned[other] == plan(*ALL)[other] for other in rest)
  base = plan(*ALL)['base']
  assert (base.recipe.optimizer.clip_norm, base.recipe.optimizer.weight_decay) == (1.0, 0.0)


def test_every_network_has_a_learning_rate():
  rates = {'learning_rate': 3e-4, 'fake_learning_rate': 2e-3}
  changed = {f'{name}__{k}': v for name in ('dmd', 'dmd2') for k, v in rates.items()}
  planned = plan(*ALL, knowledge__learning_rate=5e-4, **changed)
  for name, stage in planned.items():
    peaks = {network: rate.peak for network, rate in stage.recipe.learning_rate.items()}
    assert set(stage.recipe.method.trained) <= set(peaks)
    if name in ('dmd', 'dmd2'):
      assert (peaks['student'], peaks['fake_score']) == (3e-4, 2e-3)
      assert peaks.get('head', 2e-3) == 2e-3
  assert planned['knowledge'].recipe.learning_rate['student'].peak == 5e-4
  for stage in list(planned.values())[1:]:
    assert stage.recipe.student.network.dropout == 0.0 and stage.denoise == planned['base'].denoise
  assert planned['dmd2'].recipe.method.at(4).trained == ('student', 'fake_score', 'head')


def test_what_each_student_is_made_for_is_how_it_is_sampled_and_measured():
  planned = plan(*ALL, consistency__sample_steps=(1, 3), dmd2__num_steps=4)
  made_for = {n: (s.sampler, s.num_steps, s.measured_steps) for n, s in planned.items()}
  assert made_for == {
    'base': ('ddim', 4, (4,)),
    'progressive_0002': ('ddim', 2, (2,)),
    'progressive_0001': ('ddim', 1, (1,)),
    'knowledge': ('ddim', 1, (1,)),
    'consistency': ('multistep_consistency', 1, (1, 3)),
    'dmd': ('ddim', 1, (1,)),
    'dmd2': ('multistep_consistency', 4, (4,)),
  }
  config = tiny.config(methods=ALL, consistency__sample_steps=(1, 3), dmd2__num_steps=4)
  rows = [
    (list(planned)[place], sampler, steps)
    for place, _, sampler, steps in measure.rows(list(planned.values()), config)
  ]
  of_base = [('base', sampler, n) for n in (4, 2, 1, 3) for sampler in ('ddim', 'ancestral')]
  assert rows[: len(of_base)] == of_base
  assert rows[len(of_base) :] == [
    (name, sampler, steps)
    for name, (sampler, _, counts) in made_for.items()
    for steps in counts
    if name != 'base'
  ]


def test_the_methods_have_their_sections_options():
  changed = {
    'consistency__start_intervals': 3,
    'consistency__end_intervals': 9,
    'consistency__solver': 'euler',
    'consistency__weighting': 'snr_plus_one',
    'consistency__distance': 'pseudo_huber',
    'consistency__target_decay': 0.0,
    'consistency__num_updates': 77,
    'dmd__first_t': 0.1,
    'dmd__last_t': 0.9,
    'dmd__regression': 0.75,
    'dmd2__num_updates': 9,
    'dmd2__fake_updates': 3,
    'dmd2__simulated': False,
    'dmd2__num_steps': 2,
    'dmd2__gan_generator': 0.1,
    'dmd2__gan_fake': 0.2,
    'time__stratified': True,
  }
  planned = {name: stage.recipe.method for name, stage in plan(*ALL, **changed).items()}
  schedule, law = planned['base'].schedule, times.Uniform(stratified=True)
  assert planned['knowledge'] == Knowledge(schedule)
  huber, solver = distances.PseudoHuber(), Euler()
  shared = (schedule, SnrPlusOne(), huber, solver, law, False)
  assert planned['consistency'] == Consistency(77, 3, 9, *shared)
  clip = Pixels().clip
  assert planned['dmd'] == DMD(schedule, SnrTrunc(), law, 0.1, 0.9, 0.75, clip=clip)
  several = {'regression': 0.0, 'fake_updates': 3, 'num_steps': 2, 'simulated': False}
  assert planned['dmd2'] == DMD2(schedule, SnrTrunc(), law, clip=clip, gan=Gan(8, 0.1, 0.2), **several)
  assert plan('dmd2', dmd2__clip_x=False)['dmd2'].recipe.method.clip is None
  averaged = plan('consistency', consistency__target_decay=0.9)['consistency'].recipe.method
  assert averaged.weighting == Constant() and averaged.follows_average


STARTS = [
  ('dmd', 'progressive_0001', ('progressive', 'dmd')),
  ('dmd2', 'dmd', ('dmd', 'dmd2')),
  ('consistency', 'knowledge', ('knowledge', 'consistency')),
]


@pytest.mark.parametrize(('name', 'start', 'methods'), STARTS)
def test_a_student_may_start_from_any_stage_before_it(name, start, methods):
  changed = {f'{name}__start': start}
  stage = plan(*methods, **changed)[name]
  assert (stage.start, stage.parent) == (start, 'base')
  for wrong in (methods[::-1], (name,)):
    with pytest.raises(UserError, match=rf"^{name}\.start='{start}' is not one of \['base'\]"):
      plan(*wrong, **changed)
  with pytest.raises(UserError, match=rf"^{name}\.start='{name}' is not one of"):
    plan(*methods, **{f'{name}__start': name})


SEVERAL = {'dmd2__num_steps': 4}  # and four of the base
BAD = [
  ('methods', {'methods': ('dmdd',)}, "'dmdd' is not one of .*'dmd'"),
  ('methods', {'methods': ('dmd', 'dmd')}, 'twice'),
  ('dmd.start', {'dmd__start': 'progresive_0001'}, "did you mean 'progressive_0001'"),
  ('dmd2.gan_generator', {'dmd2__gan_fake': 0.0}, 'must both be positive, or both be 0'),
  ('dmd2.gan_fake', {'dmd2__gan_generator': 0.0}, 'must both be positive, or both be 0'),
  ('dmd2.gan_fake', {'model__ch': 12}, 'divisible by 8; the model has 12'),
  ('dmd2.num_updates', {'dmd2__num_updates': 9}, 'multiple of dmd2.fake_updates=5'),
  ('dmd', {'dmd__num_steps': 2}, 'regression must be 0'),
  ('dmd2', {'dmd2__num_steps': 2, 'dmd2__regression': 0.5}, 'regression must be 0'),
  ('dmd', {'dmd__first_t': 0.0}, 'first_t=0.0'),
  ('dmd', {'dmd__first_t': 0.99}, 'first_t=0.99'),
  ('dmd2', {'dmd2__last_t': 1.5}, 'last_t=1.5'),
  ('dmd.num_steps', {'dmd__num_steps': 0}, 'positive'),
  ('dmd.regression', {'dmd__regression': -1.0}, 'zero or more'),
  ('dmd2.fake_updates', {'dmd2__fake_updates': 0}, 'positive'),
  ('dmd.fake_learning_rate', {'dmd__fake_learning_rate': math.nan}, 'positive'),
  ('dmd.distance', {'dmd__distance': 'l3'}, "did you mean 'l2'"),
  ('pairs.sampler', {'pairs__sampler': 'ancestral'}, 'is not one of'),
  ('pairs.sampler', {'pairs__sampler': 'multistep_consistency'}, 'is not one of'),
  ('pairs.sampler', {'pairs__sampler': 'hein'}, "did you mean 'heun'"),
  ('pairs.grid', {'pairs__grid': 'kerras'}, "did you mean 'karras'"),
  ('pairs.num_pairs', {'pairs__num_pairs': 0}, 'positive'),
  ('distill.weighting', {'distill__weighting': 'snr_trunk'}, "did you mean 'snr_trunc'"),
  ('dmd2.fake_weighting', {'dmd2__fake_weighting': 'bass'}, "did you mean 'base'"),
  ('dmd.fake_law', {'dmd__fake_law': 'unifrom'}, "did you mean 'uniform'"),
  ('evaluation.grid', {'evaluation__grid': 'even'}, 'is not one of'),
  ('consistency.start_intervals', {'consistency__start_intervals': 19}, 'end_intervals=18'),
  ('consistency.end_intervals', {'consistency__end_intervals': 0}, 'positive'),
  ('consistency.weighting', {'consistency__weighting': 'snr_trunk'}, "did you mean 'snr_trunc'"),
  ('consistency.solver', {'consistency__solver': 'ancestral'}, 'is not one of'),
  ('consistency.target_decay', {'consistency__target_decay': 1.0}, r'in \[0, 1\)'),
  ('consistency.distance', {'consistency__distance': 'huber'}, "did you mean 'pseudo_huber'"),
  ('consistency.sample_steps', {'consistency__sample_steps': ()}, 'must not be empty'),
  ('consistency.sample_steps', {'consistency__sample_steps': (1, 0)}, 'positive'),
  ('consistency.sample_steps', {'consistency__sample_steps': (2, 2)}, 'twice'),
  ('consistency.clip_norm', {'consistency__clip_norm': 0.0}, 'positive'),
  ('knowledge.decay', {'knowledge__decay': 'exp'}, 'is not one of'),
  ('knowledge.ema_decay', {'knowledge__ema_decay': (1.0,)}, r'in \[0, 1\)'),
  ('time.law', {'time__law': 'normal'}, "did you mean 'lognormal'"),
  ('time.law', {'time__law': 'lognormal', 'time__num_steps': 4}, 'time.num_steps=0'),
  ('weighting', {'weighting': 'edn'}, "did you mean 'edm'"),
  ('evaluation.max_steps', {'methods': ('dmd2',), 'evaluation__max_steps': 2} | SEVERAL, 'nothing'),
]


@pytest.mark.parametrize(('key', 'changes', 'text'), BAD, ids=lambda value: str(value)[:40])
def test_what_does_not_fit_is_one_line_that_names_its_key(key, changes, text):
  changes = {'methods': ALL, 'dmd2__num_updates': 10} | changes
  with pytest.raises(UserError, match=text) as error:
    stages.plan(tiny.config(**changes), (8, 8, 1), 10)
  assert key in str(error.value) and '\n' not in str(error.value)


def train(workdir, monkeypatch, capsys, **changes):
  """`--mode=train` in this process: its exit code, and what it says on stderr."""
  monkeypatch.setattr('diffusion_distillation.system.interrupts.install', lambda: None)
  options = cli.Options('train', tiny.config(**changes), default.get_config(), workdir)
  code = cli.run(options)
  return code, capsys.readouterr().err


SMALL = {f'{name}__batch_size': 16 for name in ALL[1:]}


@pytest.mark.parametrize('name', ['knowledge', 'consistency', 'dmd', 'dmd2'])
@pytest.mark.parametrize(
  ('distance', 'file'), [('features', ''), ('features', 'missing'), ('lpips', 'other')]
)
def test_a_distance_without_its_weights_is_refused_before_anything_is_written(
  tmp_path, monkeypatch, capsys, name, distance, file
):
  (tmp_path / 'other').write_bytes(b'not safetensors')
  weights = file and str(tmp_path / file)
  changes = {f'{name}__distance': distance, f'{name}__distance_weights': weights}
  changes |= {f'{name}__regression': 0.5} if name == 'dmd2' else {}
  code, text = train(tmp_path / 'run', monkeypatch, capsys, methods=(name,), **SMALL, **changes)
  assert code == 2 and text.count('\n') == 1
  assert text.startswith(f'error: {name}.distance_weights=') and weights in text
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('name', ['knowledge', 'consistency', 'dmd', 'dmd2'])
def test_batches_that_do_not_divide_by_the_devices_are_refused(tmp_path, monkeypatch, capsys, name):
  changes = SMALL | {f'{name}__batch_size': 12}
  code, text = train(tmp_path / 'run', monkeypatch, capsys, methods=(name,), **changes)
  assert code == 2 and f'{name}.batch_size=12' in text and '8 devices' in text
  assert not (tmp_path / 'run').exists()


def test_a_student_of_the_base_is_refused_where_a_round_was_imported(
  finished, tmp_path, monkeypatch, capsys
):
  """Its teacher is not there; rounds after the imported one, and the student that starts the run, are fine."""
  config = workdirs.read_config(finished, default.get_config())
  workdir = tmp_path / 'run'
  importing.from_workdir(config, default.get_config(), finished / 'progressive_0002', workdir)
  before = {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()}
  for methods, name in ((('progressive', 'dmd'), 'dmd'), (ALL, 'knowledge')):
    code, text = train(workdir, monkeypatch, capsys, methods=methods, **SMALL)
    assert code == 2 and text.count('\n') == 1 and text.startswith('error: ')
    assert f'stage {name} comes from stage base' in text and 'begins with progressive_0002' in text
    assert before == {path: path.read_bytes() for path in workdir.rglob('*') if path.is_file()}
  planned = workdirs.plan_for(workdir, tiny.config(methods=('dmd', 'progressive')))[0]
  assert [stage.name for stage in planned] == ['progressive_0002', 'progressive_0001']


def test_the_plan_has_a_line_for_the_pairs_before_the_first_that_needs_them():
  changes = {'pairs__num_pairs': 1500, 'pairs__sampler': 'rk4', 'pairs__num_steps': 7}
  planned = list(plan('consistency', 'dmd', 'knowledge', **changes).values())
  config = tiny.config(methods=('consistency', 'dmd', 'knowledge'), **changes)
  lines = [line.split() for line in list(forecast.table(planned, set(), config))[1:]]
  assert [words[0] for words in lines] == [
    *('base', 'consistency', 'pairs', 'dmd', 'knowledge', 'evaluation')
  ]
  assert lines[2][1:5] == ['7', 'steps', '1,500', 'pairs']
  assert float(lines[2][-3]) == pytest.approx(1500 * 7 * 4, rel=5e-3)
  lines = list(forecast.table(planned, {'base', 'dmd'}, config))
  assert [line.split()[0] for line in lines[1:]] == [
    *('base', 'consistency', 'dmd', 'pairs', 'knowledge', 'evaluation')
  ]


SECONDS = {'base': 1000.0, 'progressive_0002': 1.0, 'progressive_0001': 2.0, 'knowledge': 4.0}
SECONDS |= {'consistency': 8.0, 'dmd': 16.0, 'dmd2': 32.0}


@pytest.mark.parametrize('drawn', [True, False])
def test_a_stage_costs_what_led_from_the_base_to_it_each_once(tmp_path, drawn):
  """All numbers are powers of two, the pairs' 64: a sum tells its summands. The base counts for none."""
  starts = {'dmd__start': 'progressive_0001', 'dmd2__start': 'dmd', 'consistency__start': 'knowledge'}
  planned = list(plan(*ALL, **starts).values())
  if drawn:
    (tmp_path / 'pairs').mkdir()
    (tmp_path / 'pairs' / 'pairs.json').write_text(json.dumps({'seconds': 64.0}))
  found = results.origins(planned, SECONDS, tmp_path)
  pairs = 64.0 * drawn
  assert {name: origin['cost'] for name, origin in found.items()} == {
    'base': 0.0,
    'progressive_0002': 1.0,
    'progressive_0001': 1.0 + 2.0,
    'knowledge': 4.0 + pairs,
    'consistency': 8.0 + 4.0 + pairs,
    'dmd': 16.0 + pairs + 1.0 + 2.0,
    'dmd2': 32.0 + 16.0 + pairs + 1.0 + 2.0,
  }
  origin = {'method': 'dmd2', 'parent': 'base', 'start': 'dmd', 'cost': found['dmd2']['cost']}
  assert found['dmd2'] == origin
  assert found['base'] == {'method': 'denoising', 'parent': None, 'start': None, 'cost': 0.0}
