"""Bytes and BPE: lossless, and they know the bytes of each token."""

import json
import pathlib

import numpy as np
import pytest
import tokenizers

from mhc.data import marks
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


def with_added(bpe, *names, template=None):
  """A vocabulary with more marks, and a post-processor."""
  whole = tokenizers.Tokenizer.from_str(bpe.description)
  whole.add_special_tokens(list(names))
  parsed = json.loads(whole.to_str())
  parsed['added_tokens'] = [
    token
    for token in parsed['added_tokens']
    if token['content'] not in marks.TRAINED
  ]
  parsed['post_processor'] = template
  return json.dumps(parsed)


def template(*names):
  """A post-processor of these names around the text, which is None."""
  text = {'Sequence': {'id': 'A', 'type_id': 0}}
  return {
    'type': 'TemplateProcessing',
    'single': [
      {'SpecialToken': {'id': name, 'type_id': 0}} if name else text
      for name in names
    ],
    'pair': [text, text],
    'special_tokens': {
      name: {'id': name, 'ids': [0], 'tokens': [name]} for name in names if name
    },
  }


@pytest.mark.parametrize(
  ('names', 'post_processor', 'start', 'stop'),
  [
    # Llama 3, DeepSeek, a template that names none of the known.
    (('<|begin_of_text|>', '<|end_of_text|>'), None, 0, 1),
    (
      ('<|begin_of_text|>', '<|end_of_text|>'),
      ('<|begin_of_text|>', None),
      0,
      1,
    ),
    (('<s>', '</s>', '<|eod|>', '<|bod|>'), ('<|bod|>', None, '<|eod|>'), 3, 2),
    # It says that nothing precedes a text.
    (('<s>', '</s>'), (None, '</s>'), 1, 1),
    # Qwen: no start.
    (('<|endoftext|>', '<|im_start|>'), None, 0, 0),
  ],
)
def test_marks_of_published_kinds(bpe, names, post_processor, start, stop):
  around = post_processor and template(*post_processor)
  for processor in (
    around,
    {'type': 'Sequence', 'processors': [around] if around else []},
  ):
    loaded = tokenizer.BPE(with_added(bpe, *names, template=processor))
    numbers = [loaded._tokenizer.token_to_id(name) for name in names]
    assert (loaded.start, loaded.stop) == (numbers[start], numbers[stop])
    tokens = loaded.encode_documents([b'a text', b'another'])
    assert tokens[-1] == loaded.stop
    assert (tokens == loaded.start).sum() == 2
    assert (tokens[0] == loaded.start) == (start != stop)
    assert loaded.num_bytes(tokens) == len(b'a textanother')


def test_marks_as_roberta_has_them(bpe):
  around = {
    'type': 'RobertaProcessing',
    'cls': ['<s>', 1],
    'sep': ['</s>', 2],
    'trim_offsets': True,
    'add_prefix_space': False,
  }
  text = with_added(bpe, '<|endoftext|>', '<s>', '</s>', template=around)
  loaded = tokenizer.BPE(text)
  assert (loaded.start_name, loaded.stop_name) == ('<s>', '</s>')


def test_marks_that_are_asked_for(bpe, tmp_path):
  file = tmp_path / 'tokenizer.json'
  file.write_text(with_added(bpe, '<|im_start|>', '<|endoftext|>', '<|eod|>'))
  own = tokenizer.load(file)
  assert own.start == own.stop
  asked = tokenizer.load(file, start='<|im_start|>', stop='<|eod|>')
  # They travel with the vocabulary.
  for loaded in (asked, tokenizer.BPE(asked.description)):
    tokens = loaded.encode_documents([b'a text'])
    assert loaded._tokenizer.id_to_token(int(tokens[0])) == '<|im_start|>'
    assert loaded._tokenizer.id_to_token(int(tokens[-1])) == '<|eod|>'
    assert loaded.decode(tokens) == b'a text'
  none = tokenizer.load(file, start='')
  assert none.start == none.stop == own.stop
  # A mark that no list has, of a vocabulary that is refused without it.
  file.write_text(with_added(bpe, '<|eod|>'))
  with pytest.raises(ValueError, match='--stop_mark'):
    tokenizer.load(file)
  assert tokenizer.load(file, stop='<|eod|>').stop_name == '<|eod|>'
  with pytest.raises(ValueError, match=r"no token '<bos>'.*only <\|eod\|>"):
    tokenizer.load(file, start='<bos>', stop='<|eod|>')
  with pytest.raises(ValueError, match='marks of their own'):
    tokenizer.load('bytes', start='<s>')
