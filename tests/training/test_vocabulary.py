"""One vocabulary a run: it travels with it, and all text is read by it."""

import dataclasses
import json
import threading

from example_configs import TINY_RUN
import jax
import numpy as np
import pytest

from mhc import config as config_lib
from mhc.data import corpus as corpus_lib
from mhc.data import tokenize_corpus
from mhc.data import tokenizer as tokenizer_lib
from mhc.training import evaluate
from mhc.training import export
from mhc.training import generate
from mhc.training import run
from mhc.training import vocabulary


@pytest.fixture(scope='module')
def prepared(tmp_path_factory):
  """The same text as JSON lines and as tokens of two vocabularies."""
  root = tmp_path_factory.mktemp('vocabulary')
  words = np.random.default_rng(0).choice(['red ', 'green ', 'blue '], (60, 40))
  lines = (json.dumps({'text': ''.join(row)}) for row in words)
  (root / 'text.jsonl').write_text('\n'.join(lines))
  for size in (262, 268):
    tokenize_corpus.prepare(
      str(root / 'text.jsonl'), root / f'{size}', f'train:{size}'
    )
  return root


def test_text_is_read_by_the_vocabulary_of_the_run(prepared):
  tokens = corpus_lib.load(str(prepared / '262'))
  text = corpus_lib.load(
    str(prepared / 'text.jsonl'), tokenizer=tokens.tokenizer
  )
  for side in ('train', 'heldout'):
    one, other = getattr(tokens, side), getattr(text, side)
    # Documents come in order of the file, or of their names.
    assert sorted(one[0][:]) == sorted(other[0][:])
  as_bytes = corpus_lib.load(str(prepared / 'text.jsonl'))
  assert len(as_bytes.heldout[0]) > 1.2 * len(text.heldout[0])


def test_tokens_of_another_vocabulary_are_refused(prepared):
  known = [
    corpus_lib.load(str(prepared / size)).tokenizer for size in ('262', '268')
  ]
  for tokenizer in (known[1], tokenizer_lib.Bytes()):
    with pytest.raises(
      ValueError, match=r'another vocabulary \(\d+ tokens of bpe'
    ):
      corpus_lib.load(str(prepared / '262'), tokenizer=tokenizer)
  assert corpus_lib.load(str(prepared / '262'), tokenizer=known[0])


def test_a_run_keeps_its_vocabulary(prepared, tmp_path):
  one, two = (
    corpus_lib.load(str(prepared / size)).tokenizer for size in ('262', '268')
  )
  choices = {'bytes': tokenizer_lib.Bytes(), 'one': one, 'two': two, '': None}
  for name, first in choices.items():
    workdir = tmp_path / (name or 'unknown')
    workdir.mkdir()
    vocabulary.keep(workdir, first)
    kept = vocabulary.of(workdir)
    assert (kept and kept.description) == (first and first.description)
    vocabulary.keep(workdir, first)
    others = [one for one in choices.values() if one is not first]
    for other in others if name != 'bytes' else ():  # as a new run looks
      with pytest.raises(
        ValueError, match=r'another vocabulary than data\.path'
      ):
        vocabulary.keep(workdir, other)


def test_without_a_vocabulary_there_is_no_text(tmp_path, monkeypatch, prepared):
  vocabulary.keep(tmp_path, None)
  for module in (generate, evaluate):
    monkeypatch.setattr(
      module.workdir_lib, 'read_config', lambda _: config_lib.Config()
    )
  with pytest.raises(ValueError, match=r'vocabulary of .* is unknown'):
    generate.restore(tmp_path)
  monkeypatch.setattr(
    export.workdir_lib, 'read_config', lambda _: config_lib.Config()
  )
  with pytest.raises(ValueError, match=r'is unknown.*--tokenizer='):
    export.export(tmp_path, tmp_path / 'out')
  with pytest.raises(ValueError, match=r'is unknown.*--tokenizer='):
    evaluate.evaluate_checkpoint(tmp_path, str(prepared / 'text.jsonl'), 1)


def test_a_vocabulary_that_is_unknown_can_be_given(tmp_path, prepared):
  file = str(prepared / '262' / 'tokenizer.json')
  vocabulary.keep(tmp_path, None)
  assert vocabulary.of(tmp_path) is None
  for find in (vocabulary.of, vocabulary.required):
    assert find(tmp_path, file).num_tokens == 262
    assert find(tmp_path, 'bytes').name == 'bytes'
  known = tmp_path / 'known'
  known.mkdir()
  vocabulary.keep(known, tokenizer_lib.load(file))
  with pytest.raises(ValueError, match='knows its vocabulary: leave it out'):
    vocabulary.of(known, file)


def test_a_run_on_tokens_scores_its_own_text_as_its_held_out_text(
  prepared, tmp_path
):
  """By its own vocabulary: the same rows, the same loss."""
  settings = dataclasses.replace(
    TINY_RUN,
    num_steps=2,
    model=TINY_RUN.model.plain,
    probe_every=0,
    optimizer=config_lib.OptimizerConfig(warmup_steps=1),
    final_sequences=0,
    data=dataclasses.replace(TINY_RUN.data, path=str(prepared / '268')),
  )
  with jax.numpy_dtype_promotion('standard'):
    summary = run.train(settings, tmp_path / 'run', label=None)
    found = evaluate.evaluate_checkpoint(
      tmp_path / 'run', str(prepared / 'text.jsonl'), 0
    )
  for name, value in (
    ('loss/heldout', summary['heldout_nats']),
    ('loss/heldout_bits_per_byte', summary['heldout_bits_per_byte']),
  ):
    np.testing.assert_allclose(found[name], value, rtol=1e-6)
  assert found['rows'] == summary['heldout_rows']
  for thread in threading.enumerate():  # that have read ahead
    if thread.name.startswith('grain-prefetch'):
      thread.join(timeout=10)
      assert not thread.is_alive()
