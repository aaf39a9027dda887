"""Recorded outputs of EDM's networks for weights that are functions of their names: tests/parity_peers/.

The cases `edm_ddpmpp_*`, `edm_adm_cond` and `vp_ddpmpp_uncond` are what NVIDIA's own code answered, the others what an
implementation in PyTorch did that was written for these tests after the layers of that code. Images are NHWC.
"""

import dataclasses
import functools
import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import safetensors.numpy

from diffusion_distillation.diffusion.process import alpha_sigma
from diffusion_distillation.interop import edm
from tests import peers


@dataclasses.dataclass(frozen=True)
class Case:
  """One folder of tests/parity_peers: what `case.json` says, and the arrays."""

  name: str

  @functools.cached_property
  def says(self):
    return peers.read(self.name)[0]

  @functools.cached_property
  def io(self):
    return peers.read(self.name)[1]

  @property
  def arguments(self):
    return {'class': self.says['class'], **self.says['config']}

  def state_dict(self):
    return peers.state_dict(self.says)

  def write(self, folder):
    """NAME.safetensors and NAME.json; the path of the former."""
    path = folder / f'{self.name}.safetensors'
    safetensors.numpy.save_file(self.state_dict(), path)
    path.with_suffix('.json').write_text(json.dumps(self.arguments))
    return path

  def labels(self, name):
    """Classes as this project has them, for one-hot rows; None without classes."""
    return np.argmax(self.io[name], 1).astype(np.int32) if name in self.io else None

  def error(self, name, found):
    """The largest difference from the recorded output, as a share of what is allowed."""
    wanted = np.float64(self.io[f'out/{name}'])
    apart = np.abs(np.float64(found) - wanted).max() / np.abs(wanted).max()
    return apart / max(1e-5, 5 * self.says['sensitivity'].get(name, 0.0))


class Answers:
  """A model in the coordinates of Karras et al. (2022): y = x + s n, and D, F and c_noise of it. One program, 4 images."""

  def __init__(self, stored):
    self.stored = stored
    network = stored.denoise.network

    def call(params, y, s, label):
      logsnr = -2.0 * jnp.log(s)
      z = y * alpha_sigma(logsnr, y)[0]
      cond = None if label is None else {'label': label}
      given = stored.denoise._input(z, logsnr)
      raw = network.apply({'params': params}, given, logsnr, cond)
      turned = -raw if network.preconditioning == 've' else raw
      return stored.denoise(params, z, logsnr, cond).x, turned, network.noise_input(logsnr)

    self._call = jax.jit(call)

  def __call__(self, y, s, label=None):
    """D, F, c_noise for up to 4 images."""
    conditional = bool(self.stored.denoise.conditioning)
    if conditional and label is None:
      label = np.full(len(y), -1, np.int32)
    size = len(y)
    y, s, label = (
      None if a is None else np.resize(a, (4, *np.shape(a)[1:]))
      for a in (np.float32(y), np.float32(s), label)
    )
    return [np.array(a)[:size] for a in self._call(self.stored.params, y, s, label)]

  def sample(self, latent, label, sampler):
    """Karras et al. 2022, algorithm 1, over `Denoiser`: state in float64, network in float32."""
    rho, steps = 1.0 / sampler['rho'], sampler['num_steps']
    low = max(sampler['sigma_min'], sampler['net_sigma_min'])
    high = min(sampler['sigma_max'], sampler['net_sigma_max'] or np.inf)
    levels = (high**rho + np.arange(steps) / (steps - 1) * (low**rho - high**rho)) ** (1.0 / rho)
    levels = [*levels, 0.0]

    def slope(y, s):
      return (y - np.float64(self(y, np.full(len(y), s), label)[0])) / s

    y = np.float64(latent) * levels[0]
    for s, to in itertools.pairwise(levels):
      first = slope(y, s)
      euler = y + (to - s) * first
      y = y + (to - s) * (first + slope(euler, to)) / 2 if to else euler
    return np.float32(y)


def check(case, folder):
  """Every recorded output of a case, by a model that was imported from its state dict."""
  answer, io = Answers(edm.read(case.write(folder))), case.io
  labels = case.labels('in/class_labels')
  found = dict(zip(('D', 'F', 'c_noise'), answer(io['in/x'], io['in/sigma'], labels), strict=True))
  if labels is not None:
    found['D_no_label'] = answer(io['in/x'], io['in/sigma'])[0]
  if 'in/x_flat' in io:
    some = None if labels is None else labels[:2]
    found['D_flat'], found['F_flat'], _ = answer(io['in/x_flat'], io['in/sigma'][:2], some)
    latent, sampler = io['in/latent'], case.says['sampler']
    found['sampler_out'] = answer.sample(latent, case.labels('in/sampler_labels'), sampler)
  recorded = {name.removeprefix('out/') for name in io if name.startswith('out/')}
  assert recorded <= set(found)
  errors = {name: case.error(name, found[name]) for name in sorted(recorded)}
  assert max(errors.values()) < 1.0, errors
