"""What is said of the machine, and of an accelerator that is not used."""

import jax

from mhc.runtime import accelerators
from mhc.runtime import machine


def test_the_description_names_devices_and_versions():
  text = machine.describe()
  assert f'JAX runs on {jax.device_count()} x cpu' in text
  assert f'jax {jax.__version__}, jaxlib' in text
  assert 'WARNING' not in text


def test_the_description_warns_of_an_unused_accelerator(monkeypatch):
  monkeypatch.setattr(accelerators, 'unused', 'a GPU, not {}'.format)
  assert 'WARNING: a GPU, not cpu' in machine.describe()
