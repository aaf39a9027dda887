"""The weight of guidance as an input of every network: where it enters, and what it leaves alone."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from diffusion_distillation.diffusion.discrete import Discrete
from diffusion_distillation.diffusion.guidance import NONE, Guidance
from diffusion_distillation.errors import UserError
from diffusion_distillation.networks import NETWORKS
from diffusion_distillation.networks.conditioning import Classes, Weights
from diffusion_distillation.networks.denoiser import Denoiser
from diffusion_distillation.networks.guidance import (
  Guided,
  adds_input,
  check,
  guide,
  with_input,
  with_new_params,
)
from diffusion_distillation.networks.unet import UNet
from diffusion_distillation.stages import model
from tests.networks.denoiser_test import Small

EDM = {'out_ch': 1, 'ch': 8, 'emb_ch': 16, 'ch_mult': (1,), 'num_res_blocks': 1, 'num_classes': 3}
OF_DIFFUSERS = {'block_out_channels': (8,), 'layers_per_block': 1, 'norm_num_groups': 4}
OF_DIFFUSERS |= {'down_block_types': ('DownBlock2D',), 'up_block_types': ('UpBlock2D',)}
ARGUMENTS = {
  'unet': EDM | {'num_groups': 4},
  'song_unet': EDM,
  'dhariwal_unet': EDM | {'ch': 64},
  'unet2d': {'out_ch': 1, 'num_classes': 3, 'add_attention': False, 'schedule': Discrete()}
  | OF_DIFFUSERS,
}
SHAPE = (4, 4, 1)


def given():
  z = jax.random.normal(jax.random.key(0), (3, *SHAPE))
  return z, jnp.array([-2.0, 0.0, 3.0]), {'label': jnp.array([0, 2, -1])}


def random_params(denoise, seed=0):
  tree = jax.eval_shape(lambda: denoise.init(jax.random.key(0), SHAPE))
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda leaf: np.float32(0.3 * rng.normal(size=leaf.shape)), tree)


@pytest.mark.parametrize(
  'name',
  ['unet', *(pytest.param(name, marks=pytest.mark.slow) for name in ARGUMENTS if name != 'unet')],
)
def test_a_student_with_the_input_starts_as_its_teacher_for_every_weight(name):
  teacher = Denoiser(NETWORKS[name](**ARGUMENTS[name]), 'v')
  student = with_input(teacher, (0.5, 4.0))
  assert student.conditioning == {'label': Classes(3), 'guidance': Weights(0.5, 4.0)}
  assert teacher.conditioning == {'label': Classes(3)} and with_input(student, ()) == teacher
  assert adds_input(student, teacher)
  for other in ((teacher, teacher), (teacher, student), (student, student)):
    assert not adds_input(*other)
  old = random_params(teacher)
  new = student.init(jax.random.key(1), SHAPE)
  params = with_new_params(old, new)
  z, logsnr, cond = given()
  told = cond | {'guidance': jnp.array([0.5, 2.0, 4.0])}
  expected = teacher(old, z, logsnr, cond)
  for one, other in zip(student(params, z, logsnr, told), expected, strict=True):
    np.testing.assert_array_equal(one, other)
  added = set(traverse_util.flatten_dict(params)) - set(traverse_util.flatten_dict(old))
  assert {path[0] for path in added} == {'guidance_emb'}
  jax.tree.map(np.testing.assert_array_equal, params['guidance_emb'], new['guidance_emb'])

  # Once the last layer is not zero, the weight of an example changes its own prediction, and no other's.
  params = with_new_params(old, random_params(student, 1))
  one, other = (
    student(params, z, logsnr, cond | {'guidance': jnp.array(weight)}).x
    for weight in ([0.5, 2.0, 4.0], [0.5, 3.0, 4.0])
  )
  moved = [bool((a != b).any()) for a, b in zip(one, other, strict=True)]
  assert moved == [False, True, False]
  with pytest.raises(ValueError, match='needs `guidance` in cond'):
    student(params, z, logsnr, cond)


def test_networks_without_the_input_are_described_as_they_always_were():
  """So that the stages of older versions go on, and older versions read new ones."""
  network = UNet(**ARGUMENTS['unet'])
  assert 'guidance' not in model.network_arguments(network)
  told = dataclasses.replace(network, guidance=(0.0, 4.0))
  assert model.network_arguments(told) == model.network_arguments(network) | {'guidance': (0.0, 4.0)}


def test_a_network_that_cannot_take_the_weight_says_so():
  with pytest.raises(ValueError, match='the network Small cannot take the weight of guidance'):
    with_input(Denoiser(Small(1, num_classes=3), 'v'), (0.0, 1.0))


def test_a_model_with_the_input_is_not_called_twice_warns_outside_and_refuses_an_interval(caplog):
  denoise = with_input(Denoiser(UNet(**ARGUMENTS['unet']), 'v'), (0.5, 4.0))
  assert guide(denoise, Guidance(2.0)) is denoise
  assert isinstance(guide(with_input(denoise, ()), Guidance(2.0)), Guided)
  told = denoise.conditioning
  for weight in (0.5, 4.0):
    check('--guidance', Guidance(weight), told, 0.0)
  assert not caplog.records
  for guidance in (Guidance(4.5), NONE):
    check('--guidance', guidance, told, 0.0)
    assert 'was trained with weights from 0.5 to 4' in caplog.records[-1].getMessage()
  assert len(caplog.records) == 2
  with pytest.raises(UserError, match=r'^--guidance=2: .* at all noise levels; leave out the interval'):
    check('--guidance', Guidance(2.0, 0.1, 1.0), told, 0.0)


@pytest.mark.parametrize('given', [(1.0, 1.0), (-1.0, 1.0), (2.0, 1.0), (0.0, float('inf'))])
def test_a_range_of_weights_has_a_lower_and_an_upper_end(given):
  with pytest.raises(ValueError, match='0 <= LOW < HIGH'):
    Weights(*given)
