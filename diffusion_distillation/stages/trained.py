"""The weights of a stage, finished or not, in memory or on disk, and their digests."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence

from diffusion_distillation.config import choose
from diffusion_distillation.errors import DamagedError
from diffusion_distillation.networks import lora
from diffusion_distillation.networks.lora import Adapters
from diffusion_distillation.stages.model import read
from diffusion_distillation.stages.stage import Stage
from diffusion_distillation.system import sharding
from diffusion_distillation.system.checkpoints import digest
from diffusion_distillation.system.files import read_json
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
    adapters: the low-rank adapters in this set, if it was trained with them in this process; else None.
  """

  stage: Stage
  weights: str
  digest: str
  step: int
  seconds: float
  all: Mapping[str, Params]
  digests: Mapping[str, str] = dataclasses.field(default_factory=dict)
  adapters: Adapters | None = None

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
    return dataclasses.replace(self, weights=weights, digest=known, adapters=None)

  def hold(self) -> 'Model':
    """Returns the model with only this set, held in memory."""
    return dataclasses.replace(self, all={self.weights: self.params})


def sets_of(stage: Stage, state: TrainState) -> dict[str, Params]:
  """Returns the sets of parameters that a stage keeps, by name, see `Stage.weights`; with LoRA, these are factors."""
  sampled = state.ema_params[: len(stage.recipe.ema_decay)]  # methods may keep further averages
  return dict(zip(stage.weights, [*sampled, state.params['student']], strict=True))


def weights_on_host(stage: Stage, trained: Params, base: Params = None) -> Params:
  """Returns the weights of a set of trained parameters, on the host: these themselves or, with LoRA, `base` with these factors."""
  found, of = sharding.to_host(trained), stage.recipe.lora
  return found if of is None else lora.merged_on_host(base, found, of.scale)


def set_on_host(workdir: pathlib.Path, stage: Stage, state: TrainState, weights: str) -> Params:
  """Returns one set of the weights in a training state, on the host; raises as `base_of` does."""
  return weights_on_host(stage, sets_of(stage, state)[weights], base_of(workdir, stage))


def base_of(workdir: pathlib.Path, stage: Stage) -> Params:
  """Reads the weights that a stage's adapters change from the folder of the stage that it starts from; None without adapters.

  Raises:
    UserError, DamagedError: the folder is missing or damaged, or holds other weights than those that the stage began with.
  """
  if stage.recipe.lora is None:
    return None
  folder = workdir / str(stage.starts_from) / 'model'
  stored = read(folder)
  began = read_json(workdir / stage.name / 'stage.json').get('start') or {}
  if began.get('digest') != stored.digest:
    raise DamagedError(
      f'{folder} holds other weights than those that {stage.name} was trained from; restore it, or remove '
      f'{workdir / stage.name} to train this stage again'
    )
  return stored.params


def to_model(stage: Stage, state: TrainState, seconds: float, base: Params = None) -> Model:
  """Returns the model of a training state, on the host, with the first moving average as its weights.

  Args:
    stage: the stage.
    state: its training state.
    seconds: seconds of training.
    base: with LoRA, the weights that the student started from, on the host.
  """
  trained, of = sets_of(stage, state), stage.recipe.lora
  sets = {name: weights_on_host(stage, params, base) for name, params in trained.items()}
  digests = {name: digest(params) for name, params in sets.items()}
  adapters = None if of is None else Adapters(sharding.to_host(trained['ema']), of.scale)
  return Model(stage, 'ema', digests['ema'], int(state.step), seconds, sets, digests, adapters)
