import errno
import json
import pathlib
import shutil
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.system import checkpoints as checkpoints_module
from diffusion_distillation.system import sharding
from diffusion_distillation.system.checkpoints import Checkpoints, digest
from diffusion_distillation.system.checksum import checksum
from diffusion_distillation.system.files import read_json, write_json


def state_at(step):
  key = jax.random.key(step)
  return {
    'step': jnp.int32(step),
    'w': jax.random.normal(key, (40, 30)),
    'b': {'c': jnp.zeros(3) + step},
  }


LIKE = jax.eval_shape(lambda: state_at(0))


@pytest.fixture(scope='module')
def pristine(tmp_path_factory):
  """A stage directory with checkpoints of steps 1 and 2."""
  stage_dir = tmp_path_factory.mktemp('stage')
  checkpoints = Checkpoints(stage_dir)
  for step in (1, 2):
    checkpoints.save(step, state_at(step), seconds=10.0 * step)
  checkpoints.close()
  return stage_dir


@pytest.fixture
def stage_dir(pristine, tmp_path):
  return pathlib.Path(shutil.copytree(pristine, tmp_path / 'stage'))


def assert_same(tree, other):
  jax.tree.map(np.testing.assert_array_equal, tree, other)


def test_the_newest_comes_back_bit_for_bit_with_its_seconds(stage_dir):
  state, seconds = Checkpoints(stage_dir).restore(LIKE, set_aside=True)
  assert_same(state, state_at(2))
  assert seconds == 20.0


def test_nothing_there_is_none(tmp_path):
  assert Checkpoints(tmp_path).restore(LIKE, set_aside=True) is None
  assert not list(tmp_path.iterdir())


def test_only_two_are_kept(stage_dir):
  checkpoints = Checkpoints(stage_dir)
  for step in (3, 4):
    checkpoints.save(step, state_at(step), 0.0)
  checkpoints.close()
  assert checkpoints.steps() == [3, 4]


def files_of(stage_dir, step):
  root = stage_dir / 'checkpoints' / str(step)
  return sorted(path for path in root.rglob('*') if path.is_file())


def truncate(path):
  path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flip(path):
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 0x10
  path.write_bytes(bytes(content))


@pytest.mark.parametrize(
  'damage', [truncate, flip, pathlib.Path.unlink], ids=['truncated', 'flipped', 'missing']
)
def test_damage_to_any_file_never_gives_wrong_values(pristine, tmp_path, damage, caplog):
  """Whatever file is hit: either it did not matter, or it is named and the one before is used."""
  noticed = 0
  for k, original in enumerate(files_of(pristine, 2)):
    if original.stat().st_size == 0 and damage is not pathlib.Path.unlink:
      continue
    stage_dir = shutil.copytree(pristine, tmp_path / str(k))
    damage(stage_dir / original.relative_to(pristine))
    caplog.clear()
    state, _ = Checkpoints(stage_dir).restore(LIKE, set_aside=True)
    step = int(state['step'])
    assert_same(state, state_at(step))
    if step == 1:
      noticed += 1
      assert str(stage_dir / 'checkpoints' / '2') in caplog.text
      assert Checkpoints(stage_dir).steps() == [1]
      assert (stage_dir / 'damaged' / '2').is_dir()
  assert noticed >= 3


def test_a_flipped_byte_in_the_arrays_is_noticed(stage_dir):
  largest = max(files_of(stage_dir, 2), key=lambda path: path.stat().st_size)
  flip(largest)
  state, seconds = Checkpoints(stage_dir).restore(LIKE, set_aside=True)
  assert (int(state['step']), seconds) == (1, 10.0)


def test_seconds_that_were_changed_are_noticed(stage_dir):
  """Nothing else in the checkpoint depends on them."""
  path = stage_dir / 'checkpoints' / '2' / '_CHECKPOINT_METADATA'
  text = path.read_text()
  assert text.count('20.0') == 1
  path.write_text(text.replace('20.0', '90.0'))
  state, seconds = Checkpoints(stage_dir).restore(LIKE, set_aside=False)
  assert seconds == 10.0 and int(state['step']) == 1


def test_the_damaged_step_can_be_written_again(stage_dir):
  checkpoints = Checkpoints(stage_dir)
  checkpoints.save(3, state_at(3), 30.0)
  checkpoints.wait()
  truncate(max(files_of(stage_dir, 3), key=lambda path: path.stat().st_size))
  assert int(checkpoints.restore(LIKE, set_aside=True)[0]['step']) == 2
  checkpoints.save(3, state_at(3), 30.0)
  checkpoints.close()
  assert_same(Checkpoints(stage_dir).restore(LIKE, set_aside=True)[0], state_at(3))


def test_a_state_of_another_structure_is_no_damage(stage_dir):
  other = jax.eval_shape(lambda: state_at(0) | {'more': jnp.zeros(2)})
  with pytest.raises(UserError, match='another version'):
    Checkpoints(stage_dir).restore(other, set_aside=True)
  assert Checkpoints(stage_dir).steps() == [1, 2]


def test_all_damaged_is_none_and_nothing_is_lost(stage_dir):
  for step in (1, 2):
    flip(max(files_of(stage_dir, step), key=lambda path: path.stat().st_size))
  assert Checkpoints(stage_dir).restore(LIKE, set_aside=True) is None
  assert sorted(path.name for path in (stage_dir / 'damaged').iterdir()) == ['1', '2']


def test_reading_only_changes_nothing(stage_dir):
  flip(max(files_of(stage_dir, 2), key=lambda path: path.stat().st_size))
  before = sorted(stage_dir.rglob('*'))
  assert int(Checkpoints(stage_dir).restore(LIKE, set_aside=False)[0]['step']) == 1
  assert sorted(stage_dir.rglob('*')) == before


def test_an_empty_directory_is_no_checkpoint(stage_dir):
  (stage_dir / 'checkpoints' / '7').mkdir()
  assert int(Checkpoints(stage_dir).restore(LIKE, set_aside=True)[0]['step']) == 2


def test_leftovers_of_a_killed_save_are_ignored_and_removed(stage_dir):
  leftover = stage_dir / 'checkpoints' / '3.orbax-checkpoint-tmp'
  shutil.copytree(stage_dir / 'checkpoints' / '2', leftover)
  checkpoints = Checkpoints(stage_dir)
  assert int(checkpoints.restore(LIKE, set_aside=True)[0]['step']) == 2
  checkpoints.save(3, state_at(3), 0.0)
  checkpoints.close()
  assert not leftover.exists() and checkpoints.steps() == [2, 3]


def test_digest_sees_values_names_types_and_shapes():
  tree = {'a': np.zeros((2, 3), np.float32)}
  others = [
    {'a': np.array([[0, 0, 0], [0, 0, 1e-45]], np.float32)},
    {'b': np.zeros((2, 3), np.float32)},
    {'a': np.zeros((2, 3), np.int32)},
    {'a': np.zeros((3, 2), np.float32)},
  ]
  assert digest(tree) == digest({'a': jnp.zeros((2, 3))})
  assert digest(tree) not in [digest(other) for other in others]


def test_a_checksum_sees_values_places_names_types_and_shapes():
  tree = {
    'a': jnp.arange(6.0).reshape(2, 3),
    'b': jnp.ones(2, jnp.bool_),
    'c': jnp.ones(2, jnp.bfloat16),
  }
  others = [
    {'a': jnp.arange(6.0).reshape(3, 2)},
    {'a': jnp.arange(6.0).reshape(2, 3).at[0, 0].set(1e-45)},
    {'a': jnp.arange(6.0)[jnp.array([1, 0, 2, 3, 4, 5])].reshape(2, 3)},
    {'a': jnp.arange(6).reshape(2, 3)},
    {'b': jnp.array([True, False])},
    {'c': jnp.array([1, 1 + 2**-7], jnp.bfloat16)},
    {'c': jnp.ones(2, jnp.float16)},
  ]
  found = [checksum(tree), *(checksum(tree | other) for other in others)]
  found.append(checksum({'x': tree['a'], 'b': tree['b'], 'c': tree['c']}))
  assert len(set(found)) == len(found)


def test_a_checksum_is_the_same_however_arrays_are_split(monkeypatch):
  tree = {'a': np.random.default_rng(0).normal(size=(16, 24)).astype(np.float32), 'b': np.arange(8)}
  expected = checksum(jax.tree.map(jnp.asarray, tree))
  for fsdp in (1, 2, 8):
    monkeypatch.setattr(sharding, '_in_use', [sharding._make(jax.devices(), fsdp)])
    assert checksum(sharding.place(jax.tree.map(jnp.asarray, tree))) == expected


@pytest.fixture
def several(monkeypatch):
  """Checkpoints are written as several processes do."""
  monkeypatch.setattr(sharding, 'part', lambda: (0, 2))


def test_several_processes_save_a_checksum_and_gather_nothing(tmp_path, several, monkeypatch):
  monkeypatch.setattr(sharding, '_in_use', [sharding._make(jax.devices(), 8)])
  with monkeypatch.context() as patch:
    patch.setattr(sharding, 'to_host', None)
    for step in (1, 2):
      saver = Checkpoints(tmp_path)
      saver.save(step, sharding.place(state_at(step)), 1.0 * step)
      saver.close()
  for fsdp in (1, 2, 8):
    monkeypatch.setattr(sharding, '_in_use', [sharding._make(jax.devices(), fsdp)])
    assert_same(Checkpoints(tmp_path).restore(LIKE, set_aside=False)[0], state_at(2))
  path = tmp_path / 'checkpoints' / '2' / '_CHECKPOINT_METADATA'
  known = json.loads(path.read_text())['custom_metadata']
  assert known['checksum'] == checksum(state_at(2)) and 'sha256' not in known
  flip(max(files_of(tmp_path, 2), key=lambda path: path.stat().st_size))
  assert int(Checkpoints(tmp_path).restore(LIKE, set_aside=False)[0]['step']) == 1


def test_a_checksum_that_is_not_that_of_the_arrays_is_noticed(tmp_path, several, monkeypatch):
  """Orbax finds nothing wrong."""
  monkeypatch.setattr(checkpoints_module, 'checksum', lambda _: '0' * 16)
  saver = Checkpoints(tmp_path)
  saver.save(1, state_at(1), 0.0)
  saver.close()
  monkeypatch.undo()
  assert Checkpoints(tmp_path).restore(LIKE, set_aside=False) is None


def test_the_state_is_digested_and_written_in_the_background(tmp_path, monkeypatch):
  """The next update may take the state's memory meanwhile: what is saved is a copy."""
  gate, compute, threads = threading.Event(), digest, []

  def slow(tree):
    threads.append(threading.current_thread())
    assert gate.wait(20)
    return compute(tree)

  monkeypatch.setattr(checkpoints_module, 'digest', slow)
  state, saver = jax.tree.map(jnp.copy, state_at(5)), Checkpoints(tmp_path)
  saver.save(5, state, 1.0)  # returns, though the digest waits
  jax.tree.map(lambda leaf: leaf.delete(), state)
  assert not saver.steps()
  gate.set()
  saver.wait()
  assert threading.main_thread() not in threads and saver.steps() == [5]
  saver.close()
  assert_same(Checkpoints(tmp_path).restore(LIKE, set_aside=False)[0], state_at(5))


@pytest.mark.timeout(60)  # the test is that it does not wait for ever
def test_two_stages_may_save_at_once(tmp_path):
  """As a stage does while an update that was not finite is kept."""
  for step in range(1, 6):
    savers = [Checkpoints(tmp_path / name) for name in 'abcd']
    for saver in savers:
      saver.stage_dir.mkdir(exist_ok=True)
      saver.save(step, state_at(step), 1.0)
    for saver in savers:
      saver.close()
  for name in 'abcd':
    assert_same(Checkpoints(tmp_path / name).restore(LIKE, set_aside=False)[0], state_at(5))


def test_json_that_is_damaged_is_named(tmp_path):
  path = tmp_path / 'x.json'
  write_json(path, {'a': [1, 2]})
  assert read_json(path) == {'a': [1, 2]}
  for damage in (
    truncate,
    lambda path: path.write_text('null'),
    lambda path: path.write_bytes(b'\xff{}'),
  ):
    damage(path)
    with pytest.raises(DamagedError, match=r'x\.json is damaged'):
      read_json(path)


def test_json_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
  path, write = tmp_path / 'x.json', pathlib.Path.write_text
  write_json(path, {'a': 1})

  def full(self, text):
    write(self, text[: len(text) // 2])
    raise OSError(errno.ENOSPC, 'no space left')

  monkeypatch.setattr(pathlib.Path, 'write_text', full)
  with pytest.raises(OSError, match='no space left'):
    write_json(path, {'a': 2})
  assert read_json(path) == {'a': 1}
