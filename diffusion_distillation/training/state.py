"""The training state, which each training step updates."""

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
    step: number of updates so far, including skipped ones.
    params: parameters of the networks in training, by name.
    ema_params: the student's moving averages, one for each of `Recipe.decays`; samples are drawn with the first one.
    opt_state: optimizer states, by network.
    skipped: number of updates that were skipped because the loss or a gradient was not finite.
    skipped_in_a_row: number of skipped updates since the last one that was applied.
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
    """Returns the state before the first update. No two leaves share a buffer, so that the state can be donated."""
    params = jax.tree.map(lambda p: jnp.array(p, copy=True), params)
    return cls(
      step=jnp.zeros((), jnp.int32),
      params=params,
      ema_params=tuple(jax.tree.map(jnp.copy, params['student']) for _ in range(num_averages)),
      opt_state={name: optimizer.init(network) for name, network in params.items()},
      skipped=jnp.zeros((), jnp.int32),
      skipped_in_a_row=jnp.zeros((), jnp.int32),
    )
