"""Stored pairs of a guided teacher: what is drawn, what is recorded, and what older ones were."""

import dataclasses
import json

import numpy as np
import pytest

from diffusion_distillation.diffusion import times
from diffusion_distillation.diffusion.guidance import Guidance
from diffusion_distillation.errors import UserError
from diffusion_distillation.run import pairs
from tests.run.pairs_test import ONE, SIZES, ddim, everything, teacher, workdir_of

GUIDED = dataclasses.replace(ONE, guidance=Guidance(1.5))


def test_guided_pairs_are_those_of_the_shifted_means(tmp_path):
  """Without a class the mean is 0.1; guidance moves the class's, 0.2 + 0.1 c, by W times the difference."""
  workdir = workdir_of(tmp_path / 'guided', SIZES)
  found = everything(pairs.ensure(workdir, GUIDED, teacher(num_classes=3)))
  means = 0.2 + 0.1 * found['cond']['label'][:, None, None, None]
  expected = ddim(found['noise'], times.uniform(3), means + 1.5 * (means - 0.1))
  np.testing.assert_allclose(found['image'], expected, atol=1e-5)
  assert json.loads((workdir / 'pairs' / 'pairs.json').read_text())['guidance'] == 1.5


def test_pairs_of_before_were_not_guided(tmp_path, monkeypatch):
  stored = pairs.ensure(tmp_path, ONE, teacher())
  path = tmp_path / 'pairs' / 'pairs.json'
  described = json.loads(path.read_text())
  assert described.pop('guidance') == 0.0
  path.write_text(json.dumps(described))
  monkeypatch.setattr('diffusion_distillation.run.pairs.Drawer.pairs', None)  # nothing is drawn again
  assert pairs.ensure(tmp_path, ONE, teacher()).digest == stored.digest
  with pytest.raises(UserError, match=r'guidance was 0\.0, is 1\.5'):
    pairs.ensure(tmp_path, GUIDED, teacher())
