"""The step on a mesh: layouts, matrices put together, loss and gradient."""
