"""Vocabularies in CLIP's format, made from texts."""

import collections
import itertools
import json

import numpy as np
import pytest
import tokenizers

from diffusion_distillation.datasets import captioned_shapes
from diffusion_distillation.stages import vocabularies
from diffusion_distillation.stages.texts import Tokenizer
from tests import peers

WORDS = [
  'a',
  'small',
  'large',
  'red',
  'green',
  'blue',
  'circle',
  'square',
  'triangle',
  'cross',
  'on',
  'black',
  'white',
]


@pytest.fixture(scope='module')
def files():
  return vocabularies.make(captioned_shapes.CAPTIONS, 1000)


def test_every_word_of_the_captions_is_one_token_and_captions_survive_the_round_trip(files):
  vocabulary = json.loads(files['vocab.json'])
  tokenize = Tokenizer(files, 8)
  tokens = tokenize(captioned_shapes.CAPTIONS)
  names = {number: name for name, number in vocabulary.items()}
  texts = [' '.join(names[int(n)].removesuffix('</w>') for n in row[1:-1]) for row in tokens]
  assert texts == list(captioned_shapes.CAPTIONS)
  assert (tokens[:, 0] == vocabulary['<|startoftext|>']).all()
  assert (tokens[:, -1] == vocabulary['<|endoftext|>']).all()
  assert {name for name in names.values() if name.removesuffix('</w>') in WORDS} >= {
    f'{word}</w>' for word in WORDS
  }
  assert sorted(names) == list(range(len(names))) and tokenize.largest == len(names) - 1
  assert vocabulary['<|endoftext|>'] == len(names) - 1  # as `CLIPText` takes it


def test_transformers_own_tokenizer_class_would_read_the_same_files(files, tmp_path):
  """The library's reader of these two files, with CLIP's suffix, as transformers' CLIPTokenizer sets it up."""
  for name, content in files.items():
    (tmp_path / name).write_bytes(content)
  model = tokenizers.models.BPE.from_file(
    str(tmp_path / 'vocab.json'),
    str(tmp_path / 'merges.txt'),
    end_of_word_suffix='</w>',
    continuing_subword_prefix='',
    unk_token='<|endoftext|>',
  )
  ours = Tokenizer(files, 8)(['a large triangle'])[0]
  pieces = [token.id for word in ('a', 'large', 'triangle') for token in model.tokenize(word)]
  assert [ours[0], *pieces, *ours[-4:]] == ours.tolist() and len(pieces) == 3


def test_unknown_words_are_spelled_in_bytes_and_no_text_is_unknown(files):
  tokenize, vocabulary = Tokenizer(files, 20), json.loads(files['vocab.json'])
  spelled = tokenize(['Zebra ü'])[0]
  names = {number: name for name, number in vocabulary.items()}
  word = ''.join(names[int(n)] for n in spelled if n < len(names) - 2)
  assert word == 'zebra</w>Ã¼</w>'
  np.testing.assert_array_equal(tokenize(['RED']), tokenize(['red']))


def test_the_bytes_are_in_the_order_of_the_recorded_vocabulary_of_clip():
  recorded = json.loads((peers.ROOT / 'clip_tokenizer' / 'vocab.json').read_text())
  made = json.loads(vocabularies.make([], 0)['vocab.json'])
  assert list(made)[:512] == sorted(recorded, key=recorded.get)[:512] and len(made) == 514


def test_merges_are_by_frequency_then_by_the_alphabet():
  """'ab' three times, 'cd' twice: a b first, then c d; at equal counts, the first in the alphabet."""
  lines = vocabularies.make(['ab cd', 'ab cd', 'ab'], 5)['merges.txt'].decode().splitlines()
  assert lines == ['#version: 0.2', 'a b</w>', 'c d</w>']
  assert vocabularies.make(['cd ab'], 1)['merges.txt'].decode().splitlines()[1:] == ['a b</w>']
  lines = vocabularies.make(['aaab'], 9)['merges.txt'].decode().splitlines()
  assert lines[1:] == ['a a', 'a b</w>', 'aa ab</w>']


def merges_by_counting_everything_again(texts, most):
  """The definition: after every merge, all pairs of all words are counted again."""
  words = collections.Counter((*word[:-1], word[-1] + '</w>') for text in texts for word in text.split())
  found = []
  while len(found) < most:
    counts = collections.Counter()
    for word, count in words.items():
      for pair in itertools.pairwise(word):
        counts[pair] += count
    if not counts:
      break
    found.append(min(counts, key=lambda pair: (-counts[pair], pair)))
    merged = collections.Counter()
    for word, count in words.items():
      symbols, place = [], 0
      while place < len(word):
        size = 2 if word[place : place + 2] == found[-1] else 1
        symbols.append(''.join(word[place : place + size]))
        place += size
      merged[tuple(symbols)] += count
    words = merged
  return [' '.join(pair) for pair in found]


@pytest.mark.parametrize('seed', [0, 1, 2])
def test_merges_are_those_of_counting_all_words_again(seed):
  """Random words of two and three letters, in which many pairs overlap, share words, and are equally frequent."""
  rng = np.random.default_rng(seed)
  letters = 'ab' if seed == 0 else 'abc'
  texts = [''.join(rng.choice([*letters, ' '], 30)) for _ in range(30)]
  for most in (7, 1000):
    lines = vocabularies.make(texts, most)['merges.txt'].decode().splitlines()
    assert lines[1:] == merges_by_counting_everything_again(texts, most)


def test_a_vocabulary_is_made_once_in_a_process(monkeypatch):
  texts = ['once only', 'once more']
  first = vocabularies.make(texts, 9)
  monkeypatch.setattr(vocabularies, '_Pairs', None)
  assert vocabularies.make(texts, 9) == first is not vocabularies.make(texts, 9)
  with pytest.raises(TypeError):
    vocabularies.make(texts, 8)
