"""Lines of metrics.jsonl."""

import numpy as np

from diffusion_distillation.run import loop


def test_a_line_of_metrics_has_the_means_of_what_is_finite():
  losses = [2.0, np.nan, 4.0, np.inf]
  updates = [{'loss': np.float32(x), 'skipped': k, 'skipped_in_a_row': 0} for k, x in enumerate(losses)]
  updates[0]['turn'] = np.float32(7.0)
  assert loop._summary(updates) == {'loss': 3.0, 'turn': 7.0, 'skipped': 3.0}
