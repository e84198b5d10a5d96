"""What a traced program consists of."""

from collections.abc import Iterator

from jax.extend import core


def equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
  """Of a jaxpr and of all those inside it."""
  for equation in jaxpr.eqns:
    yield equation
    for value in equation.params.values():
      for item in value if isinstance(value, tuple | list) else [value]:
        if isinstance(item, core.ClosedJaxpr):
          item = item.jaxpr
        if isinstance(item, core.Jaxpr):
          yield from equations(item)
