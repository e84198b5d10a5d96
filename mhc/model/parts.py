"""Names of the parts of a training step, for those who read its program.

What is computed under `part(name)`, and what differentiates it, carries the
name in the metadata of the compiled program (profilers show it too); of parts
within each other the innermost counts. `planner.breakdown` sums up by them.
"""

import contextlib
import re

import jax

ATTENTION = 'attention'  # logits, softmax, weighted values
DENSE = 'dense_products'  # projections, FFNs, shared experts, norms
EXPERTS = 'expert_products'
ROWS = 'moving_rows'  # router; tokens to experts and back
CONNECTIONS = 'connections'
HEAD = 'head'  # embedding, last norm, logits, loss
WEIGHTS = 'weights'  # matrices put together from shards, gradients summed
BUFFERS = 'buffers'  # slices of stacked blocks and activations, pipeline slots
ACCUMULATION = 'accumulation'  # sums of gradients over microbatches
OPTIMISER = 'optimiser'
ALL = (
  ATTENTION,
  DENSE,
  EXPERTS,
  ROWS,
  CONNECTIONS,
  HEAD,
  WEIGHTS,
  BUFFERS,
  ACCUMULATION,
  OPTIMISER,
)


def part(name: str) -> contextlib.AbstractContextManager:
  """A context, or a decorator, whose operations belong to that part."""
  return jax.named_scope(f'part.{name}')


def innermost(op_name: str) -> str | None:
  """The part in an operation's name, such as 'jvp(part.head)/add'."""
  found = re.findall(r'part\.(\w+)', op_name)
  return found[-1] if found else None
