"""GPUs to compile for: what is refused, and what the compiler is told."""

import importlib.util
import re

import pytest

from mhc import config
from mhc.planner import gpu_targets
from mhc.planner import plan
from mhc.planner import targets


def test_names_of_gpus():
  for topology in ('h300:8', 'a:1'):
    with pytest.raises(ValueError, match=f"'{topology}'.*h100, h200, b200"):
      targets.devices(topology)
  for topology in ('h100', 'h100:', 'h100:0', 'h100:16', 'h100:2x4', 'b200:8 '):
    with pytest.raises(ValueError, match=f"'{topology}'.*1 to 8.*'.*:8'"):
      targets.devices(topology)
  # A number is not a TPU slice, but a generation is no GPU.
  with pytest.raises(ValueError, match=r"'v5e:4'.*v5p:2x2x1"):
    targets.devices('v5e:4')


def test_the_gpus_of_a_machine():
  """Refused with what to install, where JAX's plugin for CUDA is not."""
  if any(importlib.util.find_spec(f'jax_cuda{i}_plugin') for i in (12, 13)):
    devices = targets.devices('h100:4')
    assert [device.platform for device in devices] == ['gpu'] * 4
    assert devices[0].device_kind == gpu_targets.GPUS['h100'].kind
    return
  with pytest.raises(ValueError, match=r"h100:8.*'jax\[cuda13\]'"):
    plan.plan_step(config.Config(), 'h100:8')


@pytest.mark.parametrize('name', gpu_targets.GPUS)
def test_what_the_compiler_is_told(name):
  text = gpu_targets.textproto(gpu_targets.GPUS[name])
  assert text.count('{') == text.count('}')
  fields = dict(re.findall(r'^ +(\w+): (.*)$', text, re.MULTILINE))
  gpu = gpu_targets.GPUS[name]
  assert fields['device_memory_size'] == str(gpu.hbm)
  assert fields['core_count'] == str(gpu.cores)
  assert fields['name'] == f'"{gpu.kind}"'
  assert fields['major'] == str(gpu.capability)
  # By their data sheets, memory and its speed within a few hundredths.
  gib, terabytes = {
    'h100': (80, 3.35),
    'h200': (141, 4.8),
    'b200': (180, 7.7),
  }[name]
  assert 0.98 * gib * 1e9 < gpu.hbm < 1.08 * gib * 1e9
  assert gpu.bandwidth == pytest.approx(terabytes * 1e12, rel=0.01)
