"""However the devices are laid out: the same training, each its share of the memory, one compilation."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from diffusion_distillation.errors import UserError
from diffusion_distillation.networks import lora
from diffusion_distillation.run import monitor
from diffusion_distillation.system import checkpoints, sharding
from diffusion_distillation.training import step as update
from diffusion_distillation.training.lora import Lora
from tests import peer, tiny
from tests.processes_test import assert_same_training

pytestmark = pytest.mark.slow

STAGES, IMAGES = peer.stages_of(('base', *peer.METHODS))
BY_NAME = {stage.name: stage for stage in STAGES}
LAYOUTS = [(1, 1), (2, 1), (1, 2), (4, 1), (2, 2), (1, 4), (8, 1), (4, 2), (2, 4), (1, 8)]


@pytest.fixture
def lay_out(monkeypatch):
  """lay_out(data, fsdp) takes as many devices as that for the rest of the test."""

  def use(data, fsdp):
    mesh = sharding._make(jax.devices()[: data * fsdp], fsdp)
    monkeypatch.setattr(sharding, '_in_use', [mesh])

  return use


@pytest.fixture(scope='module')
def on_eight():
  """What two updates of every stage report on eight devices, all along `data`."""
  return {stage.name: {'told': peer.train(stage, IMAGES)[1]} for stage in STAGES}


@pytest.mark.parametrize('layout', [(8, 1), (2, 4)], ids=str)
def test_every_method_trains_the_same_on_any_layout(lay_out, on_eight, layout):
  lay_out(*layout)
  states = {stage.name: peer.train(stage, IMAGES) for stage in STAGES}
  assert_same_training({name: {'told': told} for name, (_, told) in states.items()}, on_eight)


@pytest.mark.parametrize('layout', LAYOUTS, ids=str)
def test_one_two_four_and_eight_devices_agree(lay_out, on_eight, layout):
  lay_out(*layout)
  found = {'base': {'told': peer.train(BY_NAME['base'], IMAGES)[1]}}
  assert_same_training(found, {'base': on_eight['base']})


@pytest.mark.parametrize('name', ['base', 'progressive_0001'])
def test_a_layout_trains_bit_for_bit_the_same_again(lay_out, name):
  lay_out(2, 4)
  digests = [checkpoints.digest(peer.train(BY_NAME[name], IMAGES)[0]) for _ in range(2)]
  assert digests[0] == digests[1]


@pytest.mark.parametrize('fsdp', [1, 2, 8])
def test_devices_hold_their_share_of_the_state_and_no_more(lay_out, fsdp):
  lay_out(8 // fsdp, fsdp)
  state, _ = peer.train(BY_NAME['dmd2'], IMAGES, updates=1)
  first = jax.devices()[0]
  held = sum(
    shard.data.nbytes
    for leaf in jax.tree.leaves(state)
    for shard in leaf.addressable_shards
    if shard.device == first
  )
  assert held == sharding.bytes_per_device(state)
  arrays = [leaf for leaf in jax.tree.leaves(state) if leaf.ndim > 1]
  split = [leaf for leaf in arrays if leaf.addressable_shards[0].data.size * fsdp == leaf.size]
  # Convolutions from one channel to eight divide by 8; the last one, to one channel, along its inputs.
  assert split == arrays
  bound = sum(leaf.nbytes / fsdp if leaf.ndim > 1 else leaf.nbytes for leaf in jax.tree.leaves(state))
  assert held == bound


def test_adapters_of_split_weights_train_the_same_and_are_split_themselves(lay_out):
  """Generator and fake score adapt the teacher, which is held once."""
  adapted = Lora(4, 0.5, '.*conv.*', (('fake_score', 'teacher'), ('student', 'teacher')))
  stage = BY_NAME['dmd2']
  recipe = dataclasses.replace(stage.recipe, lora=adapted)
  stage = dataclasses.replace(stage, recipe=recipe)
  lay_out(8, 1)
  whole, expected = peer.train(stage, IMAGES)
  lay_out(2, 4)
  split, told = peer.train(stage, IMAGES)
  for one, other in zip(told, expected, strict=True):
    assert one == pytest.approx(other, rel=2e-4)
  down = split.params['fake_score']['conv1']['down']
  assert down.addressable_shards[0].data.size * 4 == down.size
  close = functools.partial(np.testing.assert_allclose, atol=1e-4)
  jax.tree.map(lambda a, b: close(np.asarray(a), np.asarray(b)), split.params, whole.params)
  teacher = peer.params_of(stage)[1]  # the monitor merges them where they are
  held = {'teacher': sharding.place(teacher), 'student': split.params['student']}
  found = monitor._weights(recipe, 'student', held)
  merged = lora.merged_on_host(teacher, sharding.to_host(split.params['student']), 0.5)
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), sharding.to_host(found), merged)


def test_an_array_is_split_along_its_longest_axis_that_divides(lay_out):
  lay_out(2, 4)
  shapes = {(3, 3, 8, 16): 3, (3, 3, 16, 8): 2, (4, 8): 1, (8, 8): 1, (3, 5): None, (8,): None, (): None}
  for shape, axis in shapes.items():
    spec = sharding.of(jax.ShapeDtypeStruct(shape, np.float32)).spec
    assert list(spec) == ([] if axis is None else [*[None] * axis, 'fsdp']), shape


@pytest.mark.parametrize('layout', [(1, 1), (2, 1), (2, 4), (1, 8)], ids=str)
def test_a_checkpoint_of_eight_devices_is_restored_on_any_layout(lay_out, tmp_path, layout):
  stage = BY_NAME['progressive_0001']
  lay_out(4, 2)
  state, _ = peer.train(stage, IMAGES, updates=1)
  expected, like = checkpoints.digest(state), jax.tree.map(jax.typeof, state)
  kept = checkpoints.Checkpoints(tmp_path)
  kept.save(1, state, 7.5)
  kept.close()
  lay_out(*layout)
  restored, seconds = checkpoints.Checkpoints(tmp_path).restore(like, set_aside=False)
  assert (checkpoints.digest(restored), seconds) == (expected, 7.5)
  assert jax.tree.map(lambda leaf: leaf.sharding, restored) == sharding.of(restored)


def test_restored_on_other_devices_training_goes_on_as_before(lay_out, tmp_path):
  """Two updates on eight devices, against one on eight and one on two."""
  stage = BY_NAME['base']
  lay_out(4, 2)
  _, expected = peer.train(stage, IMAGES, updates=2)
  state, told = peer.train(stage, IMAGES, updates=1)
  with_step = checkpoints.Checkpoints(tmp_path)
  with_step.save(1, state, 0.0)
  with_step.close()
  lay_out(1, 2)
  like = jax.tree.map(jax.typeof, state)
  state, _ = checkpoints.Checkpoints(tmp_path).restore(like, set_aside=False)
  step = sharding.compile_step(update.train_steps)
  _, metrics = step(stage.recipe, state, {}, sharding.put(peer.batch_of(stage, IMAGES, 1)))
  told.append({name: float(value) for name, value in metrics.items()})
  for one, other in zip(told, expected, strict=True):
    assert one == pytest.approx(other, rel=2e-5)


def test_several_updates_in_one_program_are_those_one_by_one(lay_out):
  """Of a method whose networks take turns, too."""
  lay_out(4, 2)
  for name in ('base', 'dmd2'):
    stage = BY_NAME[name]
    params, teacher = peer.params_of(stage)
    frozen = sharding.place(stage.frozen(teacher, None))
    batches = [sharding.put(peer.batch_of(stage, IMAGES, k)) for k in range(2)]
    recipes = tuple(stage.recipe.at(stage.recipe.method.period - 2 + k) for k in range(2))
    step = sharding.compile_step(update.train_steps)
    single, told = sharding.create(stage.recipe.create_state, params), []
    for recipe, batch in zip(recipes, batches, strict=True):
      single, metrics = step(recipe, single, frozen, batch)
      told.append(metrics)
    state = sharding.create(stage.recipe.create_state, params)
    state, together = step(recipes, state, frozen, tuple(batches))
    assert int(state.step) == 2
    for one, other in zip(together, told, strict=True):
      assert {k: float(v) for k, v in one.items()} == pytest.approx(
        {k: float(v) for k, v in other.items()}, rel=2e-5, abs=1e-7
      )


@pytest.mark.parametrize(('data', 'fsdp'), [(-1, 3), (3, 2), (8, 2), (-1, 0), (-1, 16), (0, 8)])
def test_a_mesh_that_is_not_the_devices_is_refused(data, fsdp):
  with pytest.raises(
    UserError, match=rf'mesh\.data={data} times mesh\.fsdp={fsdp} is not 8, the number of devices'
  ):
    sharding.laid_out(data, fsdp).__enter__()


@pytest.mark.parametrize('key', ['log.every', 'log.health_every', 'checkpoint.every'])
def test_what_is_due_between_dispatches_is_refused(key):
  from diffusion_distillation.run.run import check_batches

  every = {'log__every': 4, 'log__health_every': 4, 'checkpoint__every': 4}
  config = tiny.config(**every | {key.replace('.', '__'): 6}, compute__updates_per_dispatch=4)
  with pytest.raises(UserError, match=rf'{key}=6 must be a multiple of compute\.updates_per_dispatch=4'):
    check_batches(config)


def test_a_teacher_kept_in_bfloat16_takes_half_and_teaches_nearly_the_same(lay_out, on_eight):
  lay_out(8, 1)
  stage = dataclasses.replace(BY_NAME['progressive_0001'], teacher_dtype='bfloat16')
  kept = stage.frozen(peer.params_of(stage)[1], None)['teacher']
  assert {leaf.dtype.name for leaf in jax.tree.leaves(kept)} == {'bfloat16'}
  _, told = peer.train(stage, IMAGES)
  expected = [metrics['loss'] for metrics in on_eight[stage.name]['told']]
  losses = [metrics['loss'] for metrics in told]
  assert losses == pytest.approx(expected, rel=3e-2) and losses != expected
