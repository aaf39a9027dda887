"""What a run may find changed in its workdir, and what it may not."""

import dataclasses
import json

import numpy as np
import pytest

from configs import default
from diffusion_distillation.errors import DamagedError, UserError
from diffusion_distillation.stages import comparison
from diffusion_distillation.stages import workdir as workdirs
from tests import tiny

IMAGES = tiny.plan()[1].images


def made_with(**changes):
  return json.loads(tiny.config(**changes).to_json())


def test_other_images_of_the_same_number_are_refused(tmp_path):
  workdirs.claim_images(tmp_path, IMAGES)
  workdirs.check_images(tmp_path, IMAGES)
  other = dataclasses.replace(IMAGES, identity='0' * 64)
  with pytest.raises(UserError, match='began with other images'):
    workdirs.check_images(tmp_path, other)


def test_labels_are_counted_once_and_kept_beside_the_images(tmp_path, monkeypatch):
  assert workdirs.label_counts(tmp_path) == ()
  counted = []
  real = type(IMAGES).label
  monkeypatch.setattr(type(IMAGES), 'label', lambda self, k: counted.append(k) or real(self, k))
  expected = tuple(np.bincount(IMAGES.labels).tolist())
  assert len(set(expected)) > 1
  assert workdirs.count_labels(tmp_path, IMAGES) == expected and not list(tmp_path.iterdir())
  counted.clear()
  workdirs.claim_images(tmp_path, IMAGES)
  assert workdirs.label_counts(tmp_path) == ()
  for _ in range(2):
    assert workdirs.count_labels(tmp_path, IMAGES) == workdirs.label_counts(tmp_path) == expected
    workdirs.claim_images(tmp_path, IMAGES)
  assert counted == list(range(len(IMAGES)))


@pytest.mark.parametrize('counts', ['"many"', '[1, -1]', '[0.5]', 'null'])
def test_damaged_counts_are_named(tmp_path, counts):
  (tmp_path / 'dataset.json').write_text(f'{{"label_counts": {counts}}}')
  with pytest.raises(DamagedError, match=r'dataset.json is damaged \(label_counts='):
    workdirs.label_counts(tmp_path)


def test_a_value_that_made_a_stage_may_not_change(tmp_path):
  path = tmp_path / 'config.json'
  for key in ('train__learning_rate', 'distill__start_steps', 'model__ch', 'seed', 'weighting'):
    value = 'snr' if key == 'weighting' else 48
    with pytest.raises(UserError, match=key.replace('__', r'\.')):
      comparison.check_config(path, made_with(), tiny.config(**{key: value}))


def test_what_only_measures_logs_or_lays_out_may_change(tmp_path):
  changes = {'evaluation__num_samples': 7, 'log__every': 3, 'checkpoint__every': 2, 'mesh__fsdp': 2}
  changes |= {'methods': ('dmd',), 'dataset__workers': 1, 'compute__remat': True, 'max_skipped': 7}
  comparison.check_config(tmp_path / 'config.json', made_with(), tiny.config(**changes))


def test_a_students_section_may_change_under_all_stages_but_its_own(tmp_path):
  path, changed = tmp_path / 'stage.json', tiny.config(dmd__learning_rate=0.5)
  for stage in ('', 'base', 'knowledge'):
    comparison.check_config(path, made_with(), changed, stage)
  with pytest.raises(UserError, match=r'dmd\.learning_rate'):
    comparison.check_config(path, made_with(), changed, 'dmd')


def test_rounds_may_be_tuned_after_the_base_and_each_knows_its_own_numbers(tmp_path):
  """Rounds to 16, 8, 4, 2 and 1 steps; the last entry of a tuple is the last round's."""
  path = tmp_path / 'stage.json'
  old = {'distill__start_steps': 32, 'distill__num_updates': (5, 7), 'distill__factor': (2,)}
  changed = tiny.config(**old | {'distill__num_updates': (5, 4, 7)})
  for stage in ('', 'base', 'dmd', 'progressive_0016', 'progressive_0004', 'progressive_0001'):
    comparison.check_config(path, made_with(**old), changed, stage)
  with pytest.raises(UserError, match=r'distill\.num_updates was 5, is 4'):
    comparison.check_config(path, made_with(**old), changed, 'progressive_0002')
  with pytest.raises(UserError, match=r'distill\.factor was 2, is 4'):
    quarters = tiny.config(**old | {'distill__factor': (4, 2, 2, 2)})
    comparison.check_config(path, made_with(**old), quarters, 'progressive_0008')
  for key, value in (('batch_size', 48), ('decay', 'none')):
    other = tiny.config(**old | {f'distill__{key}': value})
    comparison.check_config(path, made_with(**old), other, 'base')
    with pytest.raises(UserError, match=f'distill.{key}'):
      comparison.check_config(path, made_with(**old), other, 'progressive_0016')


@pytest.mark.parametrize(
  ('stage', 'key', 'old', 'new'),
  [
    ('', 'train', 12, 13),
    ('base', 'train', 12, 13),
    ('dmd', 'dmd', 12, 13),
    ('progressive_0001', 'distill', (5, 7), (5, 8)),
  ],
)
def test_the_updates_of_a_stage_may_grow_and_not_shrink(tmp_path, stage, key, old, new):
  path, key = tmp_path / 'stage.json', f'{key}__num_updates'
  shorter, longer = {key: old}, {key: new}
  comparison.check_config(path, made_with(**shorter), tiny.config(**longer), stage)
  with pytest.raises(UserError, match='num_updates was'):
    comparison.check_config(path, made_with(**longer), tiny.config(**shorter), stage)
  if stage == 'base':  # of which all others are made
    with pytest.raises(UserError, match=r'train\.num_updates was 12, is 13'):
      comparison.check_config(path, made_with(**shorter), tiny.config(**longer), 'dmd')


def test_a_run_that_ended_at_several_steps_may_go_on_to_one(tmp_path):
  ended = {'distill__start_steps': 8, 'distill__end_steps': 2, 'distill__num_updates': (5,)}
  further = tiny.config(**ended | {'distill__end_steps': 1, 'distill__num_updates': (5, 9)})
  for stage in ('', 'base', 'progressive_0004', 'progressive_0002'):
    comparison.check_config(tmp_path / 'stage.json', made_with(**ended), further, stage)


def test_the_steps_that_a_consistency_student_is_measured_in_may_change(tmp_path):
  changed = tiny.config(consistency__sample_steps=(1, 3))
  for stage in ('', 'base', 'consistency'):
    comparison.check_config(tmp_path / 'stage.json', made_with(), changed, stage)
  with pytest.raises(UserError, match=r'consistency\.end_intervals'):
    other = tiny.config(consistency__end_intervals=77)
    comparison.check_config(tmp_path / 'stage.json', made_with(), other, 'consistency')


@pytest.mark.parametrize(('target', 'decay'), [('ema', 0.9), ('last', 0.0)])
def test_a_target_of_an_older_version_is_the_decay_that_it_was(tmp_path, target, decay):
  averages = {'consistency__ema_decay': (0.9, 0.5)}
  older = made_with(**averages)
  del older['consistency']['target_decay']
  older['consistency']['target'] = target
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(older))
  same = tiny.config(**averages, consistency__target_decay=decay)
  assert workdirs.read_config(tmp_path, tiny.config()).to_json() == same.to_json()
  for stage in ('', 'base', 'consistency'):
    comparison.check_config(path, older, same, stage)
  other = tiny.config(**averages, consistency__target_decay=0.7)
  with pytest.raises(UserError, match=rf'consistency\.target_decay was {decay}, is 0\.7'):
    comparison.check_config(path, older, other, 'consistency')


def test_keys_that_an_older_version_did_not_have_are_not_compared(tmp_path):
  older = made_with()
  del older['weighting']
  comparison.check_config(tmp_path / 'config.json', older, tiny.config())
  newer = made_with() | {'of_a_newer_version': 1}
  with pytest.raises(UserError, match='of_a_newer_version was 1, is absent'):
    comparison.check_config(tmp_path / 'config.json', newer, tiny.config())


NEW = [f'{name}.{key}' for name in ('dmd', 'dmd2') for key in ('fake_law', 'fake_weighting', 'clip_x')]
NEW += ['distill.weighting', 'pairs.clip_x', 'pairs.labels']
NEW += [
  f'{name}.{key}'
  for name in ('dmd', 'dmd2')
  for key in ('gan_first_t', 'gan_last_t', 'gan_head', 'joint_clip')
]


def made_before(**changes):
  """A config of the version that lacked these keys: the base's keys and `evaluation.clip_x` stood for them."""
  config = made_with(**changes)
  for key in NEW:
    section, name = key.split('.')
    del config[section][name]
  return config


LOGNORMAL = {'time__law': 'lognormal', 'schedule__name': 'karras', 'weighting': 'edm'}
UNCLIPPED = {'evaluation__clip_x': False, 'dmd2__num_steps': 2}
NO_GAN = {'dmd2__gan_generator': 0.0, 'dmd2__gan_fake': 0.0}
AS_SCORES = {'dmd2__gan_first_t': 0.02, 'dmd2__gan_last_t': 0.98}
STAGES = ('', 'base', 'progressive_0002', 'dmd', 'dmd2')


@pytest.mark.parametrize(
  'changes', [NO_GAN, AS_SCORES, AS_SCORES | {'weighting': 'snr', 'evaluation__clip_x': False}], ids=str
)
def test_an_older_workdir_goes_on_where_the_new_keys_train_as_before(tmp_path, changes):
  for stage in STAGES:
    for config in (tiny.config(**changes), tiny.config(**changes, dmd__fake_law='base')):
      comparison.check_config(tmp_path / 'stage.json', made_before(**changes), config, stage)


@pytest.mark.parametrize(
  ('stage', 'changes', 'message', 'as_before'),
  [
    ('dmd', LOGNORMAL, r'dmd\.fake_law was base \(lognormal\), is uniform', {'dmd__fake_law': 'base'}),
    ('dmd2', UNCLIPPED | NO_GAN, r'dmd2\.clip_x was False, is True', {'dmd2__clip_x': False}),
    ('dmd2', {}, r'gan_first_t was 0\.02, is 0\.0; dmd2\.gan_last_t was 0\.98', AS_SCORES),
    ('dmd', {}, r'dmd\.joint_clip was False, is True', {'dmd__joint_clip': False}),
  ],
)
def test_an_older_student_that_would_be_trained_in_another_way_now_is_refused(
  tmp_path, stage, changes, message, as_before
):
  path, made = tmp_path / 'stage.json', made_before(**changes)
  joint = {'dmd__joint_clip': True} if 'joint_clip' in message else {}
  with pytest.raises(UserError, match=message):
    comparison.check_config(path, made, tiny.config(**changes, **joint), stage)
  comparison.check_config(path, made, tiny.config(**changes, **as_before), stage)
  for other in STAGES[:3]:
    comparison.check_config(path, made, tiny.config(**changes), other)


def test_the_config_of_an_older_workdir_says_how_it_was_trained(tmp_path):
  path = tmp_path / 'config.json'
  path.write_text(json.dumps(made_before(**LOGNORMAL, **UNCLIPPED)))
  found = workdirs.read_config(tmp_path, default.get_config())
  assert found.dmd.fake_law == found.dmd2.fake_law == 'base' == found.distill.weighting
  assert not found.pairs.clip_x and not found.dmd2.clip_x
  assert found.pairs.labels == 'balanced'
  assert (found.dmd2.gan_first_t, found.dmd2.gan_last_t) == (0.02, 0.98)
  path.write_text(json.dumps(made_with(**LOGNORMAL)))
  assert workdirs.read_config(tmp_path, default.get_config()).dmd.fake_law == 'uniform'


def test_a_weighting_that_is_the_base_s_under_another_name_is_no_change(tmp_path):
  path, made = tmp_path / 'stage.json', made_with(weighting='snr')
  for stage, key in (('progressive_0002', 'distill__weighting'), ('dmd', 'dmd__fake_weighting')):
    comparison.check_config(path, made, tiny.config(**{'weighting': 'snr', key: 'snr'}), stage)
    with pytest.raises(UserError, match=r'weighting was base \(snr\), is edm'):
      comparison.check_config(path, made, tiny.config(**{'weighting': 'snr', key: 'edm'}), stage)
