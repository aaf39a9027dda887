"""The updates of the networks beside a base: their learning rate, their bounds, and what happens when they diverge."""

import contextlib
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion_distillation.datasets.loading import Loader
from diffusion_distillation.errors import NumericalError
from diffusion_distillation.run import companion_training
from diffusion_distillation.stages import own_companions
from diffusion_distillation.training import contrastive
from diffusion_distillation.training.optimizers import LearningRate
from tests.run.companion_training_test import config, images


def test_the_value_that_is_shown_is_the_mean_of_the_last_updates():
  def state(step, *values):
    return companion_training.State(None, None, np.int32(step), np.float32(values))

  assert companion_training._mean(state(2, 0, 0, 1, 2)) == 1.5
  assert companion_training._mean(state(9, 3, 0, 1, 2)) == 1.5


@pytest.mark.parametrize(
  'loss',
  [
    lambda w, k: jnp.where(k < 5, w, jnp.nan),  # of the last update, while the parameters stay finite
    lambda w, k: jnp.sqrt(jnp.abs(k - 5.0) * w**2),  # whose last gradient is not a number
  ],
)
def test_a_network_that_diverges_is_one_line_and_its_state_is_not_saved(loss, tmp_path):
  """The share of right answers stays finite all the same."""
  (tmp_path / 'companions').mkdir()
  first = {'w': jnp.array(0.5)}

  def both(params, rng, k):
    return loss(params['w'], k), jnp.ones(())

  def batches(start):
    yield from (np.float32(k) for k in range(start, 6))

  with pytest.raises(
    NumericalError, match=r'text_encoder: the loss is not finite; begin another workdir with a smaller'
  ):
    companion_training._train('text_encoder', config(), tmp_path, both, first, batches, 0, 'accuracy')
  assert list((tmp_path / 'companions').glob('*/checkpoints/4'))
  assert not list((tmp_path / 'companions').glob('*/checkpoints/6'))


def test_short_trainings_reach_their_learning_rate_soon(num_updates=20):
  assert companion_training._learning_rate(2.0, 200) == LearningRate(2.0, 200, 50, 'cosine')
  rates = [float(companion_training._learning_rate(2.0, num_updates)(k)) for k in range(num_updates)]
  assert rates[0] > 0.0 and max(rates) > 1.7 and rates.index(max(rates)) == 4


def test_captions_that_are_cut_are_counted_before_the_training(caplog):
  for length, expected in ((8, []), (5, ['captions, 48 are longer than text_encoder.length=5'])):
    c = config(text_encoder__length=length)
    companion_training._warn_of_cut(own_companions.new_text(c, images(c)), images(c))
    found = [record.getMessage() for record in caplog.records]
    assert len(found) == len(expected) and all(text in found[0] for text in expected)


def test_a_scale_at_its_bound_falls_as_soon_as_the_loss_asks_for_it():
  optimizer, params = optax.sgd(0.5), {'log_scale': jnp.array(4.0)}
  update = companion_training._update(
    lambda params, rng, sign: (sign * params['log_scale'], jnp.zeros(())), optimizer, contrastive.bound
  )
  state = companion_training.State(
    params, optimizer.init(params), jnp.zeros((), jnp.int32), jnp.zeros(2)
  )
  for sign in (-1.0, -1.0, -1.0, -1.0, 1.0):
    state, _ = update(state, jax.random.key(0), sign)
  assert float(state.params['log_scale']) == pytest.approx(math.log(100.0) - 0.5)


def test_the_text_encoder_is_trained_within_the_bound_of_its_scale(tmp_path, monkeypatch):
  c, given = config(), []

  def never(*args):
    given.extend(args)
    raise InterruptedError

  monkeypatch.setattr(companion_training, '_train', never)
  with pytest.raises(InterruptedError), contextlib.closing(Loader(images(c))) as loader:
    companion_training._make_text_encoder(c, tmp_path, loader, images(c))
  assert given[0] == 'text_encoder' and given[-1] is contrastive.bound
