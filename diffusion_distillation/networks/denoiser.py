"""Networks as denoisers, E[x | z], and networks bound to their parameters, as methods and samplers call them."""

import dataclasses
import functools
from typing import Any, ClassVar, Protocol, Self

import flax
import flax.linen as nn
import jax
import jax.numpy as jnp

from diffusion_distillation.config import key
from diffusion_distillation.diffusion import process
from diffusion_distillation.networks.conditioning import Cond, Conditioning, zeros
from diffusion_distillation.networks.spaces import SPACES

Params = Any
BOTTLENECK = 'bottleneck'  # the collection into which a network sows activations for GAN heads
INNERMOST = 'h'  # the innermost activations in this collection
ENCODED = 'encoded'  # the activations after the encoder, in networks that have one


class Network(Protocol):
  """The interface of a network: a linen module with these members."""

  Section: ClassVar[type]  # its hyper-parameters, which become keys of the config's section `model`

  @property
  def dropout(self) -> float:
    """The dropout rate; 0 for no dropout."""
    ...

  @property
  def conditioning(self) -> Conditioning:
    """The conditions that it takes, by key; empty for an unconditional network."""
    ...

  def check(self, image_shape: tuple[int, ...]) -> None:
    """Raises ValueError, saying what to change, if the network cannot take x of shape (H, W, C)."""
    ...

  def __call__(
    self, z: jax.Array, logsnr: jax.Array, cond: Cond, deterministic: bool = True
  ) -> jax.Array:
    """z: (B, H, W, C); logsnr: (B,). Returns (B, H, W, out_ch). Applies dropout unless `deterministic`."""
    ...


@dataclasses.dataclass(frozen=True)
class ModelSection:
  """The network, what it works on, and what it predicts; then the network's own hyper-parameters."""

  name: str = key('unet', 'Network, a name in `networks.NETWORKS`.')
  space: str = key('pixels', 'What the network works on.', choices=SPACES)
  output: str = key(
    'v',
    "What the network predicts: x, eps, v = alpha eps - sigma x, both x and eps, or F of EDM's preconditioning.",
    choices=process.OUTPUTS,
  )
  conditional: bool = key(False, "Whether the network is conditioned on the dataset's class labels.")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(network: Any, shape: tuple[int, ...], rng: jax.Array) -> Params:
  cond = zeros(network.conditioning, 1)
  return network.init(rng, jnp.zeros((1, *shape)), jnp.zeros((1,)), cond)['params']


@functools.partial(jax.jit, static_argnums=0)
def _apply(
  network: Any, params: Params, z: jax.Array, logsnr: jax.Array, cond: Cond, rng: jax.Array | None
) -> Any:
  """The network's output. A program that calls it several times traces and lowers the network only once."""
  rngs = None if rng is None else {'dropout': rng}
  return network.apply({'params': params}, z, logsnr, cond, rng is None, rngs=rngs)


@dataclasses.dataclass(frozen=True)
class Denoiser:
  """A network as an estimate of E[x | z]. Only this class knows the parameterization.

  Attributes:
    network: a linen module that implements `Network`.
    output: what the network predicts, a name in `process.OUTPUTS`.
  """

  network: Any
  output: str

  def __post_init__(self) -> None:
    if self.output not in process.OUTPUTS:
      raise ValueError(f'model.output={self.output!r} is not one of {sorted(process.OUTPUTS)}')

  @property
  def conditioning(self) -> Conditioning:
    """The conditioning of the network."""
    found: Conditioning = self.network.conditioning
    return found

  def init(self, rng: jax.Array, shape: tuple[int, ...]) -> Params:
    """Initial parameters for x of `shape` (H, W, C)."""
    return _init(self.network, shape, rng)

  def without_dropout(self) -> Self:
    """The same denoiser with a dropout rate of 0; denoisers that differ only in dropout become equal."""
    return dataclasses.replace(self, network=dataclasses.replace(self.network, dropout=0.0))

  def __call__(
    self, params: Params, z: jax.Array, logsnr: jax.Array, cond: Cond, rng: jax.Array | None = None
  ) -> process.Prediction:
    """z: (B, H, W, C); logsnr: (B,). Applies dropout only if `rng` is given."""
    # A student's call and its teacher's only differ in their parameters: both are traced once, without a key that is not used
    # and with the same type of logsnr (jax distinguishes weak types).
    rng = rng if self.network.dropout else None
    at = jax.lax.convert_element_type(logsnr, jnp.result_type(logsnr))
    output = _apply(self.network, params, self._input(z, logsnr), at, cond, rng)
    return process.OUTPUTS[self.output](z, logsnr, output)

  def bottleneck(
    self, params: Params, z: jax.Array, logsnr: jax.Array, cond: Cond, place: str = INNERMOST
  ) -> jax.Array:
    """Returns the activations (B, h, w, c) at `place`, INNERMOST or ENCODED; later layers are not computed."""
    args = ({'params': params}, self._input(z, logsnr), logsnr, cond)
    _, sown = self.network.apply(*args, mutable=[BOTTLENECK])
    return sown[BOTTLENECK][place][0]

  def bottleneck_shape(self, shape: tuple[int, ...], place: str = INNERMOST) -> tuple[int, ...]:
    """Returns (h, w, c) of the activations at `place` for x of `shape`; raises ValueError if the network does not sow them."""
    try:
      return _bottleneck_shape(self, shape, place)
    except KeyError as error:
      raise ValueError(
        f'the network {type(self.network).__name__} has no bottleneck for a GAN (none named {place!r})'
      ) from error

  def _input(self, z: jax.Array, logsnr: jax.Array) -> jax.Array:
    return process.edm_input(z, logsnr) if self.output == 'edm' else z


@functools.lru_cache(maxsize=64)
def _bottleneck_shape(denoise: Denoiser, shape: tuple[int, ...], place: str) -> tuple[int, ...]:
  """See `Denoiser.bottleneck_shape`; raises KeyError if there is no such place."""

  def call(rng: jax.Array) -> jax.Array:
    z, logsnr = jnp.zeros((1, *shape)), jnp.zeros((1,))
    return denoise.bottleneck(denoise.init(rng, shape), z, logsnr, zeros(denoise.conditioning, 1), place)

  found: tuple[int, ...] = jax.eval_shape(call, jax.random.key(0)).shape[1:]
  return found


@dataclasses.dataclass(frozen=True)
class Function:
  """A linen module as a function of its parameters, `function(params, *args)`."""

  module: nn.Module

  def __call__(self, params: Params, *args: Any) -> Any:
    return self.module.apply({'params': params}, *args)


@flax.struct.dataclass
class Bound:
  """A network with its parameters, which are its pytree leaves; called with the remaining arguments.

  `jax.lax.stop_gradient(bound)` is the same network with no gradient to its parameters.
  """

  network: Any = flax.struct.field(pytree_node=False)
  params: Params

  def __call__(self, *args: Any, **kwargs: Any) -> Any:
    return self.network(self.params, *args, **kwargs)

  def bottleneck(self, *args: Any) -> jax.Array:
    """See `Denoiser.bottleneck`."""
    found: jax.Array = self.network.bottleneck(self.params, *args)
    return found
