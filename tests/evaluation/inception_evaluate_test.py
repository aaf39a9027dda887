"""Evaluation with the Inception of the FID, which stands for the network here with a few numbers of each image."""

import json
import shutil

import numpy as np
import pytest

from diffusion_distillation.evaluation import inception
from diffusion_distillation.evaluation.features import FeatureExtractor
from diffusion_distillation.evaluation.reference import directory_of
from diffusion_distillation.networks.inception import Outputs
from tests import tiny


def simple(params, images, num_logits):
  """Means of quarters of the image."""
  quarters = images.reshape(len(images), 23, 13, 23, 13, 3).mean((2, 4, 5)).reshape(len(images), -1)
  features = quarters[:, ::53]
  return Outputs(
    features, features[:, :4] * params['fc']['bias'][None], features[:, :3], None, None, None
  )


@pytest.fixture
def workdir(finished, tmp_path, monkeypatch):
  weights = inception.Weights({'fc': {'bias': np.full(4, 5, np.float32)}}, 4, 'd' * 64)
  monkeypatch.setattr(inception, 'read_weights', lambda path, flag: weights)
  monkeypatch.setattr(inception, '_forward', simple)
  return shutil.copytree(finished, tmp_path / 'workdir')


def results(workdir):
  return json.loads((workdir / 'results.json').read_text())


@pytest.mark.slow
def test_a_run_is_measured_by_the_file_that_is_named(workdir, tmp_path):
  before = results(workdir)
  kept = {p.name: p.read_bytes() for p in (workdir / 'features').glob('*.safetensors')}
  args = ('--mode=evaluate', f'--workdir={workdir}', *tiny.flags(evaluation__inception='weights.pth'))
  code, _, err = tiny.run_cli(*args)
  assert code == 0, err
  assert 'published figures are taken with 10000 and more' in err
  after = results(workdir)
  assert kept == {p.name: p.read_bytes() for p in (workdir / 'features').glob('*.safetensors')}
  assert after['metric'] == 'FID' and after['extractor']['digest'] == 'd' * 64
  assert {row['metric'] for row in after['rows']} == {'FID'}
  assert len(after['rows']) == len(before['rows'])
  assert {'inception_score', 'sfid'} <= {name.lower() for name in after['metrics']}
  report = (workdir / 'report' / 'index.html').read_text()
  assert 'Features: inception-2015-12-05, digest <code>dddddddddddddddd</code>' in report
  for one, other in zip(before['rows'], after['rows'], strict=True):
    assert np.isfinite(other['value']) and one['value'] != other['value']


def test_features_of_the_classifier_and_of_inception_do_not_replace_each_other(tmp_path):
  """The gate and measurements during training always use the classifier, whatever the evaluation uses."""
  found = inception.InceptionExtractor(inception.Weights({}, 0, 'd' * 64))
  classifier = FeatureExtractor('digits', 'c' * 64, 'classes', 0.9, {})
  places = {directory_of(tmp_path, extractor) for extractor in (found, classifier)}
  assert places == {tmp_path / 'features', tmp_path / 'features' / 'inception-2015-12-05'}


@pytest.mark.parametrize('name', ['inception', 'dinov2'])
def test_a_file_that_cannot_be_read_is_refused_before_the_training(tmp_path, name):
  workdir = tmp_path / 'new'
  named = {f'evaluation__{name}': tmp_path / 'none.pth'}
  args = (*tiny.flags(**named), f'--workdir={workdir}')
  code, _, err = tiny.run_cli(*args)
  assert code == 2 and not workdir.exists()
  assert err.startswith(f'error: evaluation.{name}={tmp_path}/none.pth: there is no such file')
