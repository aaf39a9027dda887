"""Stable Diffusion 1.x and 2.x, imported from a folder of diffusers and sampled; see docs/text_to_image.md.

main.py --mode=import --source=stable_diffusion --checkpoint=stable-diffusion-v1-5 --config=configs/stable_diffusion.py --workdir=DIR
main.py --mode=sample --workdir=DIR --prompts="a lighthouse at dusk" --guidance=6.5 --out=lighthouse.png
"""

import ml_collections

from configs import default
from diffusion_distillation.errors import UserError


def get_config() -> ml_collections.ConfigDict:
  """Returns the config: 50 DDIM steps, as in diffusers' pipeline, and no students; sd15_dmd.py and sd15_dmd2.py have some."""
  c = default.get_config()
  c.dataset.name = 'none'
  c.methods = ()
  c.distill.start_steps = 50
  c.evaluation.grid = 'leading_to_first'
  c.evaluation.samplers = ('ddim',)
  c.evaluation.num_samples = 5000  # because 50,000 images take hours
  c.evaluation.clip_x = False
  return c


def variants(given: str, known: tuple[str, ...]) -> set[str]:
  """Returns the variants in the string after a config's name, which may be several, separated by commas.

  Raises:
    UserError: one of them is not `known`.
  """
  found = set(filter(None, given.split(',')))
  for variant in sorted(found - set(known)):
    choices = ' or '.join(f':{name}' for name in known)
    raise UserError(f'config variant :{variant} is not known; leave it out, or choose {choices}')
  return found


def distilled(method: str, lora: bool = False) -> ml_collections.ConfigDict:
  """Returns what the configs of students share: prompts as data, little memory, and the optimizer of DMD and DMD2.

  Args:
    method: name of the method.
    lora: whether low-rank adapters of the generator and of the fake score are trained, with a batch and learning rates for one GPU.
  """
  c = get_config()
  c.dataset.name = 'prompts'
  c.dataset.encoded_dtype = 'float16'
  c.weighting = 'snr'
  c.methods = (method,)

  section = c[method]
  section.learning_rate = 1e-5
  section.fake_learning_rate = 1e-5
  section.weight_decay = 0.01
  section.warmup = 500
  section.clip_norm = 10.0
  section.fake_weighting = 'snr'

  c.compute.dtype = 'bfloat16'
  c.compute.teacher_dtype = 'bfloat16'
  c.compute.remat = True
  c.checkpoint.every = 500
  c.log.measured_updates = 0  # a network of this size takes minutes to compile
  if lora:
    c.lora.rank = 64
    section.learning_rate = 1e-4  # adapters, which start from 0, need larger ones
    section.fake_learning_rate = 1e-4
  return c
