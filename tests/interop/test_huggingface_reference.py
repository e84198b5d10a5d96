"""The reference of Hugging Face's models stays what transformers agreed to."""

import huggingface_reference as reference
import numpy as np
import pytest
from slow import huggingface as proof


@pytest.mark.parametrize('name', proof.CASES)
def test_logits_are_those_of_transformers(name, tmp_path):
  case = proof.CASES[name]
  proof.write(case, tmp_path)
  given = proof.tokens(reference.EVERY['vocab_size'])
  found = reference.logits(tmp_path, given[:, : proof.PINNED + 1])
  np.testing.assert_allclose(found[0, -1, -3:], case.pinned, 0, 5e-5)


@pytest.mark.parametrize('architecture', reference.MODEL_TYPES)
def test_no_token_is_seen_by_those_before(architecture, tmp_path):
  reference.random_folder(tmp_path, architecture)
  tokens = np.random.default_rng(0).integers(320, size=(2, 9))
  other = np.concatenate([tokens[:, :6], (tokens[:, 6:] + 1) % 320], axis=1)
  first, second = (reference.logits(tmp_path, one) for one in (tokens, other))
  np.testing.assert_allclose(first[:, :6], second[:, :6], 0, 1e-12)
  assert np.all(np.max(np.abs(first - second)[:, 6:], axis=-1) > 1e-3)
