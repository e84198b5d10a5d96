"""A trained model as another kind, and how much that changes what it computes.

The sub-layers are taken as they are; connections start as they always do, near
the plain residual. Most kinds start as the same function; how near is measured.
"""

import dataclasses
import functools
import math

from flax import nnx
import jax
import jax.numpy as jnp
import numpy as np

from mhc import config as config_lib
from mhc.interop import names
from mhc.interop import safetensors
from mhc.model import layers
from mhc.model import transformer
from mhc.runtime import config_file
from mhc.runtime import files
from mhc.runtime import paths
from mhc.training import start
from mhc.training import vocabulary

# Of the logits' root mean square, what float32 may do to a deep network.
TOLERANCE = 1e-5
ROWS, TOKENS = 2, 64


def difference(ours: start.Source, theirs: start.Source) -> float:
  """The largest difference of logits over their root mean square.

  Both compute in float32, on random tokens.
  """
  size = theirs.model.vocab_size
  tokens = np.random.default_rng(0).integers(size, size=(ROWS, TOKENS))
  tokens = jnp.asarray(tokens, jnp.int32)
  got, want = (logits(source, tokens) for source in (ours, theirs))
  rms = math.sqrt(np.mean(np.square(want, dtype=np.float64)))
  return float(np.max(np.abs(got - want))) / (rms or 1.0)


def logits(source: start.Source, tokens: jax.Array) -> np.ndarray:
  """float32 [b, t, v] of tokens [b, t]."""
  run = _network(dataclasses.replace(source.model, dtype='float32'))
  return np.asarray(run(source.params, source.router_bias, tokens))


@functools.lru_cache(maxsize=8)
def _network(model):
  """A program that is compiled once, however many weights it is run with."""
  graphdef, _ = transformer.abstract(model)

  @jax.jit
  def run(params, bias, tokens):
    return nnx.merge(graphdef, nnx.State(params))(tokens, bias)

  return run


def merged(source: start.Source) -> start.Source:
  """A model without adapters: W + A B in the place of W."""
  if not source.model.adapter_rank:
    return source

  model = dataclasses.replace(source.model, adapter_rank=0)
  return start.Source(model, layers.merged(source.params), source.router_bias)


def convert(
  folder: paths.Path,
  model: config_lib.ModelConfig,
  seed: int = 0,
  *,
  allow_different: bool = False,
) -> tuple[start.Source, float]:
  """Reads a model and makes it another kind.

  Args:
    folder: of a run, an export or Hugging Face.
    model: what it becomes; its body must be that of the folder.
    seed: of the connections and adapters.
    allow_different: whether another function at the start is accepted.

  Returns:
    the model, and its `difference` from the one in the folder.

  Raises:
    ValueError: the model cannot be read, has another body, or would not start
      as the same function.
  """
  source = start.read(folder)
  base = source
  if source.model.adapter_rank != model.adapter_rank:
    base = merged(source)
  result = start.convert(base, model, seed)
  found = difference(result, source)
  if not found <= TOLERANCE and not allow_different:
    raise ValueError(
      f'connection.kind={model.connection.kind!r} would not start as the model '
      f'in {folder}: logits differ by {found:.2g} of their size, more than '
      f'{TOLERANCE:g}; --allow_different accepts that'
    )
  return result, found


def write(source: start.Source, folder: paths.Path, out: paths.Path):
  """Writes a model as `export.export` does, with the vocabulary of `folder`.

  Raises:
    ValueError: its tensors do not say all that it computes.
  """
  names.check_model(source.model)
  safetensors.check_empty(out)
  config = config_lib.Config(model=source.model)
  with safetensors.made(paths.absolute(out)) as partial:
    config_file.write(partial, config)
    for name in (vocabulary.TOKENIZER, vocabulary.UNKNOWN):
      if (folder / name).exists():
        files.replace(partial / name, (folder / name).read_text())
    tree = source.params | {'router_bias': source.router_bias}
    parts = names.tensors(source.model)
    safetensors.write(partial, tree, parts, safetensors.MAX_BYTES, 0)
