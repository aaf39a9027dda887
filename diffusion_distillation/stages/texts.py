"""Texts as conditions: the tokenizer and the text encoder in a model's folder."""

import dataclasses
import functools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion_distillation.errors import UserError
from diffusion_distillation.networks.clip_text import CLIPText, Encoded
from diffusion_distillation.training.state import Params

_log = logging.getLogger(__name__)

VOCABULARY, MERGES, _WHOLE = 'vocab.json', 'merges.txt', 'tokenizer.json'
_SETTINGS = ('special_tokens_map.json', 'tokenizer_config.json')
TOKENIZER_FILES = (VOCABULARY, MERGES, _WHOLE, *_SETTINGS)
BEGIN, END = '<|startoftext|>', '<|endoftext|>'
# What CLIP's vocabulary is made of (Radford et al. 2021): runs of letters, single digits, runs of other characters.
_WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+"


class Tokenizer:
  """Converts texts to the token numbers of CLIP, by the files of a tokenizer.

  Args:
    files: vocab.json and merges.txt, or tokenizer.json; and perhaps the file that names the padding.
    length: number of tokens of a text, to which it is padded or cut.

  Raises:
    UserError: the library `tokenizers` is not installed, or a file is missing or damaged.
  """

  def __init__(self, files: Mapping[str, bytes], length: int):
    try:
      self._tokenizer, pad = _build(files), _padding(files)
    except UserError:
      raise
    except Exception as error:  # what the library raises has no class of its own
      text = ' '.join(str(error).split())[:200]
      raise UserError(f'the files of the tokenizer are damaged ({text}); restore them') from error
    ids = {token: self._tokenizer.token_to_id(token) for token in (BEGIN, END, pad)}
    if missing := [token for token, number in ids.items() if number is None]:
      raise UserError(f'the vocabulary of the tokenizer has no {missing[0]!r}')
    self._tokenizer.add_special_tokens(list(ids))
    self._begin, self._end, self._pad = ids[BEGIN], ids[END], ids[pad]
    self._length = length
    self.cut = 0  # number of texts so far that were too long

  def __call__(self, texts: Sequence[str], warns: bool = True) -> np.ndarray:
    """Returns the tokens (n, length) int32: begin, text, end, padding. A text that is too long is cut and, if asked, named."""
    rows = []
    for text in texts:
      found = self._tokenizer.encode(text, add_special_tokens=False).ids
      self.cut += len(found) > self._length - 2
      if warns and len(found) > self._length - 2:
        _log.warning(
          'the text %r has %d tokens; only the first %d are read',
          text if len(text) <= 60 else f'{text[:60]}...',
          len(found),
          self._length - 2,
        )
      row = [self._begin, *found[: self._length - 2], self._end]
      rows.append(row + [self._pad] * (self._length - len(row)))
    return np.asarray(rows, np.int32)

  @property
  def largest(self) -> int:
    """The largest token number."""
    return max(self._tokenizer.get_vocab(with_added_tokens=True).values())


def _build(files: Mapping[str, bytes]) -> Any:
  """Returns the library's tokenizer without padding and truncation."""
  try:
    import tokenizers
    from tokenizers import models, normalizers, pre_tokenizers
  except ImportError as error:
    raise UserError(
      "prompts need the library tokenizers: pip install 'diffusion_distillation[text]'"
    ) from error
  if not {VOCABULARY, MERGES} <= files.keys():
    if _WHOLE not in files:
      raise UserError(
        f'this model has no tokenizer, which prompts need: neither {VOCABULARY} with {MERGES} nor {_WHOLE}'
      )
    found = tokenizers.Tokenizer.from_str(files[_WHOLE].decode())
    found.no_padding()
    found.no_truncation()
    return found
  lines = files[MERGES].decode().splitlines()
  split = (line.partition(' ') for line in lines if line and not line.startswith('#version'))
  pairs = [(left, right) for left, _, right in split]
  model = models.BPE(
    vocab=json.loads(files[VOCABULARY]),
    merges=pairs,
    end_of_word_suffix='</w>',
    continuing_subword_prefix='',
    unk_token=END,
    fuse_unk=False,
  )
  found = tokenizers.Tokenizer(model)
  found.normalizer = normalizers.Sequence(
    [
      normalizers.NFC(),
      normalizers.Replace(tokenizers.Regex(r'\s+'), ' '),
      normalizers.Lowercase(),
    ]
  )
  words = pre_tokenizers.Split(tokenizers.Regex(_WORDS), behavior='removed', invert=True)
  found.pre_tokenizer = pre_tokenizers.Sequence(
    [words, pre_tokenizers.ByteLevel(add_prefix_space=False)]
  )
  return found


def splitter(files: Mapping[str, bytes]) -> Callable[[str], list[str]]:
  """Returns the function that splits a text into words before their symbols are merged; each byte of a word is one character."""
  found = _build(files)
  split, normalize = found.pre_tokenizer.pre_tokenize_str, found.normalizer.normalize_str
  return lambda text: [word for word, _ in split(normalize(text))]


def _padding(files: Mapping[str, bytes]) -> str:
  """Returns the token that texts are padded with: the end token, unless a file names another."""
  for name in _SETTINGS:
    settings = json.loads(files[name]) if name in files else {}
    found = settings.get('pad_token') if isinstance(settings, dict) else None
    found = found.get('content') if isinstance(found, dict) else found
    if isinstance(found, str):
      return found
  return END


@functools.partial(jax.jit, static_argnums=0)
def _embed(network: CLIPText, params: Params, tokens: jax.Array) -> jax.Array:
  found: Encoded = network.apply({'params': params}, tokens)  # type: ignore[assignment]
  return found.last


@functools.partial(jax.jit, static_argnums=0)
def _pool(network: CLIPText, params: Params, tokens: jax.Array) -> jax.Array:
  found: Encoded = network.apply({'params': params}, tokens)  # type: ignore[assignment]
  return found.pooled


@dataclasses.dataclass(frozen=True)
class TextEncoder:
  """The text encoder of a model. Two are equal if their networks and the digests of their parameters are.

  Attributes:
    network: the text encoder.
    digest: the digest of its parameters.
    weights: returns the parameters; called when they are first needed.
    tokenizer: the files of the tokenizer by name; empty if it is missing, so that there are no prompts.
  """

  network: CLIPText
  digest: str
  weights: Callable[[], Params] = dataclasses.field(compare=False, repr=False)
  tokenizer: Mapping[str, bytes] = dataclasses.field(compare=False, repr=False)

  def embed(self, texts: Sequence[str]) -> np.ndarray:
    """Returns the embeddings of texts (n, T, D) float32, T being the encoder's number of positions.

    Raises:
      UserError: as `tokenize`.
    """
    params, tokens = self.weights(), self.tokenize()(texts)
    rows = [_embed(self.network, params, jnp.asarray(row)[None]) for row in tokens]
    return np.concatenate([np.asarray(row, np.float32) for row in rows])

  def embedder(self) -> Callable[[np.ndarray], jax.Array]:
    """Returns a function from tokens (n, T) to embeddings (n, T, D), for many texts: it holds the parameters on the device."""
    params = jax.device_put(self.weights(), jax.local_devices()[0])
    return lambda tokens: _embed(self.network, params, jnp.asarray(tokens))

  def tokenize(self) -> Tokenizer:
    """Returns the tokenizer.

    Raises:
      UserError: the library `tokenizers` is not installed, or the tokenizer is missing, damaged or another encoder's.
    """
    tokenize = Tokenizer(self.tokenizer, self.network.max_position_embeddings)
    if tokenize.largest >= self.network.vocab_size:
      raise UserError(
        f"the tokenizer's tokens go up to {tokenize.largest}, but the text encoder knows {self.network.vocab_size}"
      )
    return tokenize

  def pooled(self, texts: Sequence[str]) -> np.ndarray:
    """Returns one embedding for each text (n, D) float32, that of its end token; raises UserError as `tokenize` does."""
    params, tokens = self.weights(), self.tokens(texts)
    return np.asarray(_pool(self.network, params, jnp.asarray(tokens)), np.float32)

  def tokens(self, texts: Sequence[str]) -> np.ndarray:
    """Returns the tokens of texts (n, T) int32; raises UserError as `tokenize` does."""
    return self.tokenize()(texts)
