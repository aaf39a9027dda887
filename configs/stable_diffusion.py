"""Stable Diffusion 1.x and 2.x, imported from a folder of diffusers and sampled; see docs/text_to_image.md.

main.py --mode=import --source=stable_diffusion --checkpoint=stable-diffusion-v1-5 --config=configs/stable_diffusion.py --workdir=DIR
main.py --mode=sample --workdir=DIR --prompts="a lighthouse at dusk" --guidance=6.5 --out=lighthouse.png
"""

import ml_collections

from configs import default


def get_config() -> ml_collections.ConfigDict:
  """Returns the config: 50 DDIM steps, as in diffusers' pipeline, and no students, which latents do not have yet."""
  c = default.get_config()
  c.dataset.name = 'none'
  c.methods = ()
  c.distill.start_steps = 50
  c.evaluation.grid = 'leading_to_first'
  c.evaluation.clip_x = False
  return c
