"""Class-conditional ImageNet 64x64 in one step by DMD (Yin et al. 2023), from NVIDIA's EDM model (ADM).

main.py --mode=import --source=edm --checkpoint=edm-imagenet-64x64-cond-adm.pkl --config=configs/edm_imagenet64.py --workdir=DIR
main.py --config=configs/edm_imagenet64.py --workdir=DIR
"""

import ml_collections

from configs import edm_cifar10


def get_config() -> ml_collections.ConfigDict:
  """Returns the config: 350,000 updates of 336 images; pairs from 256 Heun steps."""
  c = edm_cifar10.common()
  c.dataset.name = 'imagenet2012'
  c.dataset.image_size = 64

  c.pairs.num_pairs = 25_000
  c.pairs.num_steps = 256
  c.dmd.num_updates = 350_000
  c.dmd.batch_size = 336
  c.dmd.learning_rate = 2e-6
  c.dmd.fake_learning_rate = 2e-6
  return c
