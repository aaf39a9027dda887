"""The training of networks by low-rank adapters: its config, and which networks of a stage are adapted; see `networks/lora.py`."""

import dataclasses
from typing import Any

from diffusion_distillation.config import NOT_NEGATIVE, POSITIVE, key


@dataclasses.dataclass(frozen=True)
class LoraSection:
  """Trains students by low-rank adapters of the weights that they start from; works with every method except `guided`.

  See Hu et al. 2021 (LoRA). Parameters, moving averages, optimizer and checkpoints are those of the adapters alone. A finished student has
  ordinary weights, with the adapters merged into them, and the adapters beside them.
  """

  rank: int = key(0, 'Rank of the adapters; 0: the weights themselves are trained.', NOT_NEGATIVE)
  scale: float = key(
    1.0,
    'Factor of the change: a kernel becomes `kernel + scale * down @ up`. Programs that have an alpha mean scale = alpha / rank.',
    POSITIVE,
  )
  modules: str = key(
    '',
    'Regular expression that matches the whole path of each module whose kernel is adapted, such as `.*` for every dense layer and '
    'convolution; if empty, the projections of attention.',
  )
  fake_score: bool = key(
    True,
    "Whether the fake score of `dmd` and `dmd2` also consists of adapters, of the teacher's weights. Otherwise it is trained as a "
    'whole, with parameters, optimizer and checkpoints of the size of the network.',
  )


@dataclasses.dataclass(frozen=True)
class Lora:
  """Which networks of a stage are adapted, and how.

  Attributes:
    rank, scale, modules: see `LoraSection`.
    bases: for each adapted network by name, the name of the frozen weights that it adapts.
  """

  rank: int
  scale: float
  modules: str
  bases: tuple[tuple[str, str], ...]

  def base_of(self, network: str) -> str | None:
    """Returns the name of the frozen weights that a network adapts; None if the network is not adapted."""
    return dict(self.bases).get(network)

  def describe(self) -> dict[str, Any]:
    """Returns the hyper-parameters and the adapted networks in training, as a model's provenance records them."""
    names = sorted(name for name, _ in self.bases if name != 'average')
    return {'rank': self.rank, 'scale': self.scale, 'modules': self.modules, 'networks': names}
