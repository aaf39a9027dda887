"""The configs of Salimans & Ho (2022), against their hyper-parameters and a count of parameters."""

import importlib
import json
import math

import jax
import numpy as np
import pytest
from flax import serialization

from configs import default, digits_guided
from diffusion_distillation import datasets
from diffusion_distillation.config import check_keys, flatten
from diffusion_distillation.diffusion.guidance import NONE, Guidance, make_guidance
from diffusion_distillation.diffusion.weightings import SnrTrunc
from diffusion_distillation.errors import UserError
from diffusion_distillation.evaluation import rows
from diffusion_distillation.methods import Denoising
from diffusion_distillation.networks.conditioning import Weights, weights
from diffusion_distillation.networks.denoiser import Denoiser
from diffusion_distillation.networks.guidance import Guided, GuidedByExample
from diffusion_distillation.stages import plan as stages
from tests import parity_test, tiny

LSUN = {
  'dataset': 'lsun/bedroom',
  'shape': (128, 128, 3),
  'classes': 0,
  'start': 1024,
  'output': 'both',
  'ch': 64,
  'ch_mult': (1, 2, 4, 6, 8),
  'emb_ch': 768,
  'attn': (8, 16, 32),
  'num_heads': None,
  'head_dim': 64,
  'dropout': 0.1,
  'rate': 3e-4,
  'weight_decay': 0.0,
  'batch': 2048,
}
PAPER = {
  'cifar10': {
    'dataset': 'cifar10',
    'shape': (32, 32, 3),
    'classes': 0,
    'start': 8192,
    'output': 'x',
    'ch': 256,
    'ch_mult': (1, 1, 1),
    'emb_ch': 1024,
    'attn': (8, 16),
    'num_heads': 1,
    'head_dim': None,
    'dropout': 0.2,
    'rate': 2e-4,
    'weight_decay': 0.001,
    'batch': 128,
  },
  'imagenet64': LSUN
  | {
    'dataset': 'imagenet2012',
    'shape': (64, 64, 3),
    'classes': 1000,
    'ch': 192,
    'ch_mult': (1, 2, 3, 4),
  },
  'lsun_bedroom128': LSUN,
  'lsun_church128': LSUN | {'dataset': 'lsun/church_outdoor'},
}
# Updates of a round, and of each of the two last.
ROUNDS = {'': (50_000, 100_000), 'fast': (10_000, 20_000)}


def load(name, variant=''):
  return importlib.import_module(f'configs.{name}').get_config(variant)


def plan(config):
  return stages.plan(config, *datasets.describe(datasets.Settings.of(config.dataset)))


def conv(inputs, outputs):
  return 3 * 3 * inputs * outputs + outputs


def dense(inputs, outputs):
  return inputs * outputs + outputs


def residual(inputs, outputs, emb):
  norms = 2 * inputs + 2 * outputs
  shortcut = dense(inputs, outputs) if inputs != outputs else 0
  return norms + conv(inputs, outputs) + dense(emb, 2 * outputs) + conv(outputs, outputs) + shortcut


def attention(ch):
  return 2 * ch + 4 * dense(ch, ch)


def count(size, channels, out, classes, ch, emb, ch_mult, blocks, attn, resample):
  """Parameters of the released network, layer by layer."""
  widths = [ch * mult for mult in ch_mult]
  at = [attention(width) * (size >> level in attn) for level, width in enumerate(widths)]
  total = dense(ch, emb) + dense(emb, emb) + (dense(classes, emb) if classes else 0)
  total += conv(channels, ch)
  h, skips = ch, [ch]
  for level, width in enumerate(widths):
    for _ in range(blocks):
      total += residual(h, width, emb) + at[level]
      h = width
      skips.append(h)
    if level < len(widths) - 1:
      total += residual(h, h, emb) if resample else conv(h, h)
      skips.append(h)
  total += 2 * residual(h, h, emb) + attention(h)
  for level, width in reversed(list(enumerate(widths))):
    for _ in range(blocks + 1):
      total += residual(h + skips.pop(), width, emb) + at[level]
      h = width
    if level:
      total += residual(h, h, emb) if resample else conv(h, h)
  assert not skips
  return total + 2 * h + conv(h, out)


def size_of(tree):
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize('variant', ROUNDS)
@pytest.mark.parametrize('name', PAPER)
def test_every_stage_is_as_in_the_paper(name, variant):
  paper, config = PAPER[name], load(name, variant)
  check_keys(config, default.get_config())
  assert config.dataset.name == paper['dataset'] and config.evaluation.num_samples == 50_000
  base, *rounds = plan(config)

  assert base.num_steps == paper['start'] and base.parent is None
  assert [stage.num_steps for stage in rounds] == [
    paper['start'] >> k for k in range(1, paper['start'].bit_length())
  ]
  assert [stage.parent for stage in rounds] == [stage.name for stage in [base, *rounds][:-1]]
  usual, last = ROUNDS[variant]
  assert [stage.num_updates for stage in rounds] == [usual] * (len(rounds) - 2) + [last] * 2

  for stage in [base, *rounds]:
    is_base, recipe = stage is base, stage.recipe
    network, rate = recipe.student.network, recipe.learning_rate['student']
    assert stage.batch_size == paper['batch'] and stage.image_shape == paper['shape']
    assert rate.peak == (paper['rate'] if is_base else 1e-4)
    assert (rate.warmup, rate.decay) == ((1000, 'none') if is_base else (0, 'linear'))
    assert rate.num_updates == stage.num_updates
    assert recipe.optimizer.weight_decay == (paper['weight_decay'] if is_base else 0)
    assert (recipe.optimizer.b1, recipe.optimizer.b2, recipe.optimizer.eps) == (0.9, 0.999, 1e-8)
    assert recipe.optimizer.clip_norm == 1 and recipe.random_flip and recipe.micro_batches == 1
    assert recipe.ema_decay == ((0.9999,) if is_base else (0,))
    assert recipe.student.output == paper['output'] and recipe.method.weighting == SnrTrunc()
    assert network.dropout == (paper['dropout'] if is_base else 0)
    assert (network.ch, network.ch_mult, network.num_res_blocks) == (paper['ch'], paper['ch_mult'], 3)
    assert (network.emb_ch, network.num_classes) == (paper['emb_ch'], paper['classes'])
    assert network.attn_resolutions == paper['attn'] and network.resblock_resample
    assert (network.num_heads, network.head_dim) == (paper['num_heads'], paper['head_dim'])
    assert network.time_input == 'inv_cos' and network.num_groups == 32
    schedule = stage.schedule
    assert (type(schedule).__name__, schedule.logsnr_min, schedule.logsnr_max) == ('Cosine', -20, 20)
    if is_base:
      assert isinstance(recipe.method, Denoising) and recipe.method.num_steps == 0
    else:
      assert recipe.method.factor == 2 and stage.parent_weights == 'ema'


@pytest.mark.parametrize('name', PAPER)
def test_the_variant_changes_the_length_of_the_rounds_and_nothing_else(name):
  changed = set(flatten(load(name))) ^ set(flatten(load(name, 'fast')))
  assert {key for key, _ in changed} == {'distill.num_updates'}


@pytest.mark.parametrize('name', ['cifar10', 'imagenet64', 'lsun_bedroom128'])
def test_network_and_optimizer_have_the_sizes_that_the_layer_list_gives(name):
  """By shapes alone: nothing of that size is made."""
  paper, base = PAPER[name], plan(load(name))[0]
  expected = count(
    size=paper['shape'][0],
    channels=3,
    out={'x': 3, 'both': 6}[paper['output']],
    classes=paper['classes'],
    ch=paper['ch'],
    emb=paper['emb_ch'],
    ch_mult=paper['ch_mult'],
    blocks=3,
    attn=paper['attn'],
    resample=True,
  )
  print(f'{name}: {expected:,} parameters')
  state = base.abstract_state
  assert size_of(base.abstract_params) == size_of(state.params) == expected
  assert [size_of(average) for average in state.ema_params] == [expected]
  moments = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.shape]
  assert size_of(moments) == 2 * expected  # Adam's two


def test_the_layer_list_gives_the_size_of_the_released_sample():
  path = parity_test.DATA / 'checkpoint_student'
  recorded = serialization.msgpack_restore(path.read_bytes())['ema_params']
  c = json.loads((parity_test.DATA / 'config.json').read_text())
  expected = count(
    size=c['hw'],
    channels=c['channels'],
    out=c['out_ch'],
    classes=0,
    ch=c['ch'],
    emb=c['emb_ch'],
    ch_mult=c['ch_mult'],
    blocks=c['num_res_blocks'],
    attn=c['attn_resolutions'],
    resample=c['resblock_resample'],
  )
  ours = jax.eval_shape(
    lambda rng: Denoiser(parity_test.network(), 'both').init(rng, (8, 8, 3)), jax.random.key(0)
  )
  assert sum(np.size(leaf) for leaf in jax.tree.leaves(recorded)) == size_of(ours) == expected


def test_the_guided_digits_have_dmd_of_one_weight_and_rounds_of_them_all():
  config = digits_guided.get_config()
  check_keys(config, default.get_config())
  base, dmd, guided, *rounds = stages = plan(config)
  assert [stage.num_steps for stage in stages] == [32, 1, 32, 8, 4]
  assert base.recipe.cond_dropout == 0.1
  teachers = [stage.recipe.networks['teacher'] for stage in stages[1:]]
  assert teachers[:2] == [Guided(base.denoise, Guidance(1.0)), GuidedByExample(base.denoise)]
  assert teachers[2:] == [guided.denoise] * len(rounds)
  assert dmd.name == 'dmd' and dmd.pairs.guidance == Guidance(1.0)
  known = Weights(0.0, 4.0)
  assert [weights(stage.denoise.conditioning) for stage in stages] == [None] * 2 + [known] * 3
  by_weight = tuple(map(make_guidance, (0.0, 0.5, 1.0, 2.0, 4.0)))
  for place, stage in enumerate(stages):
    expected = (NONE,) if stage is dmd else by_weight
    assert rows.guidances(config, place, stage) == expected


def test_the_guided_variant_has_stage_one_before_the_rounds():
  usual, guided = load('imagenet64'), load('imagenet64', 'guided')
  check_keys(guided, default.get_config())
  changed = {key for key, value in flatten(guided) if dict(flatten(usual))[key] != value}
  assert {key for key in changed if not key.startswith('guided.')} == {
    *('dataset.label_dropout', 'methods', 'evaluation.guidance')
  }
  base, student, *rounds = plan(guided)
  assert student.name == 'guided' and student.num_steps == base.num_steps == 1024
  assert student.denoise.network.guidance == (0.0, 4.0) and student.adds_input
  assert [stage.denoise for stage in rounds] == [student.denoise] * 10


def test_an_unknown_variant_is_one_clear_line(tmp_path):
  with pytest.raises(UserError, match=r'variant :quick .*:fast'):
    load('lsun_church128', 'quick')
  code, _, err = tiny.run_cli('--config=configs/cifar10.py:quick', f'--workdir={tmp_path / "run"}')
  assert code == 2 and err.startswith('error: config variant :quick') and err.count('\n') == 1
  assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_variant_reaches_the_plan_from_the_command_line(tmp_path):
  flags = ['--config=configs/cifar10.py:fast', '--mode=plan', '--config.log.measured_updates=0']
  code, _, err = tiny.run_cli(*flags, f'--workdir={tmp_path / "run"}')
  assert code == 0, err
  lines = [line.split() for line in err.splitlines() if ' updates of ' in line and 'progressive' in line]
  assert [line[3] for line in lines[-3:]] == ['10,000', '20,000', '20,000']
  assert lines[0][:2] == ['progressive_4096', '4096'] and not (tmp_path / 'run').exists()
