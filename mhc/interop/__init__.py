"""Models in the forms of others: safetensors, DeepSeek's, Hugging Face's."""

try:
  from mhc.interop.deepseek import connection_from_deepseek
  from mhc.interop.deepseek import connection_to_deepseek
  from mhc.interop.deepseek import from_deepseek
  from mhc.interop.deepseek import to_deepseek
  from mhc.interop.safetensors import load
except ModuleNotFoundError as error:
  if (error.name or 'mhc').split('.')[0] == 'mhc':
    raise
  raise ImportError(
    f"mhc.interop needs {error.name}: pip install 'mhc-jax[train]'"
  ) from error

__all__ = [
  'connection_from_deepseek',
  'connection_to_deepseek',
  'from_deepseek',
  'load',
  'to_deepseek',
]
