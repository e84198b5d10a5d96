"""Models of Hugging Face's classes: their folders read and written."""

from mhc.interop.huggingface.folder import export
from mhc.interop.huggingface.folder import is_folder
from mhc.interop.huggingface.folder import load
from mhc.interop.huggingface.folder import read_settings

__all__ = ['export', 'is_folder', 'load', 'read_settings']
