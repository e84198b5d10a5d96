"""Keeps the quotes of shapes in signatures: Float[Array, 'n'].

Griffe reads a string in an annotation as code where it can, 'n' but not 'n d'.
"""

import griffe

HINTS = ('Float', 'Int', 'Bool', 'Shaped')


class Shapes(griffe.Extension):
  """Quotes shapes in the annotations of functions and attributes."""

  def on_function(self, *, func, **_):
    for annotation in (func.returns, *(p.annotation for p in func.parameters)):
      quote(annotation)

  def on_attribute(self, *, attr, **_):
    quote(attr.annotation)


def quote(expression):
  """Quotes the shapes in an annotation, in place."""
  if not isinstance(expression, griffe.Expr):
    return
  if (
    isinstance(expression, griffe.ExprSubscript)
    and str(expression.left) in HINTS
    and isinstance(expression.slice, griffe.ExprTuple)
  ):
    elements = expression.slice.elements
    if not str(elements[-1]).startswith(("'", '"')):
      elements[-1] = repr(str(elements[-1]))
    return
  for part in expression.iterate(flat=False):
    if part is not expression:
      quote(part)
