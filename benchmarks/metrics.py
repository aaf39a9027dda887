"""What the metrics of a row cost once its features are there: seconds and CPU seconds, over all cores, on random features.

The root of the reference's covariance, which all rows share, is computed beforehand.

  python benchmarks/metrics.py                                   a row of configs/digits.py
  python benchmarks/metrics.py --samples=10000 --reference=10000 --features=2048
"""

import argparse
import sys
import time

import numpy as np

from diffusion_distillation.evaluation.metrics import METRICS, Features, RunningFeatures, entry


def features(count: int, size: int, classes: int, seed: int) -> Features:
  """Returns features, logits, spatial features and those of DINOv2 of `count` images that do not exist."""
  rng, running = np.random.default_rng(seed), RunningFeatures(count)
  for start in range(0, count, 500):
    shape = min(500, count - start), size
    batch = np.maximum(rng.normal(size=shape), 0.0).astype(np.float32)
    running.add(batch, rng.normal(size=(shape[0], classes)).astype(np.float32), batch, batch)
  return running.result()


def main(argv: list[str] | None = None) -> None:
  """Prints a table."""
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
  parser.add_argument('--samples', type=int, default=5000, help='features of samples that are kept')
  parser.add_argument('--reference', type=int, default=1437, help='features of real images')
  parser.add_argument('--features', type=int, default=64, help='dimension of the features')
  parser.add_argument('--classes', type=int, default=10, help='number of logits')
  flags = parser.parse_args(argv)
  if min(flags.samples, flags.reference) < 2 or min(flags.features, flags.classes) < 1:
    sys.exit('error: metrics need at least 2 samples, 2 references, 1 feature and 1 class')
  samples, reference = (
    features(count, flags.features, flags.classes, seed)
    for seed, count in enumerate((flags.samples, flags.reference))
  )
  for shared in (reference, reference.spatial, reference.dinov2):
    assert shared is not None and shared.moments.root.size
  print('| metric | seconds | CPU seconds |\n|---|---|---|')
  for name in METRICS:
    began, cpu = time.perf_counter(), time.process_time()
    entry(name)(samples, reference)
    seconds, of_cpu = time.perf_counter() - began, time.process_time() - cpu
    print(f'| {name} | {seconds:.2f} | {of_cpu:.2f} |', flush=True)


if __name__ == '__main__':
  main()
