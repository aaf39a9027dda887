"""Recorded outputs of other projects' networks; see tests/parity_peers/. Weights are functions of their names."""

import json
import pathlib
import shutil
import zlib

import numpy as np
import safetensors.numpy

from tests.parity_peers import weights

ROOT = pathlib.Path(__file__).parent / 'parity_peers'


def read(name):
  """A case's description, and its arrays by name."""
  with np.load(ROOT / name / 'io.npz') as arrays:
    return json.loads((ROOT / name / 'case.json').read_text()), dict(arrays)


def state_dict(case):
  """The weights of a case by the peer's names, in the peer's layout; each is checked against its recorded crc32."""
  return {entry['name']: tensor(case, entry) for entry in case['parameters']}


def tensor(case, entry):
  """One of the weights; of kind `fixed` are the filters of resampling, as torch's buffers hold them."""
  if entry['kind'] == 'fixed':
    taps = case['config'].get('resample_filter', (1, 1))
    return (np.outer(taps, taps) / np.sum(taps) ** 2).astype(np.float32).reshape(entry['shape'])
  name = entry.get('weights_name', entry['name'])
  made = weights.tensor(name, entry['shape'], entry['kind'], case.get('weights_gain', 1))
  assert zlib.crc32(made.tobytes()) == entry['crc32'], name
  return made


def write_pipeline(folder, case):
  """A case as a pipeline folder of diffusers."""
  (folder / 'unet').mkdir(parents=True)
  (folder / 'scheduler').mkdir()
  network = {'_class_name': case['class']} | case['config']
  files = {
    'model_index.json': {'_class_name': 'DDPMPipeline', 'unet': ['diffusers', case['class']]},
    'unet/config.json': network,
    'scheduler/scheduler_config.json': {'_class_name': 'DDPMScheduler'} | case['scheduler_config'],
  }
  for name, content in files.items():
    (folder / name).write_text(json.dumps(content))
  safetensors.numpy.save_file(state_dict(case), folder / 'unet' / 'diffusion_pytorch_model.safetensors')
  return folder


STABLE_DIFFUSION = {
  'unet': 'diffusion_pytorch_model.safetensors',
  'vae': 'diffusion_pytorch_model.safetensors',
  'text_encoder': 'model.safetensors',
}


def part_of(case, part):
  """The weights of one network of a Stable Diffusion case, by the names in the peer's files."""
  state = state_dict({'parameters': case['parameters'][part]})
  return {name.removeprefix('text_model.'): value for name, value in state.items()}


def write_stable_diffusion(folder, case):
  """A case as a pipeline folder of diffusers: its own JSON files, and the weights by name."""
  shutil.copytree(ROOT / case['name'] / 'pipeline', folder)
  for part, name in STABLE_DIFFUSION.items():
    safetensors.numpy.save_file(part_of(case, part), folder / part / name)
  return folder


def assert_close(case, key, ours, theirs):
  """Within max(1e-5, 5 times the case's sensitivity) of the largest number."""
  tolerance = max(1e-5, 5.0 * case['sensitivity'].get(key, 0.0))
  apart = np.abs(np.asarray(ours, np.float64) - theirs).max() / np.abs(theirs).max()
  assert apart <= tolerance, f'{key}: {apart:.2e} > {tolerance:.2e}'
