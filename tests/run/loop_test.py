"""The training step and the loop over it, in this process."""

import dataclasses
import json
import os
import shutil
import signal
import threading
import time

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_distillation.datasets.loading import Shuffled
from diffusion_distillation.errors import DamagedError, NumericalError, Preempted, UserError
from diffusion_distillation.methods import Denoising
from diffusion_distillation.networks import conditioning
from diffusion_distillation.run import loop
from diffusion_distillation.run.inputs import Inputs
from diffusion_distillation.stages import provenance
from diffusion_distillation.stages import workdir as workdirs
from diffusion_distillation.system import interrupts, sharding
from diffusion_distillation.system.checkpoints import digest
from diffusion_distillation.training.recipe import Recipe
from diffusion_distillation.training.step import train_steps
from tests import tiny

CONFIG = tiny.config(max_skipped=3)
STAGES, IMAGES = tiny.plan(max_skipped=3)
STUDENT = STAGES[1]
INPUTS = Inputs(IMAGES)


@flax.struct.dataclass
class Poisoned(Denoising):
  """Base training whose loss is NaN at some steps."""

  bad: jax.Array = dataclasses.field(default_factory=lambda: jnp.array([-1]))

  def loss(self, nets, batch, rng, step):
    loss, metrics = Denoising.loss(self, nets, batch, rng, step)
    return jnp.where(jnp.any(step == self.bad), jnp.nan, 1.0) * loss, metrics


def poisoned(*bad, base=STAGES[0]):
  """The base stage, NaN at the steps `bad`; padded, so that all share one program."""
  steps = jnp.array([*bad, *[-1] * (12 - len(bad))])
  method = Poisoned(base.recipe.method.schedule, base.recipe.method.weighting, bad=steps)
  return dataclasses.replace(base, recipe=base.recipe.replace(method=method))


BASE = poisoned()


@pytest.fixture
def workdir(tmp_path):
  workdirs.claim(tmp_path, CONFIG)
  return tmp_path


@pytest.fixture(scope='module')
def of_base(tmp_path_factory, step):
  """A workdir with a finished base, which tests only copy, and its model."""
  workdir = tmp_path_factory.mktemp('base')
  workdirs.claim(workdir, CONFIG)
  return workdir, loop.fit(step, BASE, INPUTS, workdir, CONFIG)


@pytest.fixture
def trained(of_base, tmp_path):
  return shutil.copytree(of_base[0], tmp_path / 'trained')


def host_batch(stage, k):
  """What update k of a stage learns from."""
  indices, _ = Shuffled(len(IMAGES), int(stage.recipe.seed), stage.batch_size)(k)
  batch = IMAGES.images.batch(indices)
  return {'image': batch['image'], 'cond': conditioning.select(stage.recipe.conditioning, batch['cond'])}


def advance(step, stage, state, count, teacher=None):
  for _ in range(count):
    batch = sharding.put(host_batch(stage, int(state.step)))
    frozen = {} if teacher is None else {'teacher': teacher}
    state, metrics = step(stage.recipe, state, frozen, batch)
  return state, metrics


def first_state(stage):
  params = stage.init_params(jax.random.key(stage.recipe.seed))
  return sharding.replicate(stage.recipe.create_state(params))


def assert_same(tree, other):
  jax.tree.map(np.testing.assert_array_equal, tree, other)


@pytest.mark.slow
def test_a_non_finite_loss_reaches_nothing_and_is_counted(step):
  state, _ = advance(step, poisoned(2), first_state(BASE), 2)
  before = sharding.to_host(state)
  state, metrics = advance(step, poisoned(2), state, 1)
  assert np.isnan(metrics['loss'])
  assert (int(state.step), int(state.skipped), int(state.skipped_in_a_row)) == (3, 1, 1)
  for name in ('params', 'ema_params', 'opt_state'):
    assert_same(getattr(state, name), getattr(before, name))
  state, metrics = advance(step, poisoned(2), state, 1)
  assert (int(metrics['skipped']), int(metrics['skipped_in_a_row'])) == (1, 0)
  assert digest(state.params) != digest(before.params)


@pytest.mark.slow
def test_some_skipped_updates_do_not_stop_a_run(step, workdir):
  model = loop.fit(step, poisoned(3, 4, 8), INPUTS, workdir, CONFIG)
  assert model.step == 12
  lines = [json.loads(line) for line in (workdir / 'base' / 'metrics.jsonl').read_text().splitlines()]
  assert [line['skipped'] for line in lines] == [1, 2, 3]


@pytest.mark.slow
def test_too_many_in_a_row_go_back_once_and_then_stop_naming_stage_and_step(step, workdir, caplog):
  with pytest.raises(NumericalError, match=r'stage base: .* 3 updates in a row up to step 12'):
    loop.fit(step, poisoned(8, 9, 10), INPUTS, workdir, CONFIG)
  assert 'back to step 10' in caplog.text
  assert all(
    np.isfinite(leaf).all()
    for leaf in jax.tree.leaves(provenance.load_model(workdir, BASE, CONFIG).params)
  )


@pytest.mark.slow
def test_what_does_not_happen_again_is_survived(step, workdir):
  """A fault of the machine: NaN the first time a step is taken, not the second time."""
  calls = []

  def faulty(recipe, state, frozen, batch):
    calls.append(int(state.step))
    bad = calls.count(int(state.step)) == 1 and int(state.step) in (5, 6, 7)
    stage = poisoned(*([int(state.step)] if bad else []))
    return step(stage.recipe.replace(seed=recipe.seed), state, frozen, batch)

  model = loop.fit(faulty, BASE, INPUTS, workdir, CONFIG)
  assert calls == [0, 1, 2, 3, 4, 5, 6, 7, 5, 6, 7, 8, 9, 10, 11]
  assert model.step == 12 and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model.params))


@pytest.mark.slow
def test_resumed_is_uninterrupted_bit_for_bit(step, workdir):
  """Stopped after 7 of 12 updates, by a signal; and once more in the round."""

  def stopping(at):
    def call(recipe, state, frozen, batch):
      if int(state.step) == at:
        signal.raise_signal(signal.SIGTERM)
      return step(recipe, state, frozen, batch)

    return call

  handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
  models = []
  try:
    for stage, at in ((BASE, 7), (STUDENT, 2)):
      interrupts.install()
      inputs = Inputs(IMAGES, teacher=models[-1] if models else None)
      with pytest.raises(Preempted, match='SIGTERM'):
        loop.fit(stopping(at), stage, inputs, workdir, CONFIG)
      assert provenance.load_model(workdir, stage, CONFIG).step == at + 1
      interrupts.install()
      models.append(loop.fit(step, stage, inputs, workdir, CONFIG))
  finally:
    for number, handler in handlers.items():
      signal.signal(number, handler)
  base, _ = advance(step, BASE, first_state(BASE), 12)
  assert models[0].digest == digest(base.ema_params[0])
  student = sharding.replicate(STUDENT.recipe.create_state(base.ema_params[0]))
  student, _ = advance(step, STUDENT, student, 8, teacher=base.ema_params[0])
  assert models[1].digest == digest(student.ema_params[0])


def test_a_finished_stage_returns_at_once(of_base, trained):
  model, again = of_base[1], loop.fit(None, BASE, INPUTS, trained, CONFIG)
  assert again.digest == model.digest and again.seconds == model.seconds


def test_parameters_that_were_exchanged_are_noticed(trained):
  path = trained / 'base' / 'stage.json'
  path.write_text(path.read_text().replace(json.loads(path.read_text())['digest'], 'f' * 64))
  with pytest.raises(DamagedError, match='digest ffffffffffff'):
    loop.fit(None, BASE, INPUTS, trained, CONFIG)
  with pytest.raises(DamagedError, match='digest ffffffffffff'):
    provenance.load_model(trained, BASE, CONFIG)


def test_another_parameterization_is_refused_as_a_teacher(trained):
  path = trained / 'base' / 'stage.json'
  path.write_text(path.read_text().replace('"output": "v"', '"output": "eps"', 1))
  with pytest.raises(UserError, match='output is eps, but this run needs v'):
    loop.fit(None, BASE, INPUTS, trained, CONFIG)


def test_another_config_is_refused_even_without_config_json(trained):
  (trained / 'config.json').unlink()
  before = (trained / 'base' / 'stage.json').read_text()
  other = tiny.config(max_skipped=3, train__learning_rate=0.5)
  with pytest.raises(UserError, match=r'another config: train\.learning_rate was 0\.001, is 0\.5'):
    loop.fit(None, BASE, INPUTS, trained, other)
  assert (trained / 'base' / 'stage.json').read_text() == before


def test_checkpoints_without_lineage_are_refused(trained):
  (trained / 'base' / 'stage.json').unlink()
  with pytest.raises(DamagedError, match=r'stage\.json is missing'):
    loop.fit(None, BASE, INPUTS, trained, CONFIG)


def test_rounds_share_one_compiled_step(step):
  base, _ = advance(step, BASE, first_state(BASE), 1)
  before = step._cache_size()
  for stage in STAGES[1:]:
    student = sharding.replicate(stage.recipe.create_state(base.ema_params[0]))
    advance(step, stage, student, 1, teacher=base.ema_params[0])
  assert step._cache_size() - before <= 1


@pytest.mark.slow
def test_one_device_equals_eight(step, monkeypatch):
  """Four updates' gradients agree to rounding; clipping sees the gradient of the whole batch."""
  assert jax.device_count() == 8

  def trajectory(compiled):
    state = first_state(BASE)
    norms = []
    for _ in range(4):
      state, metrics = advance(compiled, BASE, state, 1)
      norms.append(float(metrics['grad_norm']))
    return sharding.to_host(state), norms

  eight, norms_eight = trajectory(step)
  monkeypatch.setattr(sharding, '_in_use', [sharding._make(jax.devices()[:1], 1)])
  one, norms_one = trajectory(sharding.compile_step(train_steps))
  np.testing.assert_allclose(norms_one, norms_eight, rtol=1e-5)
  moments = (optax.tree.get(state.opt_state, 'mu') for state in (one, eight))
  for a, b in zip(*map(jax.tree.leaves, moments), strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4 * np.abs(b).max() + 1e-9)


def test_the_update_is_adam_on_the_clipped_gradient_and_ema_follows(step):
  """The step against its definition, written out: one update of the base."""
  state = first_state(BASE)
  start = sharding.to_host(state)
  batch = host_batch(BASE, 0)
  rng = jax.random.fold_in(jax.random.key(BASE.recipe.seed), 0)
  _, rng_draw, rng_dropout = jax.random.split(rng, 3)
  rng = jax.random.fold_in(rng_dropout, 0)  # of the one micro-batch there is
  x = BASE.space.encode(batch['image'])
  example = {'x': x, 'cond': None} | BASE.recipe.method.draw(rng_draw, x.shape)

  def loss_fn(params):
    return BASE.recipe.method.loss(BASE.recipe.bind(params), example, rng, 0)[0]

  tx = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adam(1e-3 / 100)
  )  # first of 100 warm-up updates

  @jax.jit
  def by_hand(params):
    loss, grads = jax.value_and_grad(loss_fn)(params)
    updates, _ = tx.update(grads, tx.init(params))
    return loss, updates, optax.apply_updates(params, updates)

  loss, updates, expected = by_hand(start.params)
  state, metrics = step(BASE.recipe, state, {}, sharding.put(batch))
  assert float(metrics['loss']) == pytest.approx(float(loss), rel=1e-5)
  norm = optax.tree.norm(updates) / (1e-3 / 100)
  assert float(metrics['update_norm']) == pytest.approx(float(norm), rel=1e-4)
  for a, b, ema, old in zip(
    *map(jax.tree.leaves, (state.params, expected, state.ema_params, start.params)), strict=True
  ):
    np.testing.assert_allclose(a, b, atol=2e-7)
    np.testing.assert_allclose(ema, 0.999 * old + 0.001 * a, atol=1e-7)


def test_every_update_has_the_recipe_of_its_number(workdir, monkeypatch):
  """Networks take turns by it. Nothing is compiled: the step only counts."""
  monkeypatch.setattr(Recipe, 'at', lambda self, number: number)
  seen = []

  def count(recipe, state, frozen, batch):
    seen.append((recipe, int(state.step)))
    metrics = {'loss': jnp.float32(1), 'skipped': state.skipped, 'skipped_in_a_row': state.skipped}
    return state.replace(step=state.step + 1), metrics

  loop.fit(count, BASE, INPUTS, workdir, CONFIG)
  assert seen == [(number, number) for number in range(12)]


@pytest.mark.slow
@pytest.mark.parametrize('together', [1, 2])
def test_a_stage_compiles_its_program_once_and_while_its_state_is_made(workdir, together):
  """Of the base and of a round, with one update or two a program: what is compiled ahead is what the loop calls."""
  config = tiny.config(max_skipped=3, compute__updates_per_dispatch=together)
  compiled = sharding.compile_step(train_steps)
  found, lowered_before = {'jaxpr_to_mlir_module_duration': [], 'backend_compile_duration': []}, []

  def note(event, seconds, fun_name='', **_):
    del seconds
    if (kind := event.split('/')[-1]) in found and fun_name == 'jit(compiled)':
      found[kind].append(threading.current_thread() is threading.main_thread())

  jax.monitoring.register_event_duration_secs_listener(note)
  try:
    more = {'meanwhile': lambda: lowered_before.append(len(found['jaxpr_to_mlir_module_duration']))}
    model = loop.fit(compiled, STAGES[0], INPUTS, workdir, config, **more)
    loop.fit(compiled, STUDENT, Inputs(IMAGES, model), workdir, config, **more)
    (workdir / STUDENT.name / 'model' / 'model.json').unlink()  # finished: restored, and not compiled
    loop.fit(sharding.compile_step(train_steps), STUDENT, Inputs(IMAGES, model), workdir, config)
  finally:
    jax.monitoring.unregister_event_duration_listener(note)
  assert list(found.values()) == [[True, True], [False, False]]
  assert lowered_before == [1, 2]


class Compiling:
  """A monitor that a signal meets while it compiles."""

  def __init__(self):
    self.due = lambda done: done == 3
    self.lag, self.resume = (lambda values: {}), (lambda done: None)

  def look(self, state, frozen):
    with interrupts.at_once('compiling the sampler'):
      os.kill(os.getpid(), signal.SIGUSR1)
      time.sleep(0.3)
    return {}


def test_a_signal_while_the_monitor_compiles_loses_no_update(step, workdir, monkeypatch):
  codes = []
  monkeypatch.setattr(os, '_exit', codes.append)
  interrupts.install()
  try:
    with pytest.raises(Preempted, match='stopped by SIGUSR1'):
      loop.fit(step, BASE, Inputs(IMAGES, monitor=Compiling()), workdir, CONFIG)
  finally:
    interrupts.uninstall()
  assert not codes and provenance.load_model(workdir, BASE, CONFIG).step == 3
