"""The training state: what a training step changes."""

from typing import Any

import flax
import jax
import jax.numpy as jnp
import optax

Params = Any


@flax.struct.dataclass
class TrainState:
  """Everything about a stage in training that is not determined by its config; checkpointed as a whole.

  Attributes:
    step: updates tried so far, skipped ones included.
    params: the networks in training, by name.
    ema_params: the student's moving averages, one for each of `Recipe.decays`; the first is what is sampled.
    opt_state: the optimizer's, by network.
    skipped: updates that were not made because loss or gradient was not finite.
    skipped_in_a_row: the same, since the last one that was made.
  """

  step: jax.Array
  params: dict[str, Params]
  ema_params: tuple[Params, ...]
  opt_state: dict[str, optax.OptState]
  skipped: jax.Array
  skipped_in_a_row: jax.Array

  @classmethod
  def create(
    cls, params: dict[str, Params], optimizer: optax.GradientTransformation, num_averages: int = 1
  ) -> 'TrainState':
    """The state before the first update. No two leaves share a buffer, so that it can be donated."""
    params = jax.tree.map(lambda p: jnp.array(p, copy=True), params)
    return cls(
      step=jnp.zeros((), jnp.int32),
      params=params,
      ema_params=tuple(jax.tree.map(jnp.copy, params['student']) for _ in range(num_averages)),
      opt_state={name: optimizer.init(network) for name, network in params.items()},
      skipped=jnp.zeros((), jnp.int32),
      skipped_in_a_row=jnp.zeros((), jnp.int32),
    )
