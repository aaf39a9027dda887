"""The plan of students that are trained by adapters, what is refused of it, and the adapters in a model's folder."""

import dataclasses
import json

import jax
import numpy as np
import pytest
import safetensors

from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.interop import lora as reader
from diffusion_distillation.methods import METHODS
from diffusion_distillation.networks import lora
from diffusion_distillation.run import device_memory, preflight
from diffusion_distillation.run.tracking import Tracker
from diffusion_distillation.stages import adapters, comparison, trained
from diffusion_distillation.stages import plan as stages
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.stages.provenance import Model, Parents
from diffusion_distillation.system import sharding
from diffusion_distillation.system.checkpoints import digest
from tests import text_model, tiny
from tests.run.gate_run_test import Pooled, of_data

ALL = ('progressive', 'knowledge', 'consistency', 'dmd', 'dmd2')
ADAPTED = {'lora__rank': 2, 'lora__modules': '.*/conv1', 'lora__scale': 0.5}


def config(*methods, **overrides):
  return tiny.config(methods=methods, **overrides)


def plan(*methods, **overrides):
  return {s.name: s for s in stages.plan(config(*methods, **overrides), (8, 8, 1), 10)}


def test_every_student_adapts_the_weights_that_it_starts_from_and_the_base_is_trained_as_a_whole():
  planned = plan(*ALL, **ADAPTED, dmd__start='progressive_0001', consistency__target_decay=0.9)
  assert planned['base'].recipe.lora is None
  bases = {name: dict(s.recipe.lora.bases) for name, s in planned.items() if name != 'base'}
  alone = {'student': 'teacher'}
  assert bases == {
    'progressive_0002': alone,
    'progressive_0001': alone,
    'knowledge': alone,
    'consistency': alone | {'average': 'teacher'},
    'dmd': {'student': 'start', 'fake_score': 'teacher'},
    'dmd2': alone | {'fake_score': 'teacher'},
  }
  starts = {name: stage.starts_from for name, stage in planned.items()}
  assert starts['progressive_0001'] == 'progressive_0002' and starts['dmd'] == 'progressive_0001'
  teacher, start, distance = {'t': 1.0}, {'s': 2.0}, None
  kept = {name: planned[name].frozen(teacher, distance, start) for name in planned}
  assert kept['base'] == {} and kept['dmd2'] == {'teacher': teacher}
  assert kept['knowledge'] == {'teacher': teacher, 'distance': None}  # whose loss has no teacher
  assert kept['dmd'] == {'teacher': teacher, 'distance': None, 'start': start}
  whole = plan('dmd', **ADAPTED, lora__fake_score=False)['dmd']
  assert dict(whole.recipe.lora.bases) == alone
  assert planned['dmd'].without_parents().recipe.lora is None  # as imported weights are whole


def test_the_student_in_training_is_the_stored_one_beside_a_teacher_in_bfloat16():
  """Of weights that are its teacher's, and of weights of its own; the fake score may adapt narrower ones."""
  outputs = jax.jit(lambda net, params, z: net(params, z, np.ones(2), {}).x, static_argnums=0)
  z = np.random.default_rng(2).standard_normal((2, 8, 8, 1), np.float32)
  for dtype in ('bfloat16', 'float32'):
    changes = {'compute__teacher_dtype': dtype, 'dmd__start': 'progressive_0001'}
    planned = plan('progressive', 'dmd', 'dmd2', **ADAPTED, **changes)
    teacher, start = on_host(planned['base'], 0), on_host(planned['base'], 1)
    types = {}
    for name, base in (('dmd', start), ('dmd2', teacher)):
      stage = planned[name]
      frozen = stage.frozen(teacher, None, start)
      types[name] = {leaf.dtype.name for leaf in jax.tree.leaves(frozen['teacher'])}
      factors = factors_of(base, 2, ADAPTED['lora__modules'])
      for scale in (0.0, 1.0):
        of = jax.tree.map(lambda leaf, by=scale: np.float32(by) * leaf, factors)
        state = dataclasses.replace(
          jax.eval_shape(stage.recipe.create_state, base),
          ema_params=(of,),
          params={'student': of},
          step=0,
        )
        stored = trained.to_model(stage, state, 0.0, base)
        params = stage.recipe.weights('student', {**frozen, 'student': of})
        if not scale:  # as before the first update
          assert stored.digest == digest(sharding.to_host(params)) == digest(base)
        found, expected = (np.asarray(outputs(stage.denoise, of, z)) for of in (params, stored.params))
        np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert types == {'dmd': {dtype}, 'dmd2': {'float32'}}


def test_without_a_rank_the_plan_is_the_one_without_adapters():
  changed = {'lora__modules': 'nothing', 'lora__scale': 3.0, 'lora__fake_score': False}
  assert plan(*ALL, **changed) == plan(*ALL)


REFUSED = {
  'rank': (
    {'methods': ('dmd',), 'lora__rank': 9},
    r'lora\.rank=9: no kernel that is adapted in dmd has a rank above 8',
  ),
  'guided': (
    {'methods': ('guided',), 'model__conditional': True, 'dataset__label_dropout': 0.1},
    r'lora\.rank=2: guided adds an input .*; set lora\.rank=0, or leave guided out of methods',
  ),
  'network': (
    {'methods': ('dmd',), 'student__ch': 16},
    r'lora\.rank=2: dmd has another network than its teacher and starts from new weights',
  ),
  'last': (
    {'methods': ('progressive',), 'distill__from_weights': 'last'},
    r"lora\.rank=2: adapters change a teacher's moving average; set distill\.from_weights=ema",
  ),
  'modules': (
    {'methods': ('dmd',), 'lora__modules': 'to_q'},
    r"lora\.modules='to_q' matches no module of dmd that has a kernel, such as .*; it must match the whole path",
  ),
  'expression': (
    {'methods': ('dmd',), 'lora__modules': '('},
    r"lora\.modules='\(' is not a valid regular expression: missing \)",
  ),
}


@pytest.mark.parametrize('what', REFUSED)
def test_what_cannot_be_adapted_is_refused_in_one_line(what):
  changes, words = REFUSED[what]
  changes = dict(changes)
  methods = changes.pop('methods')
  with pytest.raises(UserError, match=words) as caught:
    plan(*methods, **ADAPTED | changes)
  assert '\n' not in str(caught.value)


@pytest.mark.parametrize('method', sorted(set(METHODS) - {'denoising'}))
def test_every_method_is_either_adapted_or_refused(method):
  """Of a method that is added later, too; `denoising` is the base's."""
  changes = {'model__conditional': True, 'dataset__label_dropout': 0.1}
  try:
    planned = plan(method, **ADAPTED, **changes)
  except UserError as error:
    assert method not in ALL and str(error).startswith('lora.rank=2: ')
    return
  students = [stage for stage in planned.values() if stage.method == method]
  assert students
  for stage in students:
    assert {'student', *stage.recipe.method.from_teacher} <= set(dict(stage.recipe.lora.bases))


def flat(c):
  return json.loads(c.to_json())


def check(made_with, now, stage):
  comparison.check_config(tiny.ROOT / stage / 'stage.json', made_with, now, stage)


def test_a_stage_is_refused_if_its_adapters_change_and_others_are_not():
  before, after = config('dmd'), config('dmd', **ADAPTED)
  for stage in ('base', ''):
    check(flat(before), after, stage)
  old = {key: value for key, value in flat(before).items() if key != 'lora'}  # of an older version
  for made_with in (flat(before), old):
    check(made_with, before, 'dmd')
    check(made_with, config('dmd', lora__scale=3.0), 'dmd')  # which has no effect without a rank
    with pytest.raises(UserError, match=r'lora\.rank was 0, is 2'):
      check(made_with, after, 'dmd')
  with pytest.raises(UserError, match=r'lora\.scale was 0\.5, is 2\.0'):
    check(flat(after), config('dmd', **ADAPTED | {'lora__scale': 2.0}), 'dmd')
  whole = config('dmd', **ADAPTED, lora__fake_score=False)
  check(flat(after), whole, 'knowledge')  # which has no fake score
  with pytest.raises(UserError, match=r'lora\.fake_score was True, is False'):
    check(flat(after), whole, 'dmd')


def factors_of(params, rank=3, modules='.*'):
  """Factors with entries of size 0.1, on the host."""
  rng = np.random.default_rng(1)
  made = jax.eval_shape(lambda: lora.init(jax.random.key(0), params, rank, modules))
  return jax.tree.map(lambda leaf: np.float32(0.1 * rng.standard_normal(leaf.shape)), made)


def test_adapters_are_read_as_they_were_written_and_as_those_of_diffusers(tmp_path):
  """Dense layers and convolutions of every size."""
  params = jax.tree.map(np.float32, text_model.stored().params)
  written = lora.Adapters(factors_of(params), 0.7)
  adapters.write(tmp_path, written, params, 'of the base')
  found = adapters.read(tmp_path, params)
  jax.tree.map(np.testing.assert_array_equal, found.factors, written.factors)
  assert found.scale == pytest.approx(0.7)
  expected = lora.merged_on_host(params, written.factors, 0.7)
  merged = reader.merged(tmp_path / adapters.FILE, params, 1.0)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-6), merged, expected)
  with safetensors.safe_open(tmp_path / adapters.FILE, 'numpy') as file:
    shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    settings = json.loads(file.metadata()['lora_adapter_metadata'])
    assert len(file.metadata()) == 1 and settings['base_digest'] == 'of the base'
  query = 'unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q'
  assert shapes[f'{query}.lora_A.weight'] == (3, 8) and shapes[f'{query}.lora_B.weight'] == (8, 3)
  assert shapes['unet.conv_in.lora_A.weight'] == (3, 2, 3, 3)
  assert shapes['unet.conv_in.lora_B.weight'] == (8, 3, 1, 1)
  assert settings['unet.r'] == 3 and settings['unet.lora_alpha'] == pytest.approx(2.1)
  assert query.removeprefix('unet.') in settings['unet.target_modules']


def test_damaged_adapters_are_one_line(tmp_path):
  params = jax.tree.map(np.float32, text_model.stored().params)
  with pytest.raises(DamagedError, match=r'adapters\.safetensors is missing or damaged'):
    adapters.read(tmp_path, params)
  adapters.write(tmp_path, lora.Adapters(factors_of(params), 1.0), params, '')
  content = bytearray((tmp_path / adapters.FILE).read_bytes())
  content[-1] ^= 1
  (tmp_path / adapters.FILE).write_bytes(bytes(content))
  with pytest.raises(DamagedError, match=r'adapters\.safetensors is missing or damaged \(its digest'):
    adapters.read(tmp_path, params)


def test_adapters_of_heads_are_stored_as_matrices(tmp_path):
  rng = np.random.default_rng(0)
  params = {
    'attn': {
      'q': {'kernel': rng.standard_normal((6, 2, 3)), 'bias': np.zeros((2, 3))},
      'proj_out': {'kernel': rng.standard_normal((2, 3, 6)), 'bias': np.zeros(6)},
    }
  }
  written = lora.Adapters(factors_of(params), 1.0)
  adapters.write(tmp_path, written, params, '')
  found = adapters.read(tmp_path, params)
  jax.tree.map(np.testing.assert_array_equal, found.factors, written.factors)
  with safetensors.safe_open(tmp_path / adapters.FILE, 'numpy') as file:
    assert file.get_tensor('unet.attn.q.lora_B.weight').shape == (6, 3)


def on_host(stage, seed):
  """Weights of a stage's network."""
  shapes, rng = stage.abstract_params, np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: np.float32(rng.standard_normal(leaf.shape)), shapes)


def test_the_best_average_is_kept_as_a_model_and_taken_back_as_factors(tmp_path, monkeypatch):
  c = config('knowledge', **ADAPTED, log__frechet_every=2, early_stop__patience=1)
  planned = {s.name: s for s in stages.plan(c, (8, 8, 1), 10)}
  base, stage = planned['base'], planned['knowledge']
  workdirs.claim(tmp_path, c)
  (tmp_path / stage.name).mkdir()
  weights = on_host(base, 0)
  teacher = Model(base, 'ema', digest(weights), 1, 0.0, {'ema': weights})
  tracker = Tracker(c, stage, tmp_path, Parents(teacher, teacher), Pooled(), of_data())
  drawn = []
  values = iter([2.0, 1.0, 3.0])
  monkeypatch.setattr(
    Tracker, '_distance', lambda self, params: drawn.append(params) or (next(values), 0.1)
  )
  made = [factors_of(weights, 2, ADAPTED['lora__modules']) for _ in range(3)]
  made = [jax.tree.map(lambda leaf, k=k: leaf * np.float32(k + 1), one) for k, one in enumerate(made)]
  for done, factors in zip((2, 4, 6), made, strict=True):
    tracker.measure(done, factors)
  expected = [lora.merged_on_host(weights, factors, 0.5) for factors in made]
  for found, merged in zip(drawn, expected, strict=True):
    jax.tree.map(np.testing.assert_array_equal, found, merged)
  state = dataclasses.replace(
    jax.eval_shape(stage.recipe.create_state, weights),
    ema_params=(made[2],),
    params={'student': made[2]},
  )
  state, changed = tracker.with_best(state)
  assert changed and not tracker.with_best(state)[1]
  jax.tree.map(np.testing.assert_array_equal, state.ema_params[0], made[1])
  model = trained.to_model(stage, dataclasses.replace(state, step=6), 0.0, weights)
  jax.tree.map(np.testing.assert_array_equal, model.params, expected[1])
  jax.tree.map(np.testing.assert_array_equal, model.use('last').params, expected[2])
  assert model.adapters.scale == 0.5 and model.use('last').adapters is None


def test_memory_and_disk_are_those_of_the_adapters_and_of_one_frozen_copy():
  def size(tree):
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))

  stage = plan('dmd', **ADAPTED, compute__teacher_dtype='bfloat16')['dmd']
  network = stage.abstract_params
  factors = size(factors_of(network, 2, ADAPTED['lora__modules']))
  kernels = sum(
    4 * int(np.prod((*inputs, *outputs)))
    for inputs, outputs in lora.adapted(network, ADAPTED['lora__modules']).values()
  )
  found = device_memory.count(stage).on(1, 1, 1)
  assert (found.params, found.averages, found.frozen) == (2 * factors, factors, size(network))
  assert 4 * factors <= found.optimizer < 4 * factors + 100
  assert found.gradients == 2 * (2 * factors + 2 * kernels)
  state, pairs = size(stage.abstract_state), stage.pairs.count * (8 * 64 + 4)
  assert preflight.disk([stage], set()) == 3 * state + size(network) + pairs
