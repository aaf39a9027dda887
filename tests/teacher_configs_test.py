"""The configs that distill public teachers, against the hyper-parameters of DMD (Yin et al. 2023, appendix)."""

import importlib

import jax
import numpy as np
import pytest

import diffusion_distillation
from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.samplers import DDIM, EdmHeun
from diffusion_distillation.diffusion.times import Uniform
from diffusion_distillation.diffusion.weightings import Edm, Snr
from diffusion_distillation.errors import UserError
from diffusion_distillation.interop import diffusers, edm
from diffusion_distillation.stages import plan, workdir
from tests import edm_cases, peers, tiny
from tests.interop import diffusers_test

CASE = edm_cases.Case('ve_ncsnpp_cond')  # in place of the large ones
# Learning rate, batch size, updates, pairs, steps of a pair, weight of the regression.
PAPER = {
  ('edm_cifar10', ''): (5e-5, 392, 300_000, 500_000, 18, 0.5),
  ('edm_cifar10', 'cond'): (5e-5, 392, 300_000, 100_000, 18, 0.25),
  ('edm_imagenet64', None): (2e-6, 336, 350_000, 25_000, 256, 0.25),
}


def load(name, variant):
  get_config = importlib.import_module(f'configs.{name}').get_config
  return get_config() if variant is None else get_config(variant)


@pytest.mark.parametrize(('name', 'variant'), PAPER)
def test_the_student_is_trained_with_the_paper_s_hyper_parameters(name, variant, tmp_path):
  stored, config = edm.read(CASE.write(tmp_path)), load(name, variant)
  base, student = plan.plan(config, (8, 8, 3), 5, workdir.origin_of(stored))
  rate, batch, updates, pairs, steps, regression = PAPER[name, variant]
  recipe, dmd = student.recipe, student.recipe.method
  assert base.denoise == student.denoise == student.teacher == stored.denoise
  assert [recipe.learning_rate[n].peak for n in ('student', 'fake_score')] == [rate, rate]
  assert (recipe.shape[0], student.num_updates, student.num_steps) == (batch, updates, 1)
  assert recipe.learning_rate['student'].warmup == 500 and recipe.optimizer.weight_decay == 0.01
  assert recipe.optimizer.clip_norm == 10.0 and recipe.optimizer.b2 == 0.999
  assert (student.pairs.count, student.pairs.num_steps) == (pairs, steps)
  assert isinstance(student.pairs.sampler, EdmHeun) and student.pairs.grid == 'karras'
  assert not student.pairs.clip_x and dmd.regression == regression and dmd.fake_updates == 1
  assert (dmd.first_t, dmd.last_t) == (0.02, 0.98) and dmd.weighting == Edm()
  assert dmd.law == Uniform() and dmd.gan is None and dmd.schedule == stored.schedule


def test_the_ddpm_teacher_is_distilled_like_edm_s_but_with_its_own_loss_and_sampler(tmp_path):
  stored = diffusers.read(
    peers.write_pipeline(tmp_path / 'ddpm', peers.read('unet2d_cifar_form')[0]), 50
  )
  config, edm_config = load('ddpm_cifar10', None), load('edm_cifar10', '')
  student = plan.plan(config, (8, 8, 3), 0, workdir.origin_of(stored))[1]
  plan.check_output(student)  # 1 / alpha at t = 1 is far below the limit
  assert student.denoise == student.teacher == stored.denoise and student.denoise.output == 'eps'
  assert student.recipe.method.weighting == Snr() and config.dmd == edm_config.dmd
  pairs = student.pairs
  assert type(pairs.sampler) is DDIM and (pairs.count, pairs.num_steps) == (500_000, 100)
  grid = times.make_grid(pairs.grid, pairs.num_steps, stored.schedule)
  assert grid[-1] == 1.0 and not pairs.clip_x and config.distill.start_steps == 100


def test_an_unknown_variant_is_one_clear_line():
  with pytest.raises(UserError, match='variant :vp is not known'):
    load('edm_cifar10', 'vp')


@pytest.mark.slow
@pytest.mark.parametrize(('source', 'name'), [('edm', 'edm_cifar10'), ('diffusers', 'ddpm_cifar10')])
def test_a_teacher_is_imported_planned_and_distilled(source, name, tmp_path):
  """A few updates of DMD, with pairs, from the files of a small teacher to a student that draws."""
  checkpoint = tmp_path / 'pipeline'
  if source == 'edm':
    checkpoint = CASE.write(tmp_path)
  else:
    diffusers_test.small_pipeline(checkpoint)
  small = {'pairs.num_pairs': 4, 'pairs.batch_size': 4, 'pairs.num_steps': 2, 'dataset.name': 'none'}
  small |= {'dmd.num_updates': 2, 'dmd.batch_size': 8, 'log.health_every': 0}
  flags = [f'--config=configs/{name}.py', f'--workdir={tmp_path / "run"}']
  flags += [f'--config.{key}={value}' for key, value in small.items()]
  for mode in (
    ('--mode=import', f'--source={source}', f'--checkpoint={checkpoint}'),
    ('--mode=plan', '--config.log.measured_updates=0'),
    (),
  ):
    code, _, err = tiny.run_cli(*flags, *mode)
    assert code == 0 and ('--mode=plan' not in mode or 'dmd' in err), err
  teacher, student = (diffusion_distillation.load(tmp_path / 'run' / name) for name in ('base', 'dmd'))
  assert student.stored.denoise == teacher.stored.denoise and student.stored.num_steps == 1
  trees = [jax.tree.leaves(model.stored.params) for model in (teacher, student)]
  assert any(np.any(a != b) for a, b in zip(*trees, strict=True))
  assert student.sample(2).shape == (2, *teacher.stored.image_shape)
