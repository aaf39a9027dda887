import errno
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.system.checkpoints import Checkpoints, digest
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
