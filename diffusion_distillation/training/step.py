"""The training step, which is the same for all methods."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from diffusion_distillation.networks import conditioning
from diffusion_distillation.training import augment
from diffusion_distillation.training.optimizers import average_weight
from diffusion_distillation.training.packing import Packing
from diffusion_distillation.training.recipe import Recipe
from diffusion_distillation.training.state import Params, TrainState


def train_step(
  recipe: Recipe, state: TrainState, frozen: Mapping[str, Params], batch: Mapping[str, Any]
) -> tuple[TrainState, dict[str, jax.Array]]:
  """Applies one update, or skips it if the loss or a gradient is not finite.

  Args:
    recipe: the stage's constants.
    state: the training state; the compiled step donates its buffers.
    frozen: parameters that are not updated, by network, such as `teacher`.
    batch: `cond`, and `image` (B, H, W, C) uint8 or its encoding `x` (B, ...), and `pairs`, if the method needs them. These
      are global arrays: the loss is the mean over all devices.

  Returns:
    The next state, and scalar metrics.
  """
  loss, metrics, grads = loss_and_gradients(recipe, state, frozen, batch)
  (params, opt_state, ema_params), moved, finite = _apply(recipe, state, loss, grads)
  state = TrainState(
    step=state.step + 1,
    params=params,
    ema_params=ema_params,
    opt_state=opt_state,
    skipped=state.skipped + jnp.where(finite, 0, 1),
    skipped_in_a_row=jnp.where(finite, 0, state.skipped_in_a_row + 1),
  )
  counts = {'skipped': state.skipped, 'skipped_in_a_row': state.skipped_in_a_row}
  return state, metrics | moved | {'loss': loss} | counts


def loss_and_gradients(
  recipe: Recipe, state: TrainState, frozen: Mapping[str, Params], batch: Mapping[str, Any]
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, Params]]:
  """Returns the loss, metrics, and gradients by network; the randomness is a function of (seed, step)."""
  rng = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
  rng_augment, rng_draw, rng_dropout = jax.random.split(rng, 3)
  examples = make_examples(recipe, batch, rng_augment, rng_draw)
  frozen = {**frozen, 'average': state.ema_params[0 if recipe.target_decay is None else -1]}
  return gradients(recipe, state.params, frozen, examples, rng_dropout, state.step)


def make_examples(
  recipe: Recipe, batch: Mapping[str, Any], rng_augment: jax.Array, rng_draw: jax.Array
) -> dict[str, Any]:
  """Returns the batch for the loss: `x` if there are images, `cond`, `pairs`, and the method's random draws."""
  examples = {'cond': batch['cond'], **recipe.method.draw(rng_draw, recipe.shape)}
  if 'x' in batch or 'image' in batch:
    x = batch['x'] if 'x' in batch else recipe.space.encode(batch['image'])
    if recipe.random_flip:
      x = augment.flip(jax.random.fold_in(rng_augment, 0), x)
    if recipe.dequantize:
      x = recipe.space.dequantize(jax.random.fold_in(rng_augment, 1), x)
    examples['x'] = x
  if recipe.cond_dropout:
    rng = jax.random.fold_in(rng_augment, 2)
    examples['cond'] = conditioning.drop(rng, recipe.conditioning, batch['cond'], recipe.cond_dropout)
  rng = jax.random.fold_in(rng_augment, 3)
  examples['cond'] = conditioning.with_weights(
    rng, recipe.conditioning, examples['cond'], recipe.shape[0]
  )
  if 'pairs' in batch:
    examples['pairs'] = batch['pairs']
  return examples


def train_steps(
  recipe: Recipe | tuple[Recipe, ...], state: TrainState, frozen: Mapping[str, Params], batch: Any
) -> tuple[TrainState, Any]:
  """`train_step`, or several of them in one program if `recipe` and `batch` are tuples; the metrics are then a tuple, too."""
  if not isinstance(recipe, tuple):
    return train_step(recipe, state, frozen, batch)
  metrics = []
  for of_this, examples in zip(recipe, batch, strict=True):
    state, found = train_step(of_this, state, frozen, examples)
    metrics.append(found)
  return state, tuple(metrics)


def _apply(
  recipe: Recipe, state: TrainState, loss: jax.Array, grads: Mapping[str, Params]
) -> tuple[tuple[Params, ...], dict[str, jax.Array], jax.Array]:
  """Returns the next (parameters, optimizer states, averages), the norms of gradients and updates, and if all are finite.

  If the loss or a gradient is not finite, nothing changes. Networks without a gradient and their moments do not change
  either, and the averages are only updated when the student has a gradient.
  """
  params, opt_state, averages = {**state.params}, {**state.opt_state}, state.ema_params
  packings = {name: Packing(params[name]) for name in grads}
  packed = {name: packing.pack(grads[name]) for name, packing in packings.items()}
  norms = {name: optax.tree.norm(gradient) for name, gradient in packed.items()}
  scales = recipe.optimizer.scales(norms)
  finite = jnp.isfinite(jnp.array([loss, *norms.values()])).all()

  def advance(networks: dict[str, Any]) -> dict[str, Any]:
    return {
      name: _advance(recipe, name, network, optax.tree.scale(scales[name], packed[name]), state.step)
      for name, network in networks.items()
    }

  def skip(networks: dict[str, Any]) -> dict[str, Any]:
    return {name: (network, jnp.full_like(norms[name], jnp.nan)) for name, network in networks.items()}

  before = {
    name: packing.pack((params[name], opt_state[name], averages if name == 'student' else ()))
    for name, packing in packings.items()
  }
  after = _either(finite, advance, skip, before)
  metrics: dict[str, jax.Array] = {}
  for name, (network, moved) in after.items():
    params[name], opt_state[name], followers = packings[name].unpack(network)
    averages = followers if name == 'student' else averages
    own = '' if name == 'student' else f'{name}_'
    rate = recipe.learning_rate[name](state.step)
    found = {'grad_norm': norms[name], 'update_norm': moved, 'learning_rate': rate}
    metrics |= {f'{own}{key}': value for key, value in found.items()}
  return (params, opt_state, averages), metrics, finite


def _either(chosen: jax.Array, yes: Callable, no: Callable, given: Any) -> Any:
  """Returns yes(given) if `chosen`, else no(given).

  On CPUs this is a branch, because a choice for each array takes longer to compile than the optimizer itself. On other devices
  both are computed, since the host may wait for the device before it starts a branch.
  """
  if jax.default_backend() == 'cpu':
    return jax.lax.cond(chosen, yes, no, given)
  return jax.tree.map(lambda a, b: jnp.where(chosen, a, b), yes(given), no(given))


def _advance(
  recipe: Recipe,
  name: str,
  network: tuple[Any, ...],
  gradient: Any,
  step: jax.Array,
) -> tuple[tuple[Any, ...], jax.Array]:
  """Returns a network's next (parameters, optimizer state, averages), and the norm of its update; the gradient is clipped."""
  params, opt_state, averages = network
  rate = recipe.learning_rate[name](step)
  updates, opt_state = recipe.optimizer.transform().update(gradient, opt_state, params)
  params = jax.tree.map(lambda p, u: p - rate * u, params, updates)
  decays = recipe.decays if averages else ()
  turn = step // recipe.method.period
  averages = tuple(
    optax.incremental_update(params, average, average_weight(decay, recipe.ema_ramp, turn))
    for average, decay in zip(averages, decays, strict=True)
  )
  return (params, opt_state, averages), optax.tree.norm(updates)


def gradients(
  recipe: Recipe,
  params: Mapping[str, Params],
  frozen: Mapping[str, Params],
  batch: Mapping[str, Any],
  rng: jax.Array,
  step: jax.Array,
) -> tuple[jax.Array, dict[str, jax.Array], dict[str, Params]]:
  """Returns the loss, metrics, and gradients by network, averaged over the micro-batches of a batch.

  Of M micro-batches, micro-batch m holds the examples m, m + M, m + 2M, ...: since a batch is split over devices in
  blocks, every device has an equal share of each. Only dropout depends on M.
  """
  count = recipe.micro_batches

  def part(m: jax.Array) -> tuple[tuple[jax.Array, dict[str, jax.Array]], dict[str, Params]]:
    examples = jax.tree.map(lambda a: a.reshape(-1, count, *a.shape[1:])[:, m], dict(batch))
    rng_part = jax.random.fold_in(rng, m)

    def loss(trained: dict[str, Params]) -> tuple[jax.Array, dict[str, jax.Array]]:
      nets = recipe.bind({**frozen, **params, **trained})
      return recipe.method.loss(nets, examples, rng_part, step)

    trained = {name: params[name] for name in recipe.method.trained}
    return jax.value_and_grad(loss, has_aux=True)(trained)

  def add(total: Any, m: jax.Array) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, total, part(m)), None

  first = jnp.array(0)
  if count == 1:
    total = part(first)
  else:
    zeros = jax.tree.map(jnp.zeros_like, jax.eval_shape(part, first))
    # XLA's CPU backend runs convolutions slowly inside loops (jax issue 12868).
    total, _ = jax.lax.scan(add, zeros, jnp.arange(count), unroll=jax.default_backend() == 'cpu')
  (loss, metrics), grads = jax.tree.map(lambda value: value / count, total)
  return loss, metrics, grads
