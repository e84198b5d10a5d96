"""Preparation in parts and buckets of a few documents."""

import pytest

from mhc.data import tokenize_corpus


@pytest.fixture
def small_parts(monkeypatch):
  def set_sizes(part, bucket):
    monkeypatch.setattr(tokenize_corpus, 'PART_BYTES', (part, part))
    monkeypatch.setattr(tokenize_corpus, 'BUCKET_BYTES', bucket)
    monkeypatch.setattr(tokenize_corpus, 'BATCH', 7)

  return set_sizes
