"""Import and export of models: safetensors, DeepSeek's connections."""

from mhc.interop.deepseek import connection_from_deepseek
from mhc.interop.deepseek import connection_to_deepseek
from mhc.interop.deepseek import from_deepseek
from mhc.interop.deepseek import to_deepseek
from mhc.interop.safetensors import export
from mhc.interop.safetensors import load

__all__ = [
  'connection_from_deepseek',
  'connection_to_deepseek',
  'export',
  'from_deepseek',
  'load',
  'to_deepseek',
]
