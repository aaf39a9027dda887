"""Networks with sharded parameters (fully sharded data parallelism; Rajbhandari et al. 2020, ZeRO stage 3).

Each parameter is gathered where a layer reads it and dropped afterwards. The backward pass gathers it again and
scatters its gradient, so that no device holds a whole network at any time, as long as the compiler schedules for memory.
Parameters that a layer computes with in bfloat16 are converted first, which halves what is sent.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.extend import core

Params = Any


@dataclasses.dataclass(frozen=True)
class Gathered:
  """A network that is called with sharded parameters. All other attributes are those of `network`.

  Attributes:
    network: called as network(params, x, ...).
    whole: the sharding of a parameter that every device holds completely.
    part: returns the sharding of a parameter of a given shape between its uses.
  """

  network: Any
  whole: jax.sharding.Sharding
  part: Callable[[tuple[int, ...]], jax.sharding.Sharding]

  def __call__(self, params: Params, *args: Any, **kwargs: Any) -> Any:
    return self._call(self.network, params, *args, **kwargs)

  def __getattr__(self, name: str) -> Any:
    return getattr(self.network, name)

  def bottleneck(self, params: Params, *args: Any) -> jax.Array:
    found: jax.Array = self._call(self.network.bottleneck, params, *args)
    return found

  def _call(
    self, function: Callable[..., Any], params: Params, x: jax.Array, *args: Any, **kwargs: Any
  ) -> Any:
    types = read_types(lambda params: function(params, x, *args, **kwargs), params)

    def call(params: Params, x: jax.Array) -> Any:
      return function(self._gather(params, types), x, *args, **kwargs)

    # Without the barrier, the compiler may keep gathered parameters in memory from one call to the next.
    params, x = jax.lax.optimization_barrier((params, x))
    params = jax.lax.with_sharding_constraint(params, self._parts(params))  # for the backward pass, too
    return jax.checkpoint(call, policy=_is_kept)(params, x)

  def _parts(self, params: Params) -> Any:
    return jax.tree.map(lambda leaf: self.part(leaf.shape), params)

  def _gather(self, params: Params, types: Any) -> Params:
    parts = self._parts(params)

    @jax.custom_vjp
    def gather(params: Params) -> Params:
      narrow = jax.tree.map(lambda leaf, dtype: leaf.astype(dtype), params, types)
      narrow = jax.lax.with_sharding_constraint(narrow, parts)  # or conversion might follow gathering
      return jax.lax.with_sharding_constraint(narrow, self.whole)

    def scatter(_: None, grads: Params) -> tuple[Params]:
      # The sum over examples is left sharded: a reduce-scatter instead of an all-reduce.
      grads = jax.lax.with_sharding_constraint(grads, parts)
      return (jax.tree.map(lambda grad, leaf: grad.astype(leaf.dtype), grads, params),)

    gather.defvjp(lambda params: (gather(params), None), scatter)
    return gather(params)


def _is_kept(primitive: Any, *_: Any, **__: Any) -> bool:
  """Whether the backward pass reuses a primitive's result instead of computing it again; false only for gathered parameters."""
  return primitive.name not in ('custom_vjp_call', 'sharding_constraint')


def read_types(function: Callable[[Params], Any], params: Params) -> Any:
  """Returns the type that each parameter is read in: a narrower one if `function` only ever converts it to that, else its own."""
  jaxpr = jax.make_jaxpr(function)(params).jaxpr
  inputs: list[Any] = jaxpr.invars[-len(jax.tree.leaves(params)) :]
  types = [_narrower(_uses(jaxpr, var), var.aval.dtype) for var in inputs]
  return jax.tree.unflatten(jax.tree.structure(params), types)


def _narrower(types: set[np.dtype], own: np.dtype) -> np.dtype:
  """The only one of `types`, if it is narrower than `own`; else `own`."""
  only = types.pop() if len(types) == 1 else own
  return only if only.itemsize < own.itemsize else own


def _uses(jaxpr: core.Jaxpr, var: Any) -> set[np.dtype]:
  """Returns the types that `var` is read in: the target of each conversion, and its own type for every other use."""
  found = {var.aval.dtype} if var in jaxpr.outvars else set()
  for equation in jaxpr.eqns:
    for k in [k for k, other in enumerate(equation.invars) if other is var]:
      inner = equation.params.get('jaxpr')
      inner = getattr(inner, 'jaxpr', inner)
      if equation.primitive.name == 'convert_element_type':
        found.add(np.dtype(equation.params['new_dtype']))
      elif inner is not None and len(inner.invars) == len(equation.invars):  # of a jitted function
        found |= _uses(inner, inner.invars[k])
      else:
        found.add(var.aval.dtype)
  return found
