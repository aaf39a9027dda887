"""Time of a sampler call by its number of steps, with the digits network: python benchmarks/sampling.py

Prints seconds a call (the median of some), as they are and as a ratio to N times one step. One
program serves all step counts, so the compilation is in none of them; its time is printed apart.
"""

import pathlib
import statistics
import sys
import time

import jax

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from configs import digits
from diffusion_distillation import datasets
from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.samplers import SAMPLERS
from diffusion_distillation.evaluation import sampling
from diffusion_distillation.stages import plan

REPEATS = 5


def main() -> None:
  """Prints one table a sampler."""
  config = digits.get_config()
  base = plan.plan(config, *datasets.describe(datasets.Settings.of(config.dataset)))[0]
  size = config.evaluation.batch_size
  params = base.init_params(jax.random.key(0))
  print(f'{jax.device_count()} {jax.default_backend()} device(s), {size} images a call')
  for name, sampler in SAMPLERS.items():
    drawer = sampling.Drawer(base.denoise, sampler(), base.schedule, base.space, base.image_shape, size)

    def seconds(num_steps: int, drawer: sampling.Drawer = drawer) -> float:
      began = time.perf_counter()
      drawer.draw(params, times.uniform(num_steps), size, 0)
      return time.perf_counter() - began

    print(f'\n{name}: first call, with compilation, {seconds(1):.1f} s')
    print('   N   seconds   ratio to N times one step')
    one = 0.0
    for num_steps in (1, 2, 4, 8, 16, 32, 64):
      took = statistics.median(seconds(num_steps) for _ in range(REPEATS))
      one = one or took
      print(f'{num_steps:4d}   {took:7.4f}   {took / (num_steps * one):.2f}')


if __name__ == '__main__':
  main()
