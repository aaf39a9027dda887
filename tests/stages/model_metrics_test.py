"""Measurements in the folder of a model."""

import dataclasses

import pytest

from diffusion_distillation.stages import model
from tests.stages.model_test import MODELS, assert_equal


@pytest.fixture
def folder(tmp_path):
  model.write(tmp_path / 'model', MODELS['conditional']())
  return tmp_path / 'model'


def test_measurements_are_recorded_in_place_of_those_before(folder):
  rows = [{'metric': 'FD', 'value': 0.5}, {'metric': 'FD', 'value': 2.0}]
  weights = (folder / model.WEIGHTS).read_bytes()
  model.add_metrics(folder, rows)
  assert_equal(model.read(folder), dataclasses.replace(MODELS['conditional'](), metrics=tuple(rows)))
  assert (folder / model.WEIGHTS).read_bytes() == weights
  before = (folder / model.DESCRIPTION).stat().st_mtime_ns
  model.add_metrics(folder, rows)
  assert (folder / model.DESCRIPTION).stat().st_mtime_ns == before
  model.write(folder, MODELS['conditional']())  # as a resumed run does
  assert model.read(folder, weights=False).metrics == tuple(rows)


def test_measurements_of_a_model_that_is_not_there_are_not_recorded(tmp_path):
  model.add_metrics(tmp_path / 'model', [{'value': 0.5}])
  assert not (tmp_path / 'model').exists()
