"""Prompts are the lines of a text file or a column of a table; whatever cannot be read is one line."""

import dataclasses
import json

import pytest

from diffusion_distillation.datasets import prompts
from diffusion_distillation.datasets.settings import Settings
from diffusion_distillation.errors import UserError

TEXTS = ['a red circle', 'two words, "quoted"', 'ein grüner\u2028Kreis']


def read(path):
  return prompts.read(dataclasses.replace(Settings(), name='prompts', path=str(path)))


def lines(path):
  path.write_text('\n'.join(['', *TEXTS, '   ', '']), encoding='utf-8-sig')


def table(path):
  rows = [
    'file_name,caption',
    *(f'{k}.png,"{text.replace(chr(34), chr(34) * 2)}"' for k, text in enumerate(TEXTS)),
  ]
  path.write_text('\n'.join([*rows, '4.png,', '']))


def objects(path):
  found = [json.dumps({'id': k, 'prompt': text}) for k, text in enumerate(TEXTS)]
  path.write_text('\n'.join([*found, '', '{"prompt": " "}']))


@pytest.mark.parametrize(('name', 'write'), [('a.txt', lines), ('a.CSV', table), ('a.jsonl', objects)])
def test_a_prompt_is_a_line_a_cell_or_a_value_and_empty_ones_are_left_out(name, write, tmp_path):
  write(tmp_path / name)
  found = read(tmp_path / name)
  assert [found.caption(k) for k in range(len(found))] == TEXTS
  lines(tmp_path / 'other.txt')
  assert found.identity == read(tmp_path / 'other.txt').identity  # a function of the texts
  (tmp_path / 'other.txt').write_text('\n'.join(TEXTS[::-1]))
  assert found.identity != read(tmp_path / 'other.txt').identity


REFUSED = {
  'a.txt': (b'\n \n', 'holds no prompt'),
  'b.txt': (b'caf\xe9', 'is not UTF-8 text'),
  'a.csv': (
    b'file_name,label\n1.png,2\n',
    'line 2 has no caption: a text called text, caption or prompt is needed',
  ),
  'a.jsonl': (b'{"caption": "x"}\n{"caption": 3}\n', 'line 2 has no caption'),
  'b.jsonl': (b'\n{"caption"\n', 'line 2 is not valid JSON'),
  'c.jsonl': (b'[1]\n', 'line 1 is not a JSON object'),
  'a.parquet': (b'', r'prompts are read from \.txt, \.csv and \.jsonl'),
  'none': (None, 'there is no such file on this machine'),
}


@pytest.mark.parametrize('name', REFUSED)
def test_what_cannot_be_read_is_named_in_one_line(name, tmp_path):
  content, words = REFUSED[name]
  if content is not None:
    (tmp_path / name).write_bytes(content)
  with pytest.raises(UserError, match=words):
    read(tmp_path / name)


def test_prompts_need_a_path_and_are_not_downloaded():
  with pytest.raises(UserError, match=r'dataset\.name=prompts needs dataset\.path'):
    read('')
  with pytest.raises(UserError, match='no such file on this machine'):
    read('https://example.org/a.txt')
