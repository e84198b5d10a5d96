"""Bytes and BPE: lossless, and they know the bytes of each token."""

import json
import pathlib

import numpy as np
import pytest
import tokenizers

from mhc.data import tokenizer

TEXTS = [
  'def f(x):\n    return x + 1\n',
  'def g(y):\n\treturn y - 1  # héllo 你好 \U0001f600\n',
  'a document with <|stop|> spelled out',
]
DOCUMENTS = [text.encode() for text in TEXTS]


@pytest.fixture(scope='module')
def bpe():
  return tokenizer.BPE.train(DOCUMENTS * 3, 300)


def test_bpe_is_lossless_and_counts_its_bytes(bpe):
  assert 258 < bpe.num_tokens <= 300
  for text in DOCUMENTS:
    tokens = bpe.encode(text)
    assert bpe.decode(tokens) == text
    assert bpe.num_bytes(tokens) == len(text) > len(tokens)
    assert bpe.stop not in tokens
  tokens = bpe.encode_documents(DOCUMENTS)
  assert tokens.dtype == np.uint16
  assert (tokens == bpe.stop).sum() == (tokens == bpe.start).sum() == 3
  assert bpe.decode(tokens) == b''.join(DOCUMENTS)
  assert bpe.num_bytes(tokens) == sum(map(len, DOCUMENTS))


def test_bytes_count_without_marks():
  tokens = tokenizer.Bytes().encode_documents(DOCUMENTS)
  assert tokenizer.Bytes().num_bytes(tokens) == sum(map(len, DOCUMENTS))


def test_a_vocabulary_comes_back_from_its_file(bpe, tmp_path):
  file = tmp_path / 'tokenizer.json'
  file.write_text(bpe.description)
  again = tokenizer.load(file)
  for text in DOCUMENTS:
    np.testing.assert_array_equal(again.encode(text), bpe.encode(text))
  assert isinstance(tokenizer.load('bytes'), tokenizer.Bytes)


def edited(bpe, change):
  description = json.loads(bpe.description)
  change(description)
  return json.dumps(description)


def test_unusable_vocabularies_say_why(bpe, tmp_path):
  with pytest.raises(OSError, match='nowhere'):
    tokenizer.load(pathlib.Path('nowhere.json'))
  with pytest.raises(ValueError, match=r'not a tokenizer\.json'):
    tokenizer.BPE('{}')
  with pytest.raises(ValueError, match='not a byte-level'):
    tokenizer.BPE(edited(bpe, lambda d: d.update(decoder=None)))
  unmarked = edited(bpe, lambda d: d.update(added_tokens=[]))
  with pytest.raises(ValueError, match='none of the marks'):
    tokenizer.BPE(unmarked)
  growing = {'type': 'Prepend', 'prepend': 'x'}  # each time it is applied
  lossy = tokenizer.BPE(edited(bpe, lambda d: d.update(normalizer=growing)))
  with pytest.raises(ValueError, match='lossy'):
    lossy.encode_documents([b'a text'])


def test_normalized_text_is_what_counts(bpe):
  """As Qwen's vocabularies do, and as a combining accent shows."""
  nfc = tokenizer.BPE(
    edited(bpe, lambda d: d.update(normalizer={'type': 'NFC'}))
  )
  texts = ['cafe\N{COMBINING ACUTE ACCENT}', 'plain']
  tokens = nfc.encode_documents([text.encode() for text in texts])
  assert (
    nfc.decode(tokens).decode() == 'caf\N{LATIN SMALL LETTER E WITH ACUTE}plain'
  )
  assert nfc.num_bytes(tokens) == len(nfc.decode(tokens))
  assert nfc.num_normalized == 1


def test_added_tokens_that_are_text(bpe):
  """Runs of spaces, as NeoX, Pythia and OLMo have them; é is two bytes."""
  whole = tokenizers.Tokenizer.from_str(bpe.description)
  whole.add_tokens(
    [
      tokenizers.AddedToken('    ', normalized=False),
      tokenizers.AddedToken('é!', normalized=False),
    ]
  )
  loaded = tokenizer.BPE(whole.to_str())
  text = 'if x:\n        é! y\n'.encode()
  tokens = loaded.encode(text)
  assert (tokens >= bpe.num_tokens).sum() == 3
  assert loaded.decode(tokens) == text
  assert loaded.num_bytes(tokens) == len(text)
  loaded.encode_documents([text])
  assert loaded.decode([loaded.num_tokens, *tokens, 10**6]) == text


def test_a_published_kind_of_vocabulary_has_one_mark():
  """As GPT-2's: <|endoftext|> alone, which opens and closes."""
  plain = tokenizers.Tokenizer(tokenizers.models.BPE())
  plain.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
    add_prefix_space=False
  )
  plain.decoder = tokenizers.decoders.ByteLevel()
  plain.train_from_iterator(
    TEXTS,
    tokenizers.trainers.BpeTrainer(
      vocab_size=280,
      special_tokens=['<|endoftext|>'],
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
      show_progress=False,
    ),
  )
  loaded = tokenizer.BPE(plain.to_str())
  assert loaded.start == loaded.stop
  tokens = loaded.encode_documents(DOCUMENTS)
  assert (tokens == loaded.stop).sum() == 3
