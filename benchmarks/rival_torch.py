"""The U-Net in PyTorch, optionally with our parameters, for `rival.py`.

This file and `rival_torch_work.py` are the only ones that import torch. Images are (B, C, H, W) in the channels_last layout.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


def time_embedding(logsnr: Tensor, dim: int) -> Tensor:
  """Sinusoidal embedding of the t of logsnr (B,): (B, dim)."""
  u = torch.arctan(torch.exp(-0.5 * logsnr.clamp(-20.0, 20.0))) / (0.5 * math.pi)
  half = dim // 2
  steps = torch.arange(half, device=u.device)
  angles = 1000.0 * u[:, None] * torch.exp(-steps * (math.log(10000.0) / (half - 1)))[None]
  return torch.cat([angles.sin(), angles.cos()], 1)


class GroupNorm(nn.GroupNorm):
  """GroupNorm whose output has the type of its input also under autocast, where it would otherwise be float32."""

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
  """Residual block with scale-shift GroupNorm and optional resampling."""

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
    """x: (B, C, H, W); emb: (B, E), after the activation."""
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
  """The network of `networks/unet.py`, with the same arguments."""

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
    with torch.autocast(h.device.type, enabled=False):  # the last layer is in float32, as in ours
      return F.conv2d(h.float(), weight, bias, padding=1)


def _key(name: str) -> str:
  """A name in our parameter tree as a key of a ModuleDict."""
  return name.replace('.', '__')


def load(net: UNet, params: Mapping[str, Any]) -> None:
  """Copies our parameter tree (NumPy) into the network; KeyError or ValueError if it does not fit."""
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


def choose_device(asked: str, backend: str) -> str:
  """'cpu' or 'cuda': the given one, or for 'auto' a GPU if there is one and jax's `backend` is a GPU, too."""
  if asked != 'auto':
    return asked
  return 'cuda' if backend == 'gpu' and torch.cuda.is_available() else 'cpu'


def compute_exactly() -> None:
  """Disables reduced precision in float32 matrix products."""
  torch.set_float32_matmul_precision('highest')


def from_numpy(value: np.ndarray | None) -> Tensor | None:
  """Converts an input to a tensor; images from (B, H, W, C) to (B, C, H, W)."""
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
