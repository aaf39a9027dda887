"""Files of torch.save, as torch wrote them, and files that mean harm."""

import io
import pickle
import re
import struct
import zipfile

import numpy as np
import pytest

from diffusion_distillation.errors import UserError
from diffusion_distillation.system import torch_files
from tests import tiny

FILES = tiny.ROOT / 'tests' / 'torch_files'  # written by torch 2.13; tensors.npz holds the same numbers
FORMS = ('since_1_6.pth', 'before_1_6.pth')


def changed(path, change, name='since_1_6', compress=zipfile.ZIP_STORED):
  """The recorded zip with its members, by name below the folder, changed."""
  with zipfile.ZipFile(FILES / 'since_1_6.pth') as archive:
    members = {info.filename.partition('/')[2]: archive.read(info) for info in archive.infolist()}
  change(members)
  with zipfile.ZipFile(path, 'w', compress) as archive:
    for key, content in members.items():
      archive.writestr(key if '/' in key and key.startswith('/') else f'{name}/{key}', content)
  return path


def refusal(path):
  with pytest.raises(UserError) as caught:
    torch_files.read(path, f'--inception={path.name}')
  message = str(caught.value)
  assert message.startswith(f'--inception={path.name} ') and '\n' not in message and len(message) < 700
  return message


@pytest.mark.parametrize('form', FORMS)
def test_tensors_are_those_that_torch_wrote(form):
  """Of all types, turned, with gaps, of one storage, as parameters, and without numbers."""
  found = torch_files.read(FILES / form, 'x')
  with np.load(FILES / 'tensors.npz') as wanted:
    assert list(found) == wanted.files
    for name, value in wanted.items():
      np.testing.assert_array_equal(np.asarray(found[name], value.dtype), value)
  assert {str(found[name].dtype) for name in ('half', 'brain', 'double', 'long', 'flags')} == {
    *('float16', 'bfloat16', 'float64', 'int64', 'bool')
  }


@pytest.mark.parametrize('name', ['archive', 'weights', 'a b.c'])
def test_the_folder_in_the_zip_may_have_any_name(tmp_path, name):
  found = torch_files.read(changed(tmp_path / 'x.pth', lambda members: None, name), 'x')
  assert len(found) == 16


def test_a_training_checkpoint_holds_its_state_dict(tmp_path):
  def nest(members):
    inner = members['data.pkl']
    members['data.pkl'] = b'\x80\x02}X\x0a\x00\x00\x00state_dict' + inner[2:-1] + b's.'

  assert len(torch_files.read(changed(tmp_path / 'x.pth', nest), 'x')) == 16


@pytest.mark.parametrize('form', FORMS)
def test_files_that_are_cut_off_are_refused(tmp_path, form):
  whole = (FILES / form).read_bytes()
  for length in (0, 1, 2, 20, 200, len(whole) // 2, len(whole) - 200, len(whole) - 1):
    path = tmp_path / 'x.pth'
    path.write_bytes(whole[:length])
    if form == 'since_1_6.pth' and length > 1:
      assert 'is damaged' in refusal(path)
    else:
      refusal(path)


class Harm:
  """A pickle that runs a command if it is loaded as pickle loads it."""

  def __init__(self, file):
    self.file = file

  def __reduce__(self):
    import os

    return os.system, (f'touch {self.file}',)


def test_functions_are_refused_by_name_and_not_called(tmp_path):
  victim = tmp_path / 'called'
  content = pickle.dumps({'x': Harm(victim)}, 2)
  path = changed(tmp_path / 'x.pth', lambda members: members.update({'data.pkl': content}))
  assert re.search(r"names '(posix|os|nt)\.system', which is refused", refusal(path))
  legacy = (FILES / 'before_1_6.pth').read_bytes()
  begin = legacy.index(b'ccollections')
  (tmp_path / 'y.pth').write_bytes(legacy[: begin - 2] + content + legacy[begin:])
  assert 'system' in refusal(tmp_path / 'y.pth')
  assert not victim.exists()


CHANGES = {
  'a storage is missing': (lambda members: members.pop('data/0'), 'data/0 is missing'),
  'a storage is short': (
    lambda members: members.update({'data/0': members['data/0'][:-4]}),
    'data/0 has 68 bytes instead of 18 float32',
  ),
  'big-endian': (lambda members: members.update(byteorder=b'big'), 'big-endian'),
  'TorchScript': (lambda members: members.update({'code/__torch__.py': b''}), 'TorchScript program'),
  'TorchScript by its constants': (
    lambda members: members.update({'constants.pkl': b''}),
    'torch.jit.load(FILE).state_dict()',
  ),
  'no tensors': (lambda members: members.update({'data.pkl': b'\x80\x02}.'}), 'holds no state dict'),
  'something else': (
    lambda members: members.update({'data.pkl': b'\x80\x02}X\x01\x00\x00\x00xK\x01s.'}),
    "holds something else than tensors by name ('x')",
  ),
  'a list': (lambda members: members.update({'data.pkl': b'\x80\x02].'}), 'holds no state dict'),
  'no pickle': (lambda members: members.pop('data.pkl'), 'has no data.pkl'),
  'a key that leads out': (
    lambda members: members.update(
      {'data.pkl': members['data.pkl'].replace(b'X\x01\x00\x00\x000q', b'X\x04\x00\x00\x00../xq', 1)}
    ),
    'data/../x is missing',
  ),
}


@pytest.mark.parametrize('name', CHANGES)
def test_changed_files_are_refused(tmp_path, name):
  change, message = CHANGES[name]
  assert message in refusal(changed(tmp_path / 'x.pth', change))


def test_compressed_members_are_refused_before_they_are_unpacked(tmp_path):
  def fill(members):
    members['data/0'] = bytes(10**8)

  path = changed(tmp_path / 'x.pth', fill, compress=zipfile.ZIP_DEFLATED)
  assert path.stat().st_size < 10**6
  assert 'is compressed' in refusal(path)


def test_tensors_that_share_a_storage_do_not_outgrow_the_file(tmp_path):
  """Hundreds of names for one tensor, which each reader would copy."""

  def repeat(members):
    inner = members['data.pkl']
    head = b'\x80\x02}q\xffX\x01\x00\x00\x00a' + _one_tensor(inner) + b'q\xfes'
    more = b''.join(b'X' + struct.pack('<i', 4) + b'%04d' % k + b'h\xfes' for k in range(900))
    members['data.pkl'] = head + more + b'.'
    members['data/0'] = bytes(4 * 40_000)

  path = changed(tmp_path / 'x.pth', repeat)
  assert 'far more numbers than the file' in refusal(path)


def _one_tensor(_, count=40_000):
  """The opcodes of a tensor of all numbers of the storage 0."""
  key = b'(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuJ'
  key += struct.pack('<i', count) + b'tQ'
  shape = b'K\x00J' + struct.pack('<i', count) + b'\x85K\x01\x85\x89ccollections\nOrderedDict\n)R'
  return b'ctorch._utils\n_rebuild_tensor_v2\n(' + key + shape + b'tR'


def test_other_files_are_refused(tmp_path):
  assert 'cannot be read: No such file' in refusal(tmp_path / 'none.pth')
  assert 'cannot be read: Is a directory' in refusal(tmp_path)
  path = tmp_path / 'x.pth'
  path.write_text('weights')
  assert 'is not a file that torch.save wrote' in refusal(path)
  buffer = io.BytesIO()
  np.savez(buffer, x=np.zeros(3))
  path.write_bytes(buffer.getvalue())
  assert 'has no data.pkl' in refusal(path)
