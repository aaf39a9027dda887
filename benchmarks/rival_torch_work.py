"""Training and sampling in idiomatic PyTorch: the other side of `rival.py`."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import measuring
from benchmarks.rival_torch import UNet

TYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Spec:
  """The work, as described by `workloads.describe`.

  Attributes:
    work: 'base', 'round' or 'sampling'.
    dtype: type of the activations; parameters are float32.
    batch, image_shape: number of examples, and the shape (H, W, C) of each.
    output: what the network predicts: 'x', 'eps', 'v' or 'both'.
    network: the arguments of `UNet`.
    num_parameters: number of parameters of the network, as a check.
    logsnr_min, logsnr_max: range of the clipped cosine schedule.
    num_steps: in a round, the student's number of steps; in sampling, network evaluations.
    learning_rate, b1, b2, eps, weight_decay, clip_norm: hyper-parameters of the optimizer.
    ema_decay: decay rate of each moving average.
    random_flip: whether images are mirrored at random.
  """

  work: str
  dtype: str
  batch: int
  image_shape: tuple[int, int, int]
  output: str
  network: dict[str, Any]
  num_parameters: int
  logsnr_min: float
  logsnr_max: float
  num_steps: int
  learning_rate: float
  b1: float
  b2: float
  eps: float
  weight_decay: float
  clip_norm: float
  ema_decay: tuple[float, ...]
  random_flip: bool


def _wide(values: Tensor) -> Tensor:
  return values[:, None, None, None]


def alpha_sigma(logsnr: Tensor) -> tuple[Tensor, Tensor]:
  """Signal and noise scale at logsnr (B,), with shape (B, 1, 1, 1)."""
  return _wide(torch.sigmoid(logsnr).sqrt()), _wide(torch.sigmoid(-logsnr).sqrt())


@dataclasses.dataclass(frozen=True)
class Diffusion:
  """The mathematics of the loss and of sampling, as in `diffusion/` and `methods/`."""

  spec: Spec

  def schedule(self, t: Tensor) -> Tensor:
    """The clipped cosine schedule: t (B,) in [0, 1] to logsnr, inf at 0."""
    b = math.atan(math.exp(-0.5 * self.spec.logsnr_max))
    a = math.atan(math.exp(-0.5 * self.spec.logsnr_min)) - b
    return torch.where(t == 0.0, math.inf, -2.0 * torch.log(torch.tan(a * t + b)))

  def predict(
    self, net: Callable[..., Tensor], z: Tensor, logsnr: Tensor, label: Tensor | None
  ) -> tuple[Tensor, Tensor]:
    """The network's predictions of (x, eps)."""
    with torch.autocast(z.device.type, torch.bfloat16, enabled=self.spec.dtype == 'bfloat16'):
      output = net(z, logsnr, label)
    alpha, sigma = alpha_sigma(logsnr)
    match self.spec.output:
      case 'v':
        return alpha * z - sigma * output, sigma * z + alpha * output
      case 'eps':
        return (z - sigma * output) / alpha, output
      case 'both':
        x, eps = output.chunk(2, 1)
        x = sigma**2 * x + (1.0 - sigma**2) * (z - sigma * eps) / alpha
      case _:
        x = output
    return x, (z - alpha * x) / sigma

  def _weighted(
    self, logsnr: Tensor, target: tuple[Tensor, Tensor], found: tuple[Tensor, Tensor]
  ) -> Tensor:
    """The error of each example with the truncated SNR weighting, (B,)."""
    x_mse = (target[0] - found[0]).square().mean((1, 2, 3))
    eps_mse = (target[1] - found[1]).square().mean((1, 2, 3))
    weight = logsnr.exp().clamp(min=1.0)
    return weight * torch.where(logsnr > 0, (-logsnr).exp() * eps_mse, x_mse)

  def base_losses(
    self, net: Callable[..., Tensor], x: Tensor, eps: Tensor, t: Tensor, label: Tensor | None
  ) -> Tensor:
    """Losses of base training, (B,)."""
    logsnr = self.schedule(t)
    alpha, sigma = alpha_sigma(logsnr)
    z = alpha * x + sigma * eps
    return self._weighted(logsnr, (x, eps), self.predict(net, z, logsnr, label))

  def round_losses(
    self,
    net: Callable[..., Tensor],
    teacher: Callable[..., Tensor],
    x: Tensor,
    eps: Tensor,
    i: Tensor,
    label: Tensor | None,
  ) -> Tensor:
    """Losses of a round of progressive distillation at t = i / N, (B,)."""
    logsnr = [self.schedule((i - k / 2) / self.spec.num_steps) for k in range(3)]
    scales = [alpha_sigma(one) for one in logsnr]
    (alpha_t, sigma_t), _, (alpha_s, sigma_s) = scales
    z_t = alpha_t * x + sigma_t * eps
    with torch.no_grad():
      z = z_t
      for k in range(2):
        x_k, eps_k = self.predict(teacher, z, logsnr[k], label)
        z = scales[k + 1][0] * x_k + scales[k + 1][1] * eps_k
      ratio = sigma_s / sigma_t
      aim = (z - ratio * z_t) / (alpha_s - ratio * alpha_t)
      target = aim, (z_t - alpha_t * aim) / sigma_t
    return self._weighted(logsnr[0], target, self.predict(net, z_t, logsnr[0], label))

  @torch.no_grad()
  def sample(self, net: Callable[..., Tensor], z: Tensor, label: Tensor | None) -> Tensor:
    """Samples x by DDIM with clipping, from noise z."""
    times = torch.arange(self.spec.num_steps, -1, -1, device=z.device) / self.spec.num_steps
    logsnr = self.schedule(times)
    for k in range(self.spec.num_steps):
      at, to = (one.expand(len(z)) for one in (logsnr[k], logsnr[k + 1]))
      x = self.predict(net, z, at, label)[0].clamp(-1.0, 1.0)
      (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(at), alpha_sigma(to)
      z = alpha_s * x + sigma_s * ((z - alpha_t * x) / sigma_t)
    return z


def build(spec: Spec, device: str) -> UNet:
  """The network; checks that it has as many parameters as ours."""
  net = UNet(**spec.network).to(device).to(memory_format=torch.channels_last)
  count = sum(parameter.numel() for parameter in net.parameters())
  assert count == spec.num_parameters, f'{count} parameters, but ours has {spec.num_parameters}'
  return net


class Work:
  """The work to be timed: `run` makes an update or draws a batch; `wait` returns when the device is done."""

  def __init__(self, spec: Spec, device: str, compiled: bool) -> None:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision('high')  # TF32 where it is available, as in jax
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    self.spec, self.device, self.diffusion = spec, device, Diffusion(spec)
    self.compiled = compiled
    self.net = build(spec, device)
    with torch.no_grad():
      for parameter in self.net.parameters():
        scale = 0.1 if parameter.ndim == 1 else (parameter.numel() / len(parameter)) ** -0.5
        parameter.copy_(scale * torch.randn_like(parameter) + (parameter.ndim == 1))
    self.net.train(spec.work == 'base')  # only base training uses dropout
    self.call: Any = torch.compile(self.net, dynamic=False) if compiled else self.net
    shape = (spec.batch, spec.image_shape[2], *spec.image_shape[:2])
    image = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    self.image = image.to(memory_format=torch.channels_last)
    classes = spec.network['num_classes']
    self.label = torch.zeros(spec.batch, dtype=torch.long, device=device) if classes else None
    if spec.work == 'sampling':
      self.net.requires_grad_(False)
      return
    self.params = list(self.net.parameters())
    self.averages = [[p.detach().clone() for p in self.params] for _ in spec.ema_decay]
    self.optimizer = _optimizer(self.params, spec)
    if spec.work == 'round':
      teacher = copy.deepcopy(self.net).requires_grad_(False).to(TYPES[spec.dtype])
      teacher = teacher.to(memory_format=torch.channels_last)
      self.teacher: Any = torch.compile(teacher, dynamic=False) if compiled else teacher

  def run(self) -> None:
    """Makes one update, or draws one batch of images and copies it to the host."""
    if self.spec.work == 'sampling':
      x = self.diffusion.sample(self.call, self._normal(), self.label)
      (127.5 * (x.clamp(-1.0, 1.0) + 1.0)).round().to(torch.uint8).cpu()
      return
    x = self.image.float() / 127.5 - 1.0
    if self.spec.random_flip:
      chosen = torch.rand(len(x), device=self.device) < 0.5
      x = torch.where(_wide(chosen), x.flip(-1), x)
    loss = self._losses(x).mean()
    self.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(self.params, self.spec.clip_norm, foreach=True)
    self.optimizer.step()
    for average, decay in zip(self.averages, self.spec.ema_decay, strict=True):
      torch._foreach_lerp_(average, [p.detach() for p in self.params], 1.0 - decay)

  def wait(self) -> None:
    """Returns when the device is done."""
    if self.device == 'cuda':
      torch.cuda.synchronize()

  def choose_threads(self) -> int:
    """Switches to one thread if that is faster; compiled code keeps the number of threads that it was compiled for."""
    count = torch.get_num_threads()
    if self.device == 'cuda' or self.compiled or count == 1:
      return count
    seconds = {}
    for threads in (1, count):
      torch.set_num_threads(threads)
      seconds[threads] = min(measuring.repeat(self.run, self.wait, 1.0))
    best = min(seconds, key=lambda threads: seconds[threads])
    torch.set_num_threads(best)
    return best

  def forget_peak_memory(self) -> None:
    """Resets the allocator's peak."""
    if self.device == 'cuda':
      torch.cuda.reset_peak_memory_stats()

  def _normal(self) -> Tensor:
    noise = torch.randn(self.image.shape, device=self.device)
    return noise.to(memory_format=torch.channels_last)

  def _losses(self, x: Tensor) -> Tensor:
    t = 1.0 - torch.rand(len(x), device=self.device)
    if self.spec.work == 'base':
      return self.diffusion.base_losses(self.call, x, self._normal(), t, self.label)
    i = (t * self.spec.num_steps).ceil()
    return self.diffusion.round_losses(self.call, self.teacher, x, self._normal(), i, self.label)


def _optimizer(params: list[nn.Parameter], spec: Spec) -> torch.optim.Optimizer:
  """Adam with decoupled weight decay, fused if this version of PyTorch supports it."""
  options: dict[str, Any] = {
    'lr': spec.learning_rate,
    'betas': (spec.b1, spec.b2),
    'eps': spec.eps,
    'weight_decay': spec.weight_decay,
  }
  try:
    return torch.optim.AdamW(params, fused=True, **options)
  except RuntimeError:
    return torch.optim.AdamW(params, **options)


def matrix_product(width: int, dtype: str, device: str) -> tuple[Callable[[], None], Callable[[], None]]:
  """A matrix product to be timed: functions that run it and wait for it."""
  a, b = (torch.randn(width, width, device=device).to(TYPES[dtype]) for _ in range(2))
  return lambda: torch.mm(a, b), torch.cuda.synchronize if device == 'cuda' else lambda: None


def peak_memory(device: str) -> int | None:
  """Peak size of tensors in bytes on a GPU; None on a CPU."""
  return torch.cuda.max_memory_allocated() if device == 'cuda' else None
