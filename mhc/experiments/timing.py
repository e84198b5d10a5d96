"""The step times of a panel's designs, measured in turn.

Machines are shared: a step time from one run and another from the next differ
by what else went on. Here each round times every design, and a ratio is the
median over rounds of the ratio within a round. A panel's first setting is timed
once, on one worker, and kept in TIMING/PANEL.json.
"""

from collections.abc import Mapping
import json
import time
from typing import Any

import jax
import numpy as np

from mhc import config as config_lib
from mhc.runtime import files
from mhc.runtime import paths
from mhc.training import step as step_lib

TIMING = 'timing'
ROUNDS = 7
ROUND_S = 0.1  # at least, of each design


def measure(configs: Mapping[str, config_lib.Config]) -> dict[str, Any]:
  """Times the training steps of `configs` in turn, on random tokens.

  Returns:
    'device'; for each design 'compile_s', 'step_s' (median over rounds) and,
    if 'residual' is among them, 'ratio': [median, low, high] of its step time
    to the residual's in the same round, the range being that of the rounds.
  """
  programs, states, batches, inputs, made = {}, {}, {}, {}, {}
  for name, config in configs.items():
    start = time.perf_counter()
    step = step_lib.build(config)
    programs[name], inputs[name] = step.train, step.inputs()
    states[name] = jax.block_until_ready(step.init(config.seed))
    made[name] = time.perf_counter() - start
    batches[name] = step.random_tokens()
  seconds = {name: [] for name in configs}
  for _ in range(ROUNDS + 1):
    for name, program in programs.items():
      start, count = time.perf_counter(), 0
      while not count or time.perf_counter() - start < ROUND_S:
        states[name], metrics = program(
          states[name], batches[name], inputs[name]
        )
        jax.block_until_ready(metrics)
        count += 1
      seconds[name].append((time.perf_counter() - start) / count)
  rounds = {name: np.array(each[1:]) for name, each in seconds.items()}
  found: dict[str, Any] = {'device': jax.devices()[0].device_kind}
  for name, each in rounds.items():
    found[name] = {'compile_s': made[name], 'step_s': float(np.median(each))}
    if 'residual' in rounds:
      ratio = each / rounds['residual']
      found[name]['ratio'] = [
        float(f(ratio)) for f in (np.median, np.min, np.max)
      ]
  return found


def path(workdir: paths.Path, panel: str) -> paths.Path:
  return workdir / TIMING / f'{panel}.json'


def write(
  workdir: paths.Path,
  panel: str,
  configs: Mapping[str, config_lib.Config],
):
  """Measures a panel and keeps what was found."""
  file = path(workdir, panel)
  file.parent.mkdir(parents=True, exist_ok=True)
  files.replace(
    file, json.dumps(measure(configs), indent=2) + '\n', shared=True
  )


def read(workdir: paths.Path, panel: str) -> dict[str, Any] | None:
  """What `measure` has found; None if it has not been measured."""
  file = path(workdir, panel)
  return files.read_json(file) if file.exists() else None
