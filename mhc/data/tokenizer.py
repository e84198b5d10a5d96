"""Text to tokens and back: bytes, or a byte-level BPE vocabulary.

Both are lossless and know how many bytes of text a token stands for, so that
losses can be compared in bits per byte. Documents are framed by the marks
`start` and `stop`, which stand for no text.
"""

from collections.abc import Iterable, Sequence
import json
import pathlib
from typing import Literal

from jaxtyping import Integer, UInt
import numpy as np

from mhc.data import corruption
from mhc.runtime import retry

TRAINED_MARKS = ('<|start|>', '<|stop|>')
HINT = "give another one, or train one with --tokenizer='train:32768'"
MOST_TOKENS = 2**24
# Names that published vocabularies give to the mark after a document.
STOP_MARKS = (
  TRAINED_MARKS[1],
  '<|endoftext|>',
  '<|end_of_text|>',
  '<\N{FULLWIDTH VERTICAL LINE}end▁of▁sentence\N{FULLWIDTH VERTICAL LINE}>',
  '</s>',
  '<eos>',
)


class Bytes:
  """Token i < 256 is byte i. No vocabulary file."""

  name = description = 'bytes'
  num_tokens = 258
  dtype = np.uint16
  num_normalized = 0
  start = 256
  stop = 257

  def encode(self, text: bytes) -> UInt[np.ndarray, 't']:
    """Encodes a text without marks."""
    return np.frombuffer(text, np.uint8)

  def encode_documents(
    self, documents: Sequence[bytes]
  ) -> UInt[np.ndarray, 't']:
    """One flat array: start, tokens, stop of every document in order."""
    size = sum(len(text) + 2 for text in documents)
    tokens = np.empty(size, self.dtype)
    first = 0
    for text in documents:
      last = first + len(text) + 2
      tokens[first] = self.start
      tokens[first + 1 : last - 1] = self.encode(text)
      tokens[last - 1] = self.stop
      first = last
    return tokens

  def decode(self, tokens) -> bytes:
    tokens = np.asarray(tokens)
    return tokens[tokens < 256].astype(np.uint8).tobytes()

  def num_bytes(self, tokens: Integer[np.ndarray, '...']) -> int:
    """Returns the bytes of text that the tokens stand for."""
    return int((tokens < 256).sum())


class BPE:
  """A byte-level BPE vocabulary of the `tokenizers` library (tokenizer.json).

  `start` is `stop` where the vocabulary has no mark of its own for it. A
  normalizer in it acts first: what is tokenised, counted and decoded is
  `normalized` text.
  """

  name = 'bpe'

  def __init__(self, description: str, source: str = 'tokenizer'):
    tokenizers = library()
    self._source = source
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(description)
    except Exception as error:  # the library raises nothing more specific
      problem = corruption.one_line(str(error))
      raise ValueError(
        f'{source} is not a tokenizer.json: {problem}; {HINT}'
      ) from None
    if 'ByteLevel' not in json.dumps(json.loads(description).get('decoder')):
      raise ValueError(
        f'{source} is not a byte-level vocabulary: the bytes that its tokens '
        f'stand for are unknown; {HINT}'
      )
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    self.num_tokens = 1 + max(self._tokenizer.get_vocab().values(), default=0)
    if self.num_tokens > MOST_TOKENS:
      raise ValueError(
        f'{source} numbers its tokens up to {self.num_tokens}, more than '
        f'{MOST_TOKENS}: it is damaged; {HINT}'
      )
    added = self._tokenizer.get_added_tokens_decoder()
    known = {*STOP_MARKS, *TRAINED_MARKS}
    marks = {
      token.content: number
      for number, token in added.items()
      if token.special or token.content in known
    }
    stops = [marks[name] for name in STOP_MARKS if name in marks]
    if not stops:
      raise ValueError(
        f'{source} has none of the marks {STOP_MARKS} to put after a document: '
        'add one with tokenizers.Tokenizer.add_special_tokens'
      )
    self.stop = stops[0]
    self.start = marks.get(TRAINED_MARKS[0], self.stop)
    # An added token that is no mark stands for its name, as runs of spaces do.
    self._texts = {
      number: token.content.encode()
      for number, token in added.items()
      if token.content not in marks
    }
    self.num_normalized = 0  # documents that a normalizer has changed
    # In such a vocabulary each character of another token's name is one byte.
    self._lengths = np.zeros(self.num_tokens, np.int64)
    for name, number in self._tokenizer.get_vocab().items():
      if name not in marks:
        self._lengths[number] = len(self._texts.get(number, name))

  @classmethod
  def train(cls, documents: Iterable[bytes], num_tokens: int) -> 'BPE':
    """Learns a vocabulary of at most `num_tokens` from UTF-8 documents."""
    tokenizers = library()
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
      add_prefix_space=False
    )
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
      vocab_size=num_tokens,
      special_tokens=list(TRAINED_MARKS),
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    )
    tokenizer.train_from_iterator(
      (text.decode() for text in documents), trainer
    )
    return cls(tokenizer.to_str())

  @property
  def description(self) -> str:
    """The content of `tokenizer.json`."""
    return self._tokenizer.to_str()

  def normalized(self, text: bytes) -> bytes:
    """What the tokens of a text stand for, such as its NFC."""
    if self._tokenizer.normalizer is None:
      return text
    return self._tokenizer.normalizer.normalize_str(text.decode()).encode()

  def encode(self, text: bytes) -> UInt[np.ndarray, 't']:
    """Encodes a text without marks; marks spelled out in it are text."""
    return self._encode([self.normalized(text)])[0]

  def encode_documents(
    self, documents: Sequence[bytes]
  ) -> UInt[np.ndarray, 't']:
    """One flat array: tokens and stop of every document, start if it differs.

    Raises:
      ValueError: a document cannot be decoded from its tokens.
    """
    parts = []
    normalized = [self.normalized(text) for text in documents]
    self.num_normalized += sum(
      a != b for a, b in zip(documents, normalized, strict=True)
    )
    for text, tokens in zip(normalized, self._encode(normalized), strict=True):
      if self.num_bytes(tokens) != len(text):
        raise ValueError(
          f'{self._source} is lossy: {len(text)} bytes became tokens of '
          f'{self.num_bytes(tokens)}, in the document {text[:60]!r}...; '
          f'its normalizer or damage does that; {HINT}'
        )
      if self.start != self.stop:
        parts.append([self.start])
      parts += [tokens, [self.stop]]
    return np.concatenate(parts).astype(self.dtype)

  def decode(self, tokens) -> bytes:
    # A model may know more numbers than there are tokens; they are no text.
    byte_of = _byte_of_character()
    parts = []
    for number in map(int, np.asarray(tokens).reshape(-1)):
      if number in self._texts:
        parts.append(self._texts[number])
      elif number < self.num_tokens and self._lengths[number]:
        name = self._tokenizer.id_to_token(number)
        parts.append(bytes(byte_of[character] for character in name))
    return b''.join(parts)

  def num_bytes(self, tokens: Integer[np.ndarray, '...']) -> int:
    """Returns the bytes of text that the tokens stand for."""
    return int(self._lengths[tokens].sum())

  @property
  def dtype(self):
    """The smallest type that holds every token."""
    return np.uint16 if self.num_tokens <= 2**16 else np.uint32

  def _encode(self, documents):
    # A mark in the text must not become the mark's token.
    self._tokenizer.encode_special_tokens = True
    encoded = self._tokenizer.encode_batch_fast(
      [text.decode() for text in documents], add_special_tokens=False
    )
    return [np.array(item.ids, self.dtype) for item in encoded]


Tokenizer = Bytes | BPE


def load(source: Literal['bytes'] | str | pathlib.Path) -> Tokenizer:
  """Loads the vocabulary of a tokenizer.json, or 'bytes'.

  Raises:
    OSError: the file does not exist.
    ValueError: it is not a lossless byte-level vocabulary.
  """
  if source == 'bytes':
    return Bytes()
  data = retry.with_retries(pathlib.Path(source).read_bytes, source)
  return BPE(data.decode(errors='replace'), str(source))


def library():
  """The `tokenizers` module, which is optional."""
  try:
    import tokenizers
  except ImportError:
    raise ValueError(
      'BPE vocabularies need the tokenizers library: pip install tokenizers'
    ) from None
  return tokenizers


def _byte_of_character():
  """GPT-2's alphabet: printable bytes stand for themselves, others from 256."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  table = {chr(byte): byte for byte in printable}
  return table | {chr(256 + i): byte for i, byte in enumerate(others)}
