"""Text to batches: documents, tokenizers, token files, rows."""
