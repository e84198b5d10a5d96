"""Text to tokens and back: bytes, or a byte-level BPE vocabulary.

Both are lossless and know how many bytes of text a token stands for, so that
losses can be compared in bits per byte. Documents are framed by the marks
`start` and `stop`, which stand for no text.
"""

from collections.abc import Iterable, Sequence
import json
from typing import Literal, NamedTuple

from jaxtyping import Integer, UInt
import numpy as np

from mhc.data import corruption
from mhc.data import marks
from mhc.runtime import paths
from mhc.runtime import retry

HINT = "give another one, or train one with --tokenizer='train:32768'"
MOST_TOKENS = 2**24


class Encoded(NamedTuple):
  """Documents as one flat array, marks included.

  Attributes:
    tokens: of all documents in order.
    lengths: tokens of each, int64; 0 for one that its tokens do not give back.
  """

  tokens: UInt[np.ndarray, 't']
  lengths: Integer[np.ndarray, 'documents']


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

  def encode_each(self, documents: Sequence[bytes]) -> Encoded:
    """Start, tokens, stop of every document in order."""
    lengths = np.array([len(text) + 2 for text in documents], np.int64)
    ends = lengths.cumsum()
    tokens = np.empty(lengths.sum(), self.dtype)
    is_text = np.ones(len(tokens), bool)
    is_text[ends - lengths] = is_text[ends - 1] = False
    tokens[is_text] = self.encode(b''.join(documents))
    tokens[ends - lengths], tokens[ends - 1] = self.start, self.stop
    return Encoded(tokens, lengths)

  def encode_documents(
    self, documents: Sequence[bytes]
  ) -> UInt[np.ndarray, 't']:
    """The tokens of `encode_each`."""
    return self.encode_each(documents).tokens

  def decode(self, tokens) -> bytes:
    tokens = np.asarray(tokens)
    return tokens[tokens < 256].astype(np.uint8).tobytes()

  def num_bytes(self, tokens: Integer[np.ndarray, '...']) -> int:
    """Returns the bytes of text that the tokens stand for."""
    return int((tokens < 256).sum())


class BPE:
  """A byte-level BPE vocabulary of the `tokenizers` library (tokenizer.json).

  The marks are those of `marks`; `start` is `stop` where it has no mark of its
  own for it. A normalizer in it acts first: what is tokenised, counted and
  decoded is `normalized` text.
  """

  name = 'bpe'

  def __init__(self, description: str, source: str = 'tokenizer'):
    self._source = source
    self._tokenizer = _parsed(description, source)
    parsed = json.loads(description)
    if 'ByteLevel' not in json.dumps(parsed.get('decoder')):
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
    known = marks.numbers(parsed)
    self.start_name, self.stop_name = marks.own(parsed)
    if not self.stop_name:
      raise ValueError(
        f'{source} has none of the marks {marks.STOP} to put after a document: '
        'name another by --stop_mark, or add one with '
        'tokenizers.Tokenizer.add_special_tokens'
      )
    self.stop = known[self.stop_name]
    self.start = known[self.start_name or self.stop_name]
    # An added token that is no mark stands for its name, as runs of spaces do.
    self._texts = {
      number: token.content.encode()
      for number, token in added.items()
      if token.content not in known
    }
    self.num_normalized = 0  # documents that a normalizer has changed
    # In such a vocabulary each character of another token's name is one byte.
    self._lengths = np.zeros(self.num_tokens, np.int64)
    for name, number in self._tokenizer.get_vocab().items():
      if name not in known:
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
      special_tokens=list(marks.TRAINED),
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

  def encode_each(self, documents: Sequence[bytes]) -> Encoded:
    """Tokens and stop of every document, start before them if it differs."""
    normalized = [self.normalized(text) for text in documents]
    self.num_normalized += sum(
      a != b for a, b in zip(documents, normalized, strict=True)
    )
    parts, lengths = [], np.zeros(len(documents), np.int64)
    before = [] if self.start == self.stop else [[self.start]]
    each = zip(normalized, self._encode(normalized), strict=True)
    for index, (text, tokens) in enumerate(each):
      if self.num_bytes(tokens) == len(text):
        parts += [*before, tokens, [self.stop]]
        lengths[index] = len(before) + len(tokens) + 1
    tokens = np.concatenate(parts) if parts else np.zeros(0)
    return Encoded(tokens.astype(self.dtype), lengths)

  def encode_documents(
    self, documents: Sequence[bytes]
  ) -> UInt[np.ndarray, 't']:
    """The tokens of `encode_each`.

    Raises:
      ValueError: a document cannot be decoded from its tokens.
    """
    tokens, lengths = self.encode_each(documents)
    if not lengths.all():
      raise ValueError(self.lossy(documents[int(np.argmin(lengths))]))
    return tokens

  def lossy(self, text: bytes) -> str:
    """Says that a document cannot be decoded from its tokens."""
    (tokens,) = self._encode([self.normalized(text)])
    return (
      f'{self._source} is lossy: {len(self.normalized(text))} bytes became '
      f'tokens of {self.num_bytes(tokens)}, in the document {text[:60]!r}...; '
      f'its normalizer or damage does that; {HINT}'
    )

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


def load(
  source: Literal['bytes'] | str | paths.Path,
  start: str | None = None,
  stop: str | None = None,
) -> Tokenizer:
  """Loads the vocabulary of a tokenizer.json, or 'bytes'.

  `start` and `stop` name other marks than its own, '' none at the start; they
  become part of its description.

  Raises:
    OSError: the file does not exist.
    ValueError: it is not a lossless byte-level vocabulary, or has no such mark.
  """
  if source == 'bytes':
    if start is not None or stop is not None:
      raise ValueError(
        'bytes have marks of their own: leave out --start_mark, --stop_mark'
      )
    return Bytes()
  file = paths.path(source) if isinstance(source, str) else source
  data = retry.with_retries(file.read_bytes, source)
  description = data.decode(errors='replace')
  if start is not None or stop is not None:
    _parsed(description, source)
    try:
      changed = marks.replaced(json.loads(description), start, stop)
    except ValueError as error:
      raise ValueError(f'{source} {error}') from None
    description = json.dumps(changed)
  return BPE(description, str(source))


def library():
  """The `tokenizers` module, which is optional."""
  try:
    import tokenizers
  except ImportError:
    raise ValueError(
      'BPE vocabularies need the tokenizers library: pip install tokenizers'
    ) from None
  return tokenizers


def _parsed(description, source):
  try:
    return library().Tokenizer.from_str(description)
  except Exception as error:  # the library raises nothing more specific
    problem = corruption.one_line(str(error))
    raise ValueError(
      f'{source} is not a tokenizer.json: {problem}; {HINT}'
    ) from None


def _byte_of_character():
  """GPT-2's alphabet: printable bytes stand for themselves, others from 256."""
  printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
  others = [byte for byte in range(256) if byte not in printable]
  table = {chr(byte): byte for byte in printable}
  return table | {chr(256 + i): byte for i, byte in enumerate(others)}
