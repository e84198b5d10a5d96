"""Models of Hugging Face's classes: their folders read and written."""

from mhc.interop.huggingface.folder import is_folder
from mhc.interop.huggingface.folder import load
from mhc.interop.huggingface.folder import read_settings
from mhc.interop.huggingface.folder import write
from mhc.interop.huggingface.settings import to_config

__all__ = ['is_folder', 'load', 'read_settings', 'to_config', 'write']
