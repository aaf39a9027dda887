"""WebDataset's tar files: nothing in them is extracted or followed, and none is read in part."""

import tarfile

import pytest

from diffusion_distillation.datasets import captions, tars
from diffusion_distillation.errors import UserError
from tests.datasets.captions_test import open_captions, png, store, write_tar


@pytest.fixture(autouse=True)
def forget_listings():
  captions._samples.cache_clear()


def link(name, target, kind=tarfile.SYMTYPE):
  info = tarfile.TarInfo(name)
  info.type, info.linkname = kind, target
  return name, info


BAD_TARS = {
  'a path that leads out': ([('../a.png', b''), ('../a.txt', b'')], "holds '../a.png', a path outside"),
  'an absolute path': ([('/a.png', b''), ('a.txt', b'')], "holds '/a.png', a path outside the archive"),
  'a member twice': ([('a.png', b''), ('./a.png', b'')], 'holds a.png twice; repack it'),
  'two images of a sample': ([('a.png', b''), ('a.jpg', b'')], 'holds a.png and a.jpg, two images of'),
  'an image without a caption': (
    [('a.png', b''), ('b.png', b''), ('b.txt', b'b')],
    'a.png has no caption',
  ),
  'a caption without an image': ([('a.txt', b'a')], 'there is a caption of a, but no image; repack it'),
  'no caption in JSON': (
    [('a.png', b''), ('a.json', b'{"title": "a"}')],
    'a.json has no caption: a text',
  ),
  'no JSON': ([('a.png', b''), ('a.json', b'{')], 'a.json is not valid JSON'),
  'no text': ([('a.png', b''), ('a.txt', b'\xff')], 'a.txt is not UTF-8 text'),
  'no image': ([('a.cls', b'3')], 'its tar files hold no image (.png, '),
  'a link to a file': (
    [('a.txt', b'a'), link('a.png', '/etc/passwd')],
    'there is a caption of a, but no',
  ),
}


@pytest.mark.parametrize('case', BAD_TARS)
def test_tar_files_with_strange_members_are_refused_in_one_line(tmp_path, case):
  members, message = BAD_TARS[case]
  write_tar(tmp_path / 'all.tar', members)
  with pytest.raises(UserError) as caught:
    open_captions(tmp_path / 'all.tar')
  assert str(caught.value).startswith(f'dataset.path={tmp_path}/all.tar: ') or case == 'no image'
  assert message in str(caught.value) and '\n' not in str(caught.value)


def test_members_of_tar_files_that_are_not_used_are_counted(tmp_path):
  sample = [('a.png', png(tmp_path)), ('a.txt', b'text'), ('a.json', b'{"caption": "json"}')]
  others = [('a.cls', b'3'), link('b.png', 'a.png'), ('._a.png', b''), link('c', '', tarfile.FIFOTYPE)]
  images = open_captions(write_tar(tmp_path / 'all.tar', [*others, *sample]))
  assert len(images) == 1 and images.caption(0) == 'text'
  assert images.beside().lines() == [
    '1 in an unsupported format (.cls), such as all.tar/a.cls',
    '1 links in a tar, such as all.tar/b.png',
    '1 not regular files, such as all.tar/c',
    '1 of the operating system, such as all.tar/._a.png',
  ]


def test_damaged_and_compressed_tar_files_are_refused_and_none_is_read_in_part(tmp_path):
  sample = [('a.png', png(tmp_path)), ('a.txt', b'a')]
  path = write_tar(tmp_path / 'all.tar', [*sample, ('b.png', png(tmp_path)), ('b.txt', b'b')])
  whole = path.read_bytes()
  with tarfile.open(path) as tar:
    second = tar.getmember('b.png').offset
  for content, message in (
    (whole[: second + 100], f'is damaged at byte {second:,}; restore it'),
    (whole[:second] + b'x' + whole[second + 1 :], f'is damaged at byte {second:,}; restore it'),
    (whole[: second + 600], 'cannot be read as a tar file (unexpected end of data'),
    (b'no tar', 'cannot be read as a tar file'),
  ):
    path.write_bytes(content)
    captions._samples.cache_clear()
    with pytest.raises(UserError) as caught:
      open_captions(path)
    assert message in str(caught.value)
  with tarfile.open(tmp_path / 'packed.tar', 'w:gz') as tar:
    tar.add(tmp_path / 'one.png', 'a.png')
  with pytest.raises(
    UserError, match=r'packed\.tar cannot be read as a tar file .* if it is compressed'
  ):
    open_captions(tmp_path / 'packed.tar')


def test_a_tar_file_that_becomes_shorter_is_an_error_and_no_broken_image(tmp_path):
  path, _ = store(tmp_path, 'tar')
  images = open_captions(path)
  path.write_bytes(path.read_bytes()[:700])
  with pytest.raises(UserError, match=r'cannot be read: .*all\.tar is shorter than when it was listed'):
    [images.read(k) for k in range(8)]


def test_a_text_in_a_tar_file_that_is_no_caption_is_refused_before_it_is_read(tmp_path, monkeypatch):
  monkeypatch.setattr(tars, 'MOST_CAPTION', 10)
  path = write_tar(tmp_path / 'all.tar', [('a.png', b''), ('a.txt', b'x' * 11)])
  with pytest.raises(UserError, match=r'a\.txt is larger than'):
    open_captions(path)
