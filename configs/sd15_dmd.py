"""Stable Diffusion 1.5 in one step, with the settings of DMD (Yin et al. 2023, section 4.3); see docs/text_to_image.md.

main.py --mode=import --source=stable_diffusion --checkpoint=stable-diffusion-v1-5 --config=configs/sd15_dmd.py --workdir=DIR
main.py --config=configs/sd15_dmd.py --config.dataset.path=prompts.txt --workdir=DIR

These are the settings of the paper's run on LAION-Aesthetics 6.25+, with guidance 3; `:guidance_8` has those of the run on 6+,
with guidance 8. `:lora` trains adapters of rank 64 with batches of 64 examples, for one GPU; these settings are ours, and have not been
run at full size. `:guidance_8,lora` is both. In contrast to the paper, DPM-Solver++ draws the pairs instead of PNDM, and the
regression's batch is as large as the other one.
"""

import ml_collections

from configs import stable_diffusion


def get_config(variant: str = '') -> ml_collections.ConfigDict:
  """Returns the config.

  Args:
    variant: '' for guidance 3, 20,000 updates and 500,000 pairs; 'guidance_8' for guidance 8, 165,000 and 12 million; 'lora' for
      adapters, batches of 64 and 50,000 pairs; or 'guidance_8,lora'.
  """
  chosen = stable_diffusion.variants(variant, ('guidance_8', 'lora'))
  strong, lora = 'guidance_8' in chosen, 'lora' in chosen
  c = stable_diffusion.distilled('dmd', lora)
  guidance = 7.0 if strong else 2.0  # W, which is diffusers' guidance_scale less 1

  c.pairs.num_pairs = 12_000_000 if strong else 500_000
  c.pairs.sampler = 'dpm_solver_2m'
  c.pairs.num_steps = 50
  c.pairs.clip_x = False
  c.pairs.batch_size = 64
  c.pairs.guidance = guidance

  c.dmd.num_updates = 165_000 if strong else 20_000
  c.dmd.batch_size = 2304
  c.dmd.guidance = guidance
  c.dmd.regression = 0.25
  if lora:
    c.pairs.num_pairs = 50_000
    c.dmd.num_updates = 20_000
    c.dmd.batch_size = 64
    c.dmd.micro_batches = 8
  return c
