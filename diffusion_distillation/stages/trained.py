"""The weights of a stage, finished or not, in memory or on disk, and their digests."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

from diffusion_distillation.config import choose
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system import sharding
from diffusion_distillation.system.checkpoints import digest
from diffusion_distillation.training.state import Params, TrainState


class Stored(Mapping[str, Params]):
  """The weights of a stage by name: some are held in host memory, the others are read from disk at each access.

  Args:
    names: the names of all sets of weights.
    read: reads the set with the given name.
    held: the sets in memory, by name.
  """

  def __init__(
    self, names: Sequence[str], read: Callable[[str], Params], held: Mapping[str, Params]
  ) -> None:
    self._names, self._read, self.held = tuple(names), read, dict(held)

  def __getitem__(self, name: str) -> Params:
    if name not in self._names:
      raise KeyError(name)
    return self.held[name] if name in self.held else self._read(name)

  def __contains__(self, name: object) -> bool:
    return name in self._names

  def __iter__(self) -> Iterator[str]:
    return iter(self._names)

  def __len__(self) -> int:
    return len(self._names)


@dataclasses.dataclass(frozen=True)
class Model:
  """One set of a stage's weights, finished or not, to sample from or to use as a teacher.

  Attributes:
    stage: the stage that the weights belong to.
    weights: the name of the set, one of `stage.weights`.
    digest: the digest of the set.
    step: updates done.
    seconds: seconds of training.
    all: every set of the stage by name, on the host or on disk (see `Stored`).
    digests: the known digests, by name of the set.
  """

  stage: Stage
  weights: str
  digest: str
  step: int
  seconds: float
  all: Mapping[str, Params]
  digests: Mapping[str, str] = dataclasses.field(default_factory=dict)

  @property
  def params(self) -> Params:
    """The set, on the host; read from disk at each access, unless it is held in memory."""
    return self.all[self.weights]

  def use(self, weights: str) -> 'Model':
    """Returns the model with another set of the stage's weights; raises UserError if the stage has no such set."""
    if weights == self.weights:
      return self
    choose(f'stage {self.stage.name}: --weights', weights, dict.fromkeys(self.all))
    known = self.digests.get(weights) or digest(self.all[weights])
    return dataclasses.replace(self, weights=weights, digest=known)

  def hold(self) -> 'Model':
    """Returns the model with only this set, held in memory."""
    return dataclasses.replace(self, all={self.weights: self.params})


def sets_of(stage: Stage, state: TrainState) -> dict[str, Params]:
  """Returns the sets of weights that a stage keeps, by name; see `Stage.weights`."""
  sampled = state.ema_params[: len(stage.recipe.ema_decay)]  # methods may keep further averages
  return dict(zip(stage.weights, [*sampled, state.params['student']], strict=True))


def to_model(stage: Stage, state: TrainState, seconds: float) -> Model:
  """Returns the model of a training state, on the host, with the first moving average as its weights."""
  sets = sharding.to_host(sets_of(stage, state))
  digests = {name: digest(params) for name, params in sets.items()}
  return Model(stage, 'ema', digests['ema'], int(state.step), seconds, sets, digests)
