"""Conditioning: the inputs of a network other than z and the time.

A `Cond` is None or a dict of arrays with a leading batch axis, by key, such as `label`. A network declares the keys that it
takes as a `Conditioning`; only networks and datasets know what a key means. Beside a key such as `text`, `no_text` may hold the
values that represent "no condition", for conditions whose class does not know them; networks do not read it.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distillation.errors import UserError

Cond = Mapping[str, Any] | None
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / phi
_SQRT2 = np.uint64(0x6A09E667F3BCC908)  # 2^64 (sqrt(2) - 1)
NONE_OF = 'no_'  # followed by a key: the values of "no condition" for this key
LABELS = ('data', 'balanced')  # distributions of the labels of drawn images


class Condition(Protocol):
  """One key of a conditioning; a frozen dataclass, thus static under jit."""

  def zeros(self, count: int) -> np.ndarray:
    """Returns valid values for `count` examples, for shapes and dtypes."""
    ...

  def in_turn(self, index: np.ndarray, chosen: Sequence[Any] = ()) -> np.ndarray:
    """Returns the values of the samples at `index` (B,), cycling through `chosen` or, by default, all values."""
    ...

  def withheld(self, values: jax.Array) -> jax.Array:
    """Returns the values that represent "no condition", with the shape of `values` (B, ...)."""
    ...


@dataclasses.dataclass(frozen=True)
class Classes:
  """The class of an image, an integer (B,) below `count`, or NONE for no class."""

  count: int
  NONE: ClassVar[int] = -1

  def __str__(self) -> str:
    return f'{self.count} classes'

  def zeros(self, count: int) -> np.ndarray:
    """See `Condition.zeros`."""
    return np.zeros(count, np.int32)

  def in_turn(self, index: np.ndarray, chosen: Sequence[int] = ()) -> np.ndarray:
    """See `Condition.in_turn`; by default classes are balanced."""
    values = np.asarray(chosen or range(self.count), np.int32)
    return values[index % len(values)]

  def proportional(self, index: np.ndarray, seed: int, counts: Sequence[int]) -> np.ndarray:
    """Returns classes of the samples at `index` (B,) in the proportions of `counts`; a function of (seed, index).

    Sample k has the class whose part of [0, 1) contains frac(k phi + offset), with the golden ratio phi and an offset that
    depends on the seed. This sequence fills [0, 1) evenly (Kuipers & Niederreiter 1974, theorem 2.3.4): among any n
    consecutive samples, a class deviates from its share of n by at most 3 + 3.6 log(n). The positions are computed in
    integers, so that they are the same on every machine.

    Raises:
      ValueError: there are more counts than classes, or the counts are all 0.
    """
    edges = np.cumsum(np.asarray(counts, np.float64))
    if len(edges) > self.count or not edges[-1]:
      raise ValueError(f'{len(edges)} counts, {edges[-1]:.0f} images in all, for {self.count} classes')
    (offset,) = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    place = index.astype(np.uint64) * _GOLDEN + offset  # modulo 2^64
    return np.searchsorted(edges / edges[-1], (place >> np.uint64(11)) * 2.0**-53, 'right').astype(
      np.int32
    )

  def withheld(self, values: jax.Array) -> jax.Array:
    """See `Condition.withheld`."""
    return jnp.full_like(values, self.NONE)


@dataclasses.dataclass(frozen=True)
class Weights:
  """The weight of guidance as an input of the network, a number (B,) in [low, high] (Meng et al. 2023).

  It is a setting of the sampler: datasets do not have it, and it is never withheld. In training, each example has a weight
  drawn at random.
  """

  low: float
  high: float

  def __str__(self) -> str:
    return f'weights from {self.low:g} to {self.high:g}'

  def __post_init__(self) -> None:
    if not 0.0 <= self.low < self.high < math.inf:
      raise ValueError(
        f'the weights of guidance, {self.low:g} to {self.high:g}, must be 0 <= LOW < HIGH'
      )

  def zeros(self, count: int) -> np.ndarray:
    """See `Condition.zeros`."""
    return np.zeros(count, np.float32)

  def in_turn(self, index: np.ndarray, chosen: Sequence[float] = ()) -> np.ndarray:
    """See `Condition.in_turn`; by default, the smallest weight."""
    values = np.asarray(chosen or (self.low,), np.float32)
    return np.take(values, index, mode='wrap')

  def spread(self, index: np.ndarray) -> np.ndarray:
    """Returns weights of the samples at `index` (B,) that fill the range evenly: low + (high - low) frac(k sqrt(2))."""
    place = index.astype(np.uint64) * _SQRT2  # modulo 2^64
    part = (place >> np.uint64(11)) * 2.0**-53
    return (self.low + (self.high - self.low) * part).astype(np.float32)

  def draw(self, rng: jax.Array, count: int) -> jax.Array:
    """Draws weights of `count` examples, uniformly."""
    return jax.random.uniform(rng, (count,), minval=self.low, maxval=self.high)

  def withheld(self, values: jax.Array) -> jax.Array:
    """Returns `values`: without a class, guidance has no effect, whatever its weight."""
    return values


@dataclasses.dataclass(frozen=True)
class Text:
  """The embeddings of a text's tokens, (B, length, width) float32, as a text encoder returns them.

  The embeddings of the empty text, which is no condition, depend on the encoder, so that they travel in the `Cond`.

  Attributes:
    length: number of tokens, to which shorter texts are padded.
    width: width of an embedding.
  """

  length: int
  width: int

  def __str__(self) -> str:
    return f'texts of {self.length} tokens of width {self.width}'

  def zeros(self, count: int) -> np.ndarray:
    """See `Condition.zeros`."""
    return np.zeros((count, self.length, self.width), np.float32)

  def in_turn(self, index: np.ndarray, chosen: Sequence[Any] = ()) -> np.ndarray:
    """See `Condition.in_turn`; raises UserError without `chosen`, because there are no texts to choose from."""
    if not len(chosen):
      raise UserError('this model draws what a text says: give --prompts, or prompts=[...] in Python')
    return np.asarray(chosen, np.float32)[index % len(chosen)]

  def withheld(self, values: jax.Array) -> jax.Array:
    """See `Condition.withheld`; always raises ValueError."""
    raise ValueError(
      "the embeddings of the empty text must be given beside a text's, as cond['no_text']"
    )


class Texts(Protocol):
  """The embeddings of a set of texts, from which texts are drawn."""

  def draw(self, index: np.ndarray, seed: int) -> Mapping[str, np.ndarray]:
    """Returns `text` and `no_text` of the samples at `index` (B,), each (B, T, D) float32; a function of (seed, index)."""
    ...


Conditioning = Mapping[str, Condition]
WEIGHT = 'guidance'  # the key of `Weights`


def conditions(num_classes: int, guidance: Sequence[float] = ()) -> Conditioning:
  """Returns the conditioning of a network.

  Args:
    num_classes: number of classes; 0 for no label.
    guidance: (low, high), the weights of guidance that the network takes as an input; () for no such input.
  """
  found: dict[str, Condition] = {'label': Classes(num_classes)} if num_classes else {}
  return found | ({WEIGHT: Weights(*guidance)} if guidance else {})


def weights(conditioning: Conditioning) -> Weights | None:
  """Returns the weights of guidance that a network takes as an input; None if it does not take any."""
  found = conditioning.get(WEIGHT)
  return found if isinstance(found, Weights) else None


def of_data(conditioning: Conditioning) -> Conditioning:
  """Returns the part of a conditioning that comes with the data: all but the weight of guidance."""
  return {key: condition for key, condition in conditioning.items() if key != WEIGHT}


def with_weights(rng: jax.Array, conditioning: Conditioning, cond: Cond, count: int) -> Cond:
  """Returns `cond` with a random weight of guidance for each example, if a network takes it as an input."""
  known = weights(conditioning)
  return cond if known is None else {**(cond or {}), WEIGHT: known.draw(rng, count)}


def classes(conditioning: Conditioning) -> Classes | None:
  """Returns the classes that a network is conditioned on; None if it is not conditioned on classes."""
  found = conditioning.get('label')
  return found if isinstance(found, Classes) else None


def takes_text(conditioning: Conditioning) -> bool:
  """Whether a network is conditioned on a text."""
  return any(isinstance(condition, Text) for condition in conditioning.values())


_NUMBER = re.compile(r'[+-]?\d+([.,]\d+)?')


def labels_by_name(count: int, names: Sequence[str]) -> dict[str, int]:
  """Returns labels by the texts that users may give: class names and, unless a name is a number, label numbers.

  If folders are called 1 to 12, the first one has the label 0, so a number can only be a name.

  Args:
    count: number of classes.
    names: class names by label; empty if the classes have no names.
  """
  named = {name: label for label, name in enumerate(names)}
  numbered = {} if _are_numbers(names) else {str(label): label for label in range(count)}
  return numbered | named


def choices(count: int, names: Sequence[str]) -> str:
  """Describes the texts that `labels_by_name` accepts, for error messages."""
  if _are_numbers(names):
    some = ', '.join(names[:12]) + (', ...' if count > 12 else '')
    return f'the {count} classes are called {some}, and a number is the name of a class here'
  such_as = f', or their names, such as {names[0]}' if names else ''
  return f'classes are whole numbers, 0 to {count - 1}{such_as}'


def _are_numbers(names: Sequence[str]) -> bool:
  return any(_NUMBER.fullmatch(name.strip()) for name in names)


def zeros(conditioning: Conditioning, count: int) -> Cond:
  """Returns a conditioning of `count` examples, for shapes and dtypes; None for an unconditional network."""
  return {key: condition.zeros(count) for key, condition in conditioning.items()} or None


def in_turn(
  conditioning: Conditioning, index: np.ndarray, chosen: Mapping[str, Sequence[Any]] | None = None
) -> Cond:
  """Returns the conditioning of the samples at `index` (B,), cycling through each key's chosen values or, by default, all."""
  values, found = chosen or {}, {}
  for key, condition in conditioning.items():
    found[key] = condition.in_turn(index, values.get(key, ()))
    if NONE_OF + key in values:
      found[NONE_OF + key] = condition.in_turn(index, values[NONE_OF + key])
  return found or None


def examples(conditioning: Conditioning, count: int) -> Cond:
  """Returns what `draw` returns for `count` examples, as zeros; in contrast to `zeros`, with `no_text` beside a text."""
  found = zeros(conditioning, count)
  texts = [key for key, condition in conditioning.items() if isinstance(condition, Text)]
  return found and {**found, **{NONE_OF + key: found[key] for key in texts}}


def draw(
  conditioning: Conditioning,
  index: np.ndarray,
  seed: int,
  label_counts: Sequence[int],
  texts: Texts | None = None,
) -> Cond:
  """Returns the conditioning of the samples at `index` (B,).

  Labels have the proportions of `label_counts` or, without counts, are balanced. Texts are drawn from `texts`. All other
  values are taken in turn.

  Raises:
    UserError: a text is needed, and there are no `texts`.
  """
  given = {} if texts is None or not takes_text(conditioning) else dict(texts.draw(index, seed))
  others = {key: condition for key, condition in conditioning.items() if key not in given}
  known, found = classes(conditioning), {**(in_turn(others, index) or {}), **given} or None
  if known is None or not label_counts:
    return found
  return {**(found or {}), 'label': known.proportional(index, seed, label_counts)}


def select(conditioning: Conditioning, cond: Cond) -> Cond:
  """Returns the part of `cond` that a network takes; raises ValueError if a key of its conditioning is missing."""
  missing = [key for key in conditioning if key not in (cond or {})]
  if missing:
    raise ValueError(f'the network is conditioned on {missing[0]!r}, which the data does not have')
  keys = [key for known in conditioning for key in (known, NONE_OF + known)]
  return {key: (cond or {})[key] for key in keys if key in (cond or {})} or None


def withheld(conditioning: Conditioning, cond: Cond) -> Cond:
  """Returns `cond` with all values replaced by "no condition"."""
  return None if cond is None else {key: _none(conditioning, cond, key) for key in cond}


def _none(conditioning: Conditioning, cond: Mapping[str, Any], key: str) -> jax.Array:
  """Returns the values of "no condition" for a key of `cond`."""
  if key not in conditioning:  # one of NONE_OF
    found: jax.Array = cond[key]
    return found
  given = cond.get(NONE_OF + key)
  return conditioning[key].withheld(cond[key]) if given is None else given


def drop(rng: jax.Array, conditioning: Conditioning, cond: Cond, probability: float) -> Cond:
  """Drops all conditions of an example with the given probability (Ho & Salimans 2022, algorithm 1)."""
  if cond is None:
    return None
  size = next(iter(cond.values())).shape[:1]
  dropped = jax.random.bernoulli(rng, probability, size)

  def withhold(key: str, values: jax.Array) -> jax.Array:
    mask = dropped.reshape(size + (1,) * (values.ndim - 1))
    return jnp.where(mask, _none(conditioning, cond, key), values)

  return {key: withhold(key, values) for key, values in cond.items()}
