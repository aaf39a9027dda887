"""Texts become the tokens that transformers makes of them."""

import json

import numpy as np
import pytest

from diffusion_distillation.errors import UserError
from diffusion_distillation.networks.clip_text import CLIPText
from diffusion_distillation.stages import texts
from diffusion_distillation.stages.texts import TextEncoder, Tokenizer
from tests import peers

FOLDER = peers.ROOT / 'clip_tokenizer'
RECORDED = json.loads((FOLDER / 'recorded.json').read_text())
VOCABULARY = json.loads((FOLDER / 'vocab.json').read_text())
PAIRS = ('vocab.json', 'merges.txt')


def files(*names, pad=None):
  """Files of the tokenizer by name, and the one that names the padding."""
  found = {name: (FOLDER / name).read_bytes() for name in names}
  settings = {'tokenizer_config.json': json.dumps({'pad_token': pad}).encode()} if pad else {}
  return found | settings


@pytest.mark.parametrize('names', [PAIRS, ('tokenizer.json',)], ids=['pairs', 'json'])
@pytest.mark.parametrize('pad', RECORDED['ids'])
def test_texts_have_the_recorded_tokens(names, pad, caplog):
  tokenize = Tokenizer(files(*names, pad=pad), 77)
  found = tokenize(RECORDED['texts'])
  assert found.dtype == np.int32 and found.shape == (len(RECORDED['texts']), 77)
  for row, expected in zip(found, RECORDED['ids'][pad], strict=True):
    assert row.tolist() == expected + [VOCABULARY[pad]] * (77 - len(expected))
  assert 'has 200 tokens; only the first 75 are read' in caplog.text and len(caplog.messages) == 1


def test_the_padding_may_be_a_token_with_properties():
  given = files(*PAIRS) | {'special_tokens_map.json': b'{"pad_token": {"content": "!"}}'}
  assert Tokenizer(given, 5)(['']).tolist() == [[555, 556, 0, 0, 0]]
  assert Tokenizer(files(*PAIRS), 5)(['']).tolist() == [[555, 556, 556, 556, 556]]


BROKEN = {
  'nothing': ({}, 'no tokenizer'),
  'vocabulary alone': (files('vocab.json'), 'no tokenizer'),
  'not JSON': (files(*PAIRS) | {'vocab.json': b'{'}, 'damaged'),
  'numbers': (files(*PAIRS) | {'vocab.json': b'{"a": "b"}'}, 'damaged'),
  'merges': (files(*PAIRS) | {'merges.txt': b'a b c\n'}, 'damaged'),
  'unknown merges': (files(*PAIRS) | {'merges.txt': b'abc def\n'}, 'damaged'),
  'bytes': (files(*PAIRS) | {'merges.txt': b'\xff\xfe'}, 'damaged'),
  'whole': ({'tokenizer.json': b'[]'}, 'damaged'),
  'padding': (files(*PAIRS, pad='<pad>'), "has no '<pad>'"),
  'no end': ({'vocab.json': b'{"a": 0}', 'merges.txt': b''}, "has no '<|startoftext|>'"),
}


@pytest.mark.parametrize('case', BROKEN)
def test_files_of_a_tokenizer_that_are_damaged_are_refused_in_one_line(case):
  given, words = BROKEN[case]
  with pytest.raises(UserError, match=words.replace('|', r'\|')) as caught:
    Tokenizer(given, 77)
  assert '\n' not in str(caught.value)


def test_without_the_library_one_line_says_what_to_install(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'tokenizers', None)
  with pytest.raises(UserError, match='pip install'):
    Tokenizer(files(*PAIRS), 77)


def test_a_tokenizer_of_another_encoder_is_refused():
  network = CLIPText(vocab_size=556, hidden_size=8, num_hidden_layers=1)
  encoder = TextEncoder(network, '', lambda: {}, files(*PAIRS))
  with pytest.raises(UserError, match='go up to 556, but the text encoder knows 556'):
    encoder.embed(['a'])


def test_encoders_are_equal_if_their_parameters_are():
  one, other = (TextEncoder(CLIPText(), digest, lambda: None, {}) for digest in ('a', 'b'))
  assert one == TextEncoder(CLIPText(), 'a', dict, {'x': b''}) and one != other
  assert set(texts.TOKENIZER_FILES) >= {*PAIRS, 'tokenizer.json'}


def test_settings_of_a_tokenizer_that_are_damaged_are_refused_in_one_line(monkeypatch):
  monkeypatch.setattr(texts, '_build', lambda given: None)
  for content in (b'{', b'\xff', b'[' * 100_000):
    with pytest.raises(UserError, match='the files of the tokenizer are damaged'):
      Tokenizer({'tokenizer_config.json': content}, 77)
