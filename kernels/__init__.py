"""Fused kernels, imported as `mhc.kernels`."""

if __name__ != 'mhc.kernels':
  raise ImportError(
    f'this is mhc.kernels, not {__name__}: install the project '
    '(pip install -e .) and import mhc.kernels'
  )
