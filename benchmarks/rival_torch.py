"""The U-Net and its training in PyTorch, as one writes them there: what `rival.py` compares with.

The only file that imports torch. Images are (B, C, H, W) in the channels_last layout.
"""

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

TYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Spec:
  """The work, as `workloads.describe` says it.

  Attributes:
    work: 'base', 'round' or 'sampling'.
    dtype: of the activations; parameters are float32.
    batch, image_shape: examples, each (H, W, C).
    output: what the network predicts: 'x', 'eps', 'v' or 'both'.
    network: the arguments of `UNet`.
    num_parameters: of the network, to be checked.
    logsnr_min, logsnr_max: of the clipped cosine schedule.
    num_steps: the student's, in a round; network calls, in sampling.
    learning_rate, b1, b2, eps, weight_decay, clip_norm: of the optimizer.
    ema_decay: of each moving average.
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


def time_embedding(logsnr: Tensor, dim: int) -> Tensor:
  """Sinusoids of t, which is read off logsnr (B,): (B, dim)."""
  u = torch.arctan(torch.exp(-0.5 * logsnr.clamp(-20.0, 20.0))) / (0.5 * math.pi)
  half = dim // 2
  steps = torch.arange(half, device=u.device)
  angles = 1000.0 * u[:, None] * torch.exp(-steps * (math.log(10000.0) / (half - 1)))[None]
  return torch.cat([angles.sin(), angles.cos()], 1)


class GroupNorm(nn.GroupNorm):
  """Has an output of its input's type under autocast, too: a float32 output would have to be converted again."""

  def __init__(self, groups: int, ch: int) -> None:
    super().__init__(groups, ch, eps=1e-6)

  def forward(self, x: Tensor) -> Tensor:
    """x: (B, C, H, W)."""
    with torch.autocast(x.device.type, enabled=False):
      weight, bias = self.weight.to(x.dtype), self.bias.to(x.dtype)
      return F.group_norm(x, self.num_groups, weight, bias, self.eps)


def _resample(h: Tensor, way: str | None) -> Tensor:
  if way == 'down':
    return F.avg_pool2d(h, 2)
  return F.interpolate(h, scale_factor=2, mode='nearest') if way == 'up' else h


class ResBlock(nn.Module):
  """Residual block with scale-shift GroupNorm and, where asked, resampling inside it."""

  def __init__(
    self, in_ch: int, ch: int, emb_ch: int, groups: int, dropout: float, way: str | None = None
  ) -> None:
    super().__init__()
    self.way, self.dropout = way, dropout
    self.norm1 = GroupNorm(groups, in_ch)
    self.conv1 = nn.Conv2d(in_ch, ch, 3, padding=1)
    self.temb_proj = nn.Linear(emb_ch, 2 * ch)
    self.norm2 = GroupNorm(groups, ch)
    self.conv2 = nn.Conv2d(ch, ch, 3, padding=1)
    self.nin_shortcut = nn.Conv2d(in_ch, ch, 1) if in_ch != ch else nn.Identity()

  def forward(self, x: Tensor, emb: Tensor) -> Tensor:
    """x: (B, C, H, W); emb: (B, E), already through the activation."""
    h = self.conv1(_resample(F.silu(self.norm1(x)), self.way))
    scale, shift = self.temb_proj(emb)[:, :, None, None].chunk(2, 1)
    h = F.silu(self.norm2(h) * (1.0 + scale) + shift)
    h = F.dropout(h, self.dropout, self.training)
    return self.nin_shortcut(_resample(x, self.way)) + self.conv2(h)


class AttnBlock(nn.Module):
  """Self-attention over all pixels."""

  def __init__(self, ch: int, groups: int, heads: int) -> None:
    super().__init__()
    self.heads = heads
    self.norm = GroupNorm(groups, ch)
    self.qkv = nn.Linear(ch, 3 * ch)
    self.proj_out = nn.Linear(ch, ch)

  def forward(self, x: Tensor) -> Tensor:
    """x: (B, C, H, W)."""
    batch, ch, height, width = x.shape
    h = self.norm(x).permute(0, 2, 3, 1).reshape(batch, height * width, ch)
    qkv = self.qkv(h).reshape(batch, height * width, 3, self.heads, ch // self.heads)
    h = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))
    h = self.proj_out(h.transpose(1, 2).reshape(batch, height * width, ch))
    return x + h.reshape(batch, height, width, ch).permute(0, 3, 1, 2)


class UNet(nn.Module):
  """The network of `networks/unet.py`; its arguments have the same names."""

  def __init__(
    self,
    *,
    side: int,
    in_ch: int,
    out_ch: int,
    ch: int,
    emb_ch: int,
    ch_mult: tuple[int, ...],
    num_res_blocks: int,
    attn_resolutions: tuple[int, ...],
    num_heads: int | None,
    head_dim: int | None,
    num_groups: int,
    dropout: float,
    num_classes: int,
  ) -> None:
    super().__init__()
    self.ch, self.num_classes = ch, num_classes
    self.ch_mult, self.num_res_blocks = ch_mult, num_res_blocks
    self.blocks = nn.ModuleDict()

    def block(name: str, before: int, after: int, way: str | None = None) -> None:
      self.blocks[_key(name)] = ResBlock(before, after, emb_ch, num_groups, dropout, way)

    def attend(name: str, width: int) -> None:
      heads = num_heads or width // (head_dim or width)
      self.blocks[_key(name)] = AttnBlock(width, num_groups, heads)

    self.dense0, self.dense1 = nn.Linear(ch, emb_ch), nn.Linear(emb_ch, emb_ch)
    if num_classes:
      self.class_emb = nn.Linear(num_classes, emb_ch)
    self.conv_in = nn.Conv2d(in_ch, ch, 3, padding=1)
    width, skips = ch, [ch]
    for level, mult in enumerate(ch_mult):
      for b in range(num_res_blocks):
        block(f'down_{level}.block_{b}', width, ch * mult)
        width = ch * mult
        if side in attn_resolutions:
          attend(f'down_{level}.attn_{b}', width)
        skips.append(width)
      if level < len(ch_mult) - 1:
        block(f'down_{level}.downsample', width, width, 'down')
        side //= 2
        skips.append(width)
    block('mid.block_1', width, width)
    attend('mid.attn_1', width)
    block('mid.block_2', width, width)
    for level, mult in reversed(list(enumerate(ch_mult))):
      for b in range(num_res_blocks + 1):
        block(f'up_{level}.block_{b}', width + skips.pop(), ch * mult)
        width = ch * mult
        if side in attn_resolutions:
          attend(f'up_{level}.attn_{b}', width)
      if level:
        block(f'up_{level}.upsample', width, width, 'up')
        side *= 2
    self.norm_out = GroupNorm(num_groups, width)
    self.conv_out = nn.Conv2d(width, out_ch, 3, padding=1)

  def forward(self, z: Tensor, logsnr: Tensor, label: Tensor | None) -> Tensor:
    """z: (B, C, H, W); logsnr: (B,); label: (B,) integers, or None without classes. Returns float32."""
    emb = self.dense1(F.silu(self.dense0(time_embedding(logsnr, self.ch))))
    if label is not None:
      emb = emb + self.class_emb(F.one_hot(label, self.num_classes).float())
    emb = F.silu(emb)

    def through(h: Tensor, name: str) -> Tensor:
      h = self.blocks[_key(name)](h, emb)
      attention = _key(name.replace('block', 'attn'))
      return self.blocks[attention](h) if attention != _key(name) and attention in self.blocks else h

    h = self.conv_in(z)
    skips = [h]
    levels = len(self.ch_mult)
    for level in range(levels):
      for b in range(self.num_res_blocks):
        h = through(h, f'down_{level}.block_{b}')
        skips.append(h)
      if level < levels - 1:
        h = through(h, f'down_{level}.downsample')
        skips.append(h)
    h = through(through(h, 'mid.block_1'), 'mid.block_2')
    for level in reversed(range(levels)):
      for b in range(self.num_res_blocks + 1):
        h = through(torch.cat([h, skips.pop()], 1), f'up_{level}.block_{b}')
      if level:
        h = through(h, f'up_{level}.upsample')
    h = F.silu(self.norm_out(h))
    weight, bias = self.conv_out.weight.float(), self.conv_out.bias.float()
    with torch.autocast(h.device.type, enabled=False):  # as ours, the last layer is in float32
      return F.conv2d(h.float(), weight, bias, padding=1)


def _key(name: str) -> str:
  """A name in our tree of parameters, as a ModuleDict takes it."""
  return name.replace('.', '__')


def load(net: UNet, params: Mapping[str, Any]) -> None:
  """Copies our tree of parameters (NumPy) into the network; KeyError or ValueError if it is that of another one."""
  used = 0
  for name, module in net.named_modules():
    path = name.removeprefix('blocks.').replace('__', '.').split('.')
    own = dict(module.named_parameters(recurse=False))
    if not own:
      continue
    *outer, last = path
    of_block = params['.'.join(outer)] if outer else params
    if last == 'qkv':
      parts = [of_block[part] for part in ('q', 'k', 'v')]
      ch = parts[0]['kernel'].shape[0]
      kernel = np.concatenate([part['kernel'].reshape(ch, ch) for part in parts], 1)
      leaves = {'kernel': kernel, 'bias': np.concatenate([part['bias'].reshape(ch) for part in parts])}
    else:
      leaves = dict(of_block[last])
    if last == 'proj_out':
      leaves['kernel'] = leaves['kernel'].reshape(-1, leaves['kernel'].shape[-1])
    for which, parameter in own.items():
      leaf = leaves['bias'] if which == 'bias' else leaves.get('kernel', leaves.get('scale'))
      if leaf.ndim > 1:  # (H, W, in, out) or (in, out) to (out, in, H, W) or (out, in)
        leaf = np.moveaxis(leaf, (-1, -2), (0, 1))
      value = torch.from_numpy(np.ascontiguousarray(leaf)).float()
      if value.ndim < parameter.ndim:
        value = value[..., None, None]
      if value.shape != parameter.shape:
        raise ValueError(f'{name}.{which} has shape {tuple(parameter.shape)}, ours {leaf.shape}')
      with torch.no_grad():
        parameter.copy_(value)
      used += value.numel()
  count = sum(leaf.size for leaf in _leaves(params))
  if used != count:
    raise ValueError(f'our network has {count} parameters, of which {used} were copied')


def _leaves(tree: Any) -> Iterator[np.ndarray]:
  if isinstance(tree, Mapping):
    for branch in tree.values():
      yield from _leaves(branch)
  else:
    yield tree


def _wide(values: Tensor) -> Tensor:
  return values[:, None, None, None]


def alpha_sigma(logsnr: Tensor) -> tuple[Tensor, Tensor]:
  """Scales of signal and noise at logsnr (B,), shaped (B, 1, 1, 1)."""
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
    """What the network says about (x, eps)."""
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
    """Of base training, (B,)."""
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
    """Of a round of progressive distillation, for t = i / N, (B,)."""
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
    """x, by DDIM with clipped x, from noise z."""
    times = torch.arange(self.spec.num_steps, -1, -1, device=z.device) / self.spec.num_steps
    logsnr = self.schedule(times)
    for k in range(self.spec.num_steps):
      at, to = (one.expand(len(z)) for one in (logsnr[k], logsnr[k + 1]))
      x = self.predict(net, z, at, label)[0].clamp(-1.0, 1.0)
      (alpha_t, sigma_t), (alpha_s, sigma_s) = alpha_sigma(at), alpha_sigma(to)
      z = alpha_s * x + sigma_s * ((z - alpha_t * x) / sigma_t)
    return z


def build(spec: Spec, device: str) -> UNet:
  """The network, with as many parameters as ours."""
  net = UNet(**spec.network).to(device).to(memory_format=torch.channels_last)
  count = sum(parameter.numel() for parameter in net.parameters())
  assert count == spec.num_parameters, f'{count} parameters, ours has {spec.num_parameters}'
  return net


class Work:
  """What is timed: `run` makes an update, or draws a batch; `wait` returns when the device is done."""

  def __init__(self, spec: Spec, device: str, compiled: bool) -> None:
    torch.manual_seed(0)
    torch.set_float32_matmul_precision('high')  # as jax does: TF32 where there is some
    torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.benchmark = True
    self.spec, self.device, self.diffusion = spec, device, Diffusion(spec)
    self.net = build(spec, device)
    with torch.no_grad():
      for parameter in self.net.parameters():
        scale = 0.1 if parameter.ndim == 1 else (parameter.numel() / len(parameter)) ** -0.5
        parameter.copy_(scale * torch.randn_like(parameter) + (parameter.ndim == 1))
    self.net.train(spec.work == 'base')  # dropout is for base training only
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
    """One update, or one batch of images, copied to the host."""
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

  def forget_peak_memory(self) -> None:
    """From now on the allocator's peak counts anew."""
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
  """Adam with decoupled weight decay, fused where this torch has it."""
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
  """A product of square matrices, to be timed: what runs it, and what waits for it."""
  a, b = (torch.randn(width, width, device=device).to(TYPES[dtype]) for _ in range(2))
  return lambda: torch.mm(a, b), torch.cuda.synchronize if device == 'cuda' else lambda: None


def peak_memory(device: str) -> int | None:
  """The most bytes of tensors at once on a GPU; None on a CPU."""
  return torch.cuda.max_memory_allocated() if device == 'cuda' else None


def choose_device(asked: str, backend: str) -> str:
  """'cpu' or 'cuda': what is asked for, or, for 'auto', a GPU if there is one and jax's `backend` is one, too."""
  if asked != 'auto':
    return asked
  return 'cuda' if backend == 'gpu' and torch.cuda.is_available() else 'cpu'


def compute_exactly() -> None:
  """From now on products of float32 matrices are not rounded."""
  torch.set_float32_matmul_precision('highest')


def from_numpy(value: np.ndarray | None) -> Tensor | None:
  """An input of both sides; images from (B, H, W, C) to (B, C, H, W)."""
  if value is None:
    return None
  found = torch.from_numpy(np.array(value))
  if found.ndim == 4:
    return found.permute(0, 3, 1, 2).contiguous(memory_format=torch.channels_last)
  return found.long() if found.dtype == torch.int32 else found


def to_numpy(value: Tensor) -> np.ndarray:
  """The inverse of `from_numpy`."""
  found: np.ndarray = value.detach().numpy()
  return found.transpose(0, 2, 3, 1) if found.ndim == 4 else found
