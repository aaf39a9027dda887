"""Stable Diffusion 1.5 with the settings of DMD2's released code, without images; see docs/text_to_image.md.

main.py --mode=import --source=stable_diffusion --checkpoint=stable-diffusion-v1-5 --config=configs/sd15_dmd2.py --workdir=DIR
main.py --config=configs/sd15_dmd2.py --config.dataset.path=prompts.txt --workdir=DIR

One step; `:four_steps` trains four, with backward simulation; `:lora` trains adapters of rank 64 with batches of 64 examples, for one
GPU, with settings that are ours and have not been run at full size; `:four_steps,lora` is both. The GAN needs images and is off: it is
the second phase of the released run, with learning rates of 5e-7, dmd2.gan_generator=1e-3 and dmd2.gan_fake=1e-2.
"""

import ml_collections

from configs import stable_diffusion


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config.

  Args:
    variant: '' for one step, 'four_steps' for four, 'lora' for adapters and batches of 64; or 'four_steps,lora'.
  """
  chosen = stable_diffusion.variants(variant, ('four_steps', 'lora'))
  c = stable_diffusion.distilled('dmd2', 'lora' in chosen)
  c.dmd2.num_steps = 4 if 'four_steps' in chosen else 1
  c.dmd2.num_updates = 40_000
  c.dmd2.batch_size, c.dmd2.micro_batches = (64, 8) if 'lora' in chosen else (2048, 1)
  c.dmd2.fake_updates = 10
  c.dmd2.guidance = 0.75  # diffusers' guidance_scale less 1
  c.dmd2.gan_generator = 0.0
  c.dmd2.gan_fake = 0.0
  return c
