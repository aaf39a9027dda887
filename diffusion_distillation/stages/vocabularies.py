"""Makes the files of a tokenizer in CLIP's format, vocab.json and merges.txt, from texts."""

import collections
import itertools
import json
from collections.abc import Iterable, Mapping

from diffusion_distillation.stages.texts import BEGIN, END, MERGES, VOCABULARY, splitter

_SUFFIX = '</w>'  # of the last symbol of a word
_VERSION = '#version: 0.2'

Word = tuple[str, ...]


def make(texts: Iterable[str], most: int) -> dict[str, bytes]:
  """Returns the files of a byte-pair encoding (Sennrich et al. 2016) of texts, by name.

  The most frequent pair of neighbouring symbols is merged, the first one in alphabetical order of several, until every word is one
  symbol or there are `most` merges. The vocabulary is in CLIP's order: the bytes, the bytes at the end of a word, the merges, the begin
  token and the end token. It holds all bytes, so that it encodes every text.

  Raises:
    UserError: the library `tokenizers` is not installed.
  """
  symbols = _bytes()
  vocabulary = [*symbols, *(symbol + _SUFFIX for symbol in symbols)]
  words: dict[Word, int] = collections.defaultdict(int)
  split = splitter(_files(vocabulary, []))
  for text, count in collections.Counter(texts).items():
    for word in split(text):
      words[(*word[:-1], word[-1] + _SUFFIX)] += count
  merges = list[tuple[str, str]]()
  while len(merges) < most and (pair := _most_frequent(words)) is not None:
    merges.append(pair)
    words = {_merged(word, pair): count for word, count in words.items()}
  merged = dict.fromkeys(map(''.join, merges))  # two merges may make the same symbol
  return _files([*vocabulary, *merged], merges)


def _bytes() -> list[str]:
  """Returns the character that stands for each byte, in the order of CLIP's vocabulary: the printable ones stand for themselves."""
  printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), 256)]
  return [*map(chr, printable), *(chr(256 + k) for k in range(256 - len(printable)))]


def _files(vocabulary: list[str], merges: list[tuple[str, str]]) -> dict[str, bytes]:
  numbers = {symbol: number for number, symbol in enumerate([*vocabulary, BEGIN, END])}
  lines = [_VERSION, *map(' '.join, merges)]
  return {
    VOCABULARY: json.dumps(numbers, ensure_ascii=False).encode(),
    MERGES: ('\n'.join(lines) + '\n').encode(),
  }


def _most_frequent(words: Mapping[Word, int]) -> tuple[str, str] | None:
  counts: dict[tuple[str, str], int] = collections.defaultdict(int)
  for word, count in words.items():
    for pair in itertools.pairwise(word):
      counts[pair] += count
  return min(counts, key=lambda pair: (-counts[pair], pair), default=None)


def _merged(word: Word, pair: tuple[str, str]) -> Word:
  """Returns a word with every occurrence of a pair merged, from the left."""
  found, place = list[str](), 0
  while place < len(word):
    both = word[place : place + 2] == pair
    found.append(''.join(pair) if both else word[place])
    place += 2 if both else 1
  return tuple(found)
