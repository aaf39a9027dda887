"""Makes the files of a tokenizer in CLIP's format, vocab.json and merges.txt, from texts."""

import collections
import functools
import heapq
import itertools
import json
from collections.abc import Iterable, Mapping

from diffusion_distillation.stages.texts import BEGIN, END, MERGES, VOCABULARY, splitter

_SUFFIX = '</w>'  # of the last symbol of a word
_VERSION = '#version: 0.2'

Word = tuple[str, ...]
Pair = tuple[str, str]


def make(texts: Iterable[str], most: int) -> dict[str, bytes]:
  """Returns the files of a byte-pair encoding (Sennrich et al. 2016) of texts, by name.

  The most frequent pair of neighbouring symbols is merged, the first one in alphabetical order of several, until every word is one
  symbol or there are `most` merges. The vocabulary is in CLIP's order: the bytes, the bytes at the end of a word, the merges, the begin
  token and the end token. It holds all bytes, so that it encodes every text.

  Raises:
    UserError: the library `tokenizers` is not installed.
  """
  return dict(_make(tuple(collections.Counter(texts).items()), most))


@functools.lru_cache(maxsize=1)  # a run plans its stages more than once
def _make(texts: tuple[tuple[str, int], ...], most: int) -> dict[str, bytes]:
  """Returns the files of `make`, for different texts with the number of times that each occurs."""
  symbols = _bytes()
  vocabulary = [*symbols, *(symbol + _SUFFIX for symbol in symbols)]
  words: dict[Word, int] = collections.defaultdict(int)
  split = splitter(_files(vocabulary, []))
  for text, count in texts:
    for word in split(text):
      words[(*word[:-1], word[-1] + _SUFFIX)] += count
  merges, pairs = list[Pair](), _Pairs(words)
  while len(merges) < most and (pair := pairs.most_frequent()) is not None:
    merges.append(pair)
    pairs.merge(pair)
  merged = dict.fromkeys(map(''.join, merges))  # two merges may make the same symbol
  return _files([*vocabulary, *merged], merges)


def _bytes() -> list[str]:
  """Returns the character that stands for each byte, in the order of CLIP's vocabulary: the printable ones stand for themselves."""
  printable = [*range(ord('!'), ord('~') + 1), *range(ord('¡'), ord('¬') + 1), *range(ord('®'), 256)]
  return [*map(chr, printable), *(chr(256 + k) for k in range(256 - len(printable)))]


def _files(vocabulary: list[str], merges: list[Pair]) -> dict[str, bytes]:
  numbers = {symbol: number for number, symbol in enumerate([*vocabulary, BEGIN, END])}
  lines = [_VERSION, *map(' '.join, merges)]
  return {
    VOCABULARY: json.dumps(numbers, ensure_ascii=False).encode(),
    MERGES: ('\n'.join(lines) + '\n').encode(),
  }


class _Pairs:
  """The pairs of neighbouring symbols in words, counted; a merge only counts the words again that contain its pair."""

  def __init__(self, words: Mapping[Word, int]) -> None:
    self._counts: dict[Pair, int] = collections.defaultdict(int)
    self._words_with: dict[Pair, set[int]] = collections.defaultdict(set)
    self._words = list(words.items())
    for place in range(len(self._words)):
      self._count(place, 1)
    # Also holds counts that pairs no longer have.
    self._ranked = [(-count, pair) for pair, count in self._counts.items()]
    heapq.heapify(self._ranked)

  def _count(self, place: int, sign: int) -> set[Pair]:
    """Adds the pairs of a word to the counts, or takes them away; returns them."""
    word, count = self._words[place]
    found = list(itertools.pairwise(word))
    for pair in found:
      self._counts[pair] += sign * count
      if sign > 0:
        self._words_with[pair].add(place)
      else:
        self._words_with[pair].discard(place)
    return set(found)

  def most_frequent(self) -> Pair | None:
    """Returns the most frequent pair, of several the first in the alphabet; None if every word is one symbol."""
    while self._ranked:
      count, pair = self._ranked[0]
      if count and self._counts[pair] == -count:
        return pair
      heapq.heappop(self._ranked)
    return None

  def merge(self, pair: Pair) -> None:
    """Makes a pair one symbol wherever it occurs."""
    changed = set[Pair]()
    for place in tuple(self._words_with[pair]):
      changed |= self._count(place, -1)
      word, count = self._words[place]
      self._words[place] = _merged(word, pair), count
      changed |= self._count(place, 1)
    for other in changed:
      heapq.heappush(self._ranked, (-self._counts[other], other))


def _merged(word: Word, pair: Pair) -> Word:
  """Returns a word with every occurrence of a pair merged, from the left."""
  found, place = list[str](), 0
  while place < len(word):
    both = word[place : place + 2] == pair
    found.append(''.join(pair) if both else word[place])
    place += 2 if both else 1
  return tuple(found)
