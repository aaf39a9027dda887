"""NVIDIA's EDM models: a state dict with its arguments, the form of the public pickles, and files that mean harm."""

import io
import json
import math
import os
import pickle
import struct
import sys
import types

import numpy as np
import pytest
import safetensors.numpy
from flax import traverse_util

import diffusion_distillation
from diffusion_distillation.diffusion.schedules import Karras, LinearBeta
from diffusion_distillation.interop import edm
from diffusion_distillation.networks.song_unet import SongUNet
from diffusion_distillation.system.checkpoints import digest
from tests import edm_cases, tiny
from tests.interop.google_test import refused

CASE = edm_cases.Case('ve_ncsnpp_cond')


# A writer of the public form: names as in the released files, behind which is nothing.


def _module(monkeypatch, name, **members):
  made = types.ModuleType(name)
  for key, value in members.items():
    if hasattr(value, '__module__'):
      value.__module__, value.__qualname__ = name, key
    setattr(made, key, value)
  monkeypatch.setitem(sys.modules, name, made)
  return made


class Calls:
  """Pickled as a call of `function` with `arguments`."""

  def __init__(self, function, *arguments):
    self.reduced = (function, arguments)

  def __reduce__(self):
    return self.reduced


def storage(values, declared=None, magic=0x1950A86A20F9469CFC6C, numbers=None):
  """torch's legacy format of one storage, as its tensors have it in a pickle."""

  class Pickler(pickle.Pickler):
    def persistent_id(self, thing):
      return ('storage', kind, '7', 'cpu', count, None) if thing is storage else None

  count = len(values) if declared is None else declared
  kind = sys.modules['torch'].FloatStorage
  stream = io.BytesIO()
  for thing in (magic, 1001, {'little_endian': True}):
    pickle.dump(thing, stream, protocol=2)
  Pickler(stream, protocol=2).dump(storage)
  pickle.dump(['7'], stream, protocol=2)
  stream.write(struct.pack('<q', len(values) if numbers is None else numbers))
  return stream.getvalue() + values.tobytes()


@pytest.fixture
def peers(monkeypatch):
  """The functions and classes that the released files name, as stand-ins that do nothing."""
  made = types.SimpleNamespace()
  for name in ('rebuild_tensor', 'rebuild_parameter', 'load', 'persistent'):
    setattr(made, name, lambda *arguments: None)
  made.dict, made.container = type('EasyDict', (dict,), {}), type('ModuleDict', (), {})
  for name in ('torch.nn', 'torch.nn.modules', 'torch_utils', 'dnnlib'):
    _module(monkeypatch, name)
  _module(monkeypatch, 'torch', FloatStorage=type('FloatStorage', (), {}))
  named = {'_rebuild_tensor_v2': made.rebuild_tensor, '_rebuild_parameter': made.rebuild_parameter}
  _module(monkeypatch, 'torch._utils', **named)
  _module(monkeypatch, 'torch.storage', _load_from_bytes=made.load)
  _module(monkeypatch, 'torch.nn.modules.container', ModuleDict=made.container)
  _module(monkeypatch, 'torch_utils.persistence', _reconstruct_persistent_obj=made.persistent)
  _module(monkeypatch, 'dnnlib.util', EasyDict=made.dict)

  def tensor(values, offset=0, shape=None, strides=None, raw=None):
    values = np.ascontiguousarray(values, np.float32)
    shape = values.shape if shape is None else shape
    strides = tuple(s // 4 for s in values.strides) if strides is None else strides
    held = Calls(made.load, storage(values.ravel()) if raw is None else raw)
    return Calls(made.rebuild_tensor, held, offset, shape, strides, False, {})

  made.tensor = tensor
  return made


def module(peers, kind, arrays, **arguments):
  """A persistent object of the class `kind` that holds these arrays, by names with dots."""
  parts = {}
  for name, values in arrays.items():
    first, _, rest = name.partition('.')
    parts.setdefault(first, {})[rest] = values
  state = {'_parameters': {}, '_buffers': {}, '_modules': {}, 'training': False, 'hooks': {None}}
  for name, inside in parts.items():
    if '' not in inside:
      state['_modules'][name] = module(peers, 'Anything', inside)
    elif name in ('freqs', 'resample_filter'):
      state['_buffers'][name] = peers.tensor(inside[''])
    else:
      held = peers.tensor(inside[''])
      state['_parameters'][name] = Calls(peers.rebuild_parameter, held, False, {})
  state |= {'_init_args': (), '_init_kwargs': peers.dict(arguments), 'scale': np.sqrt(0.5)}
  source = 'raise SystemExit("the source code was run")'
  meta = {'type': 'class', 'version': 6, 'module_src': source, 'class_name': kind, 'state': state}
  return Calls(peers.persistent, meta)


def pickled(peers, path, arrays=None, protocol=4, **changes):
  case = CASE.state_dict() if arrays is None else arrays
  arguments = {k: v for k, v in CASE.arguments.items() if k != 'class'}
  network = module(peers, CASE.arguments['class'], case, **arguments | changes)
  held = {'ema': network, 'loss_fn': None, 'augment_pipe': peers.container()}
  path.write_bytes(pickle.dumps(held, protocol=protocol))
  return path


@pytest.mark.parametrize('protocol', [2, 4])
def test_a_pickle_of_the_public_form_is_what_its_state_dict_is(peers, tmp_path, protocol):
  found = edm.read(pickled(peers, tmp_path / 'model.pkl', protocol=protocol))
  expected = edm.read(CASE.write(tmp_path))
  assert found.denoise == expected.denoise and found.schedule == expected.schedule
  assert digest(found.params) == digest(expected.params)


def test_a_state_dict_is_turned_into_our_shapes(tmp_path):
  """(out, in, height, width) to (height, width, in, out); rows of qkv are (head, channel, which of the three)."""
  stored, peer = edm.read(CASE.write(tmp_path)), CASE.state_dict()
  flat = traverse_util.flatten_dict(stored.params, sep='/')
  conv = peer['model.enc.8x8_block0.conv0.weight']
  np.testing.assert_array_equal(flat['enc.8x8_block0/conv0/kernel'][2, 1, 5, 3], conv[3, 5, 2, 1])
  qkv = peer['model.dec.4x4_in0.qkv.weight'][:, :, 0, 0]
  np.testing.assert_array_equal(flat['dec.4x4_in0/qkv/kernel'][7, 1, 0, 4], qkv[3 * 4 + 1, 7])
  np.testing.assert_array_equal(flat['map_layer0/kernel'].T, peer['model.map_layer0.weight'])
  network = stored.denoise.network
  np.testing.assert_array_equal(network.frequencies, peer['model.map_noise.freqs'])
  assert isinstance(network, SongUNet) and network.dropout == 0.0 and network.num_classes == 5
  assert (stored.image_shape, stored.sampler, stored.times) == ((8, 8, 3), 'edm_heun', 'karras')
  assert (stored.num_steps, stored.clip_x) == (18, False)


def test_the_noise_levels_are_those_of_the_file(tmp_path):
  assert edm.read(CASE.write(tmp_path)).schedule == Karras(0.02, 100.0)
  assert edm.read(edm_cases.Case('edm_skip_aug').write(tmp_path)).schedule == Karras(0.002, 80.0)
  stored = edm.read(edm_cases.Case('vp_adm').write(tmp_path))
  assert isinstance(stored.schedule, LinearBeta) and stored.schedule.beta_max == pytest.approx(15.2)
  ends = np.exp(-0.5 * np.float64(stored.schedule(np.float32([1e-30, 1.0]))))
  assert ends[0] == pytest.approx(math.sqrt(math.expm1(0.2e-4 + 7.5e-8)), rel=1e-4)
  assert ends[1] == pytest.approx(math.sqrt(math.expm1(0.2 + 7.5)), rel=1e-4)


@pytest.mark.slow
def test_it_is_imported_and_drawn_from_without_a_config_of_its_network(tmp_path):
  path, into = CASE.write(tmp_path), tmp_path / 'run'
  flags = ['--config=configs/default.py', '--config.dataset.name=none', '--config.methods=()']
  flags += ['--config.evaluation.samplers=("edm_heun",)', '--config.evaluation.grid=karras']
  source = ('--mode=import', '--source=edm', f'--checkpoint={path}')
  code, out, err = tiny.run_cli(*flags, *source, f'--workdir={into}')
  assert code == 0, err
  assert 'base: imported, for 18 steps' in out
  lineage = json.loads((into / 'base' / 'stage.json').read_text())
  assert (lineage['imported']['source'], lineage['imported']['file']) == ('edm', path.name)
  model = diffusion_distillation.load(into / 'base')
  assert digest(model.stored.params) == digest(edm.read(path).params)
  network = model.stored.denoise.network
  assert network.frequencies == edm.read(path).denoise.network.frequencies
  assert (model.stored.sampler, model.stored.times, model.stored.num_steps) == ('edm_heun', 'karras', 18)
  assert model.sample(2, labels=[1], steps=2).shape == (2, 8, 8, 3)


# Files that are not what they should be.


def changed(case, path, arrays=None, drop=(), **arguments):
  """A pair of files with other arrays and arguments."""
  held = {k: v for k, v in (case.state_dict() | (arrays or {})).items() if k not in drop}
  safetensors.numpy.save_file(held, path)
  says = {k: v for k, v in (case.arguments | arguments).items() if k not in drop}
  path.with_suffix('.json').write_text(json.dumps(says))


BIAS = 'model.map_layer1.bias'
MISFITS = {
  'a class of another kind': ({'class': 'iDDPMPrecond'}, "class='iDDPMPrecond' is not one of"),
  'no class': ({'class': None}, "class='None' is not one of"),
  'a network of another kind': ({'model_type': 'VDM'}, "model_type='VDM' is not one of"),
  'an argument too many': ({'learn_sigma': True}, 'learn_sigma is not a supported argument'),
  'an argument too few': ({'drop': ['img_resolution']}, 'img_resolution is missing'),
  'a number for a list': ({'channel_mult': 2}, 'channel_mult=2 is not supported'),
  'no channels': ({'model_channels': 0}, 'model_channels=0 is not supported'),
  'too many': ({'img_resolution': 10**9}, 'img_resolution=1000000000 is not supported'),
  'blocks without end': ({'num_blocks': 99999}, 'num_blocks=99999 are more blocks than'),
  'another encoder': ({'encoder_type': 'round'}, "encoder='round' is not one of"),
  'levels that do not fit': ({'channel_mult': [1] * 6}, 'sides are divisible by 32'),
  'noise levels the wrong way': ({'sigma_min': 200.0}, 'sigma_min=200.0'),
  'another width': ({'channel_mult': [1, 3]}, 'has shape'),
  'a tensor too few': ({'drop': [BIAS]}, f'{BIAS} is missing'),
  'a tensor too many': ({'arrays': {'model.out': np.zeros(2)}}, 'model.out is not a parameter'),
  'another shape': ({'arrays': {BIAS: np.zeros((3, 2))}}, f'{BIAS} has shape (3, 2)'),
  'whole numbers': ({'arrays': {BIAS: np.zeros(64, np.int32)}}, f'{BIAS} holds int32'),
  'not a number': ({'arrays': {BIAS: np.full(64, np.nan, np.float32)}}, f'{BIAS} is not finite'),
}


@pytest.mark.parametrize('kind', MISFITS)
def test_what_does_not_fit_is_named(kind, tmp_path):
  change, message = MISFITS[kind]
  changed(CASE, tmp_path / 'model.safetensors', **change)
  found = refused(None, tmp_path / 'model.safetensors', tmp_path / 'run', 'edm')
  assert message in found and 'cannot be read' not in found


def test_another_standard_deviation_of_the_data_is_refused(tmp_path):
  changed(edm_cases.Case('edm_skip_aug'), tmp_path / 'model.safetensors', sigma_data=1.0)
  found = refused(None, tmp_path / 'model.safetensors', tmp_path / 'run', 'edm')
  assert 'sigma_data=1.0 is not supported' in found


def huge_header(path):
  path.write_bytes(struct.pack('<Q', 2**62) + b'{}')


def huge_tensor(path):
  header = json.dumps({BIAS: {'dtype': 'F32', 'shape': [2**40], 'data_offsets': [0, 2**42]}}).encode()
  path.write_bytes(struct.pack('<Q', len(header)) + header + bytes(16))


DAMAGED = {
  'cut off': lambda path: path.write_bytes(path.read_bytes()[:-1000]),
  'empty': lambda path: path.write_bytes(b''),
  'text': lambda path: path.write_text('weights'),
  'a huge header': huge_header,
  'a huge tensor': huge_tensor,
  'no arguments': lambda path: path.with_suffix('.json').unlink(),
  'arguments that are a list': lambda path: path.with_suffix('.json').write_text('[1]'),
  'arguments that are cut off': lambda path: path.with_suffix('.json').write_text('{"class": '),
  'a class that is a list': lambda path: path.with_suffix('.json').write_text('{"class": [1]}'),
}


@pytest.mark.parametrize('kind', DAMAGED)
def test_a_damaged_pair_is_one_line(kind, tmp_path):
  path = CASE.write(tmp_path)
  DAMAGED[kind](path)
  refused(None, path, tmp_path / 'run', 'edm')


def hostile(trap):
  """Pickles, each of which would make the file `trap`, or much memory, if it were unpickled."""
  command, name = f'touch {trap}', os.system.__module__.encode()
  word = struct.pack('<B', len(command)) + command.encode()
  inst = b"(S'" + command.encode() + b"'\ni" + name + b'\nsystem\n.'
  obj = b'(c' + name + b'\nsystem\n\x8c' + word + b'o.'
  new = b'\x80\x02c' + name + b'\nsystem\n\x8c' + word + b'\x85\x81.'
  new_ex = b'\x80\x04c' + name + b'\nsystem\n\x8c' + word + b'\x85}\x92.'
  return {
    'a call': pickle.dumps({'ema': Calls(os.system, command)}),
    'a call, protocol 0': pickle.dumps(Calls(os.system, command), protocol=0),
    'eval': pickle.dumps(Calls(eval, f'__import__("os").system({command!r})')),
    'getattr': pickle.dumps(Calls(getattr, 'os', 'system')),
    'INST': inst,
    'OBJ': obj,
    'NEWOBJ': new,
    'NEWOBJ_EX': new_ex,
    'EXT1': b'\x82\x01.',
    'PERSID': b'Pwhatever\n.',
    'a huge string': b'\x8e' + struct.pack('<Q', 2**40) + b'x.',
    'a huge number': b'\x8b' + struct.pack('<i', 2**31 - 1) + b'x.',
    'no mark': b't.',
    'no stack': b'.',
    'no end': b'\x80\x04}',
    'a call of a value': pickle.dumps(1)[:-1] + b')R.',
    'a state for a number': pickle.dumps(1)[:-1] + b'}b.',
    'no network': pickle.dumps({'G_ema': 3}),
    'a list': pickle.dumps([1]),
    'text': b'not a pickle\n',
    'empty': b'',
    'an archive': b'PK\x03\x04' + bytes(100),
  }


KINDS = tuple(hostile('trap'))


@pytest.mark.parametrize('kind', KINDS)
def test_a_hostile_pickle_is_refused_and_not_executed(kind, tmp_path):
  path = tmp_path / 'model.pkl'
  path.write_bytes(hostile(tmp_path / 'trap')[kind])
  refused(None, path, tmp_path / 'run', 'edm')
  assert sorted(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize('kind', KINDS[:3] + KINDS[4:5])
def test_the_traps_would_have_worked(kind, tmp_path):
  pickle.loads(hostile(tmp_path / 'trap')[kind])
  assert (tmp_path / 'trap').exists()


INSIDE = {
  'a call in the state': lambda p, trap: {BIAS: Calls(os.system, f'touch {trap}')},
  'a call in a storage': lambda p, trap: {
    BIAS: p.tensor(np.zeros(64), raw=pickle.dumps(Calls(os.system, f'touch {trap}')))
  },
  'another magic number': lambda p, trap: {
    BIAS: p.tensor(np.zeros(64), raw=storage(np.zeros(64, np.float32), magic=1))
  },
  'more numbers than there are': lambda p, trap: {
    BIAS: p.tensor(np.zeros(64), raw=storage(np.zeros(64, np.float32), 2**40, numbers=2**40))
  },
  'another count of numbers': lambda p, trap: {
    BIAS: p.tensor(np.zeros(64), raw=storage(np.zeros(64, np.float32), numbers=3))
  },
  'fewer than none': lambda p, trap: {
    BIAS: p.tensor(np.zeros(64), raw=storage(np.zeros(64, np.float32), -1, numbers=-1))
  },
  'a view beyond the end': lambda p, trap: {BIAS: p.tensor(np.zeros(64), offset=1)},
  'a view before the beginning': lambda p, trap: {
    BIAS: p.tensor(np.zeros(64), strides=(-1,), offset=63)
  },
  'a view without end': lambda p, trap: {BIAS: p.tensor(np.zeros(64), shape=(2**40,), strides=(0,))},
  'no tensor': lambda p, trap: {BIAS: 'zeros'},
}


@pytest.mark.parametrize('kind', INSIDE)
def test_harm_inside_a_well_formed_pickle_is_refused(kind, peers, tmp_path, monkeypatch):
  changed = INSIDE[kind](peers, tmp_path / 'trap')
  whole = peers.tensor
  monkeypatch.setattr(peers, 'tensor', lambda v: whole(v) if isinstance(v, np.ndarray) else v)
  path = pickled(peers, tmp_path / 'model.pkl', CASE.state_dict() | changed)
  refused(None, path, tmp_path / 'run', 'edm')
  assert sorted(tmp_path.iterdir()) == [path]
