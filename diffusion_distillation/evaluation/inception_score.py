"""The Inception score (Salimans et al. 2016), from sums over the class probabilities of the samples."""

import numpy as np

from diffusion_distillation.evaluation.uncertainty import Estimate

SPLITS = 10  # as in the paper


class RunningScore:
  """Accumulates, for each split, the number of samples, sum_y p log p over the samples, and the sum of p, (SPLITS, 2 + K).

  Of ten samples in a row, one is in each split, in random order: with a fixed order, samples whose classes are drawn in turn
  would have one class per split.
  """

  def __init__(self) -> None:
    self._rng, self._ahead = np.random.Generator(np.random.Philox(0)), np.zeros(0, np.int64)
    self._sums = np.zeros(())

  def add(self, logits: np.ndarray) -> None:
    """Adds a batch of logits (n, K); the split of a sample depends only on the number of samples before it."""
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(axis=1, keepdims=True)
    log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    p = np.exp(log_p)
    terms = np.concatenate([np.ones((len(p), 1)), (p * log_p).sum(1, keepdims=True), p], axis=1)
    members = (self._assign(len(p))[None, :] == np.arange(SPLITS)[:, None]).astype(np.float64)
    self._sums = self._sums + members @ terms

  def _assign(self, count: int) -> np.ndarray:
    """Returns the splits (count,) of the next samples."""
    rows = -(-(count - len(self._ahead)) // SPLITS)
    if rows > 0:
      blocks = np.broadcast_to(np.arange(SPLITS), (rows, SPLITS))
      self._ahead = np.concatenate([self._ahead, self._rng.permuted(blocks, axis=1).reshape(-1)])
    found, self._ahead = self._ahead[:count], self._ahead[count:]
    return found

  def result(self) -> np.ndarray:
    """Returns the sums of all samples, (SPLITS, 2 + K) float64."""
    return self._sums


def inception_score(sums: np.ndarray) -> Estimate:
  """Returns exp(E_x KL(p(y|x) || p(y))) with p(y) = E_x p(y|x), as the mean over the splits; between 1 and K.

  Args:
    sums: the result of a `RunningScore`.

  Returns:
    The mean over the splits, and as `error` their standard deviation, which is the spread that papers print.
  """
  sums = sums[sums[:, 0] > 0.0]
  means = sums[:, 1:] / sums[:, :1]
  marginal = means[:, 1:]
  log_marginal = np.log(np.where(marginal > 0.0, marginal, 1.0))
  scores = np.exp(means[:, 0] - (marginal * log_marginal).sum(axis=1))
  return Estimate(float(scores.mean()), float(scores.std()))
