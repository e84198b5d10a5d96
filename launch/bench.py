"""Benchmarks connections: time against a copy, memory against the formula.

    python launch/bench.py              # connections: a Markdown table
    python launch/bench.py recompute    # memory of each recompute policy
    python launch/bench.py kernels      # TPU kernels, by the TPU's compiler
    python launch/bench.py attention    # the TPU's attention kernels, likewise
    python launch/bench.py overhead     # mHC in a step of the paper's models
    python launch/bench.py triton       # GPU kernels, by Triton's compiler
    python launch/bench.py bandwidth    # the operations, on the device here
    python launch/bench.py device       # all that an accelerator here can tell
    python launch/bench.py telemetry    # guards and probes, in steps
    python launch/bench.py data         # reading of rows, beside the disk
    python launch/bench.py --json       # one JSON object a row

`recompute` compiles the gradient of a 16-block model and compares XLA's
temporary bytes with Eq. 20, in units of C numbers a token; it runs nothing.

`kernels` compiles every kernel for TPUs that need not be present and compares
the bytes that it moves and the instructions that the compiler schedules with
plain JAX; it runs nothing either, and requires pip install 'jax[tpu]'. `triton`
lists registers, spills and shared memory of the GPU kernels, without a GPU.

`bandwidth` times the operations on the local device, with --implementation
(triton on a GPU, for instance), and gives the least bytes that they must move,
per second, as a fraction of the rate of a copy of the streams in the same run.

`device` takes some minutes of one GPU or TPU (about 20 GB): the error of every
kernel and gradient against the reference in float64, `bandwidth` of each
implementation, attention beside plain JAX, and an entire training step of each
kind at the paper's 3B width, with the rate of a matrix product in the same run
and the time that `aot.py --suggest` expects at that rate beside it.

`telemetry` times a training step with and without a guard that can skip the
update, and a probe of gains, streams and residuals.

`data` reads rows of a token folder, its own or --data's, in blocks and ahead,
and imitates steps of 0.5 s whose reads take --latency_ms longer.

`connections` times the projection and entire sites: what a connection adds
around a sub-layer, mappings, `pre` and `post`, with the identity as the
sub-layer. Every time is a ratio to copying the [tokens, n, C] float32 tensor on
the same device in the same run, the two timed in turn: on a shared machine only
this ratio is reliable. The projection is timed on 4 matrices a token.
"""

from collections.abc import Iterator
import dataclasses
import json
import pathlib
import statistics
import tempfile
import time

from absl import flags
import jax
import numpy as np

from mhc import config
from mhc import manifold
from mhc.data import reading_cost
from mhc.kernels import shapes
from mhc.model import recompute
from mhc.model import residual
from mhc.parallel import memory
from mhc.parallel import partition
from mhc.planner import attention_cost
from mhc.planner import bundles
from mhc.planner import connection_cost
from mhc.planner import kernel_cost
from mhc.planner import kernel_timing
from mhc.planner import on_device
from mhc.runtime import cli
from mhc.training import step

JSON = flags.DEFINE_bool('json', False, 'Print one JSON object a row.')
TOKENS = flags.DEFINE_integer('tokens', 4096, 'Token count.', lower_bound=1)
STREAMS = flags.DEFINE_integer('streams', 4, 'Stream count.', lower_bound=1)
WIDTHS = flags.DEFINE_list('widths', ['512', '1024'], 'Model widths C.')
KINDS = flags.DEFINE_list(
  'kinds', ['hc', 'mhc', 'identity'], 'Kinds of connection to time.'
)
ROUNDS = flags.DEFINE_integer(
  'rounds', 15, 'Timings per case, of which the median counts.', lower_bound=1
)
KERNEL_WIDTHS = flags.DEFINE_list(
  'kernel_widths',
  [str(width) for width in shapes.WIDTHS],
  'Model widths C of `kernels` and `triton`.',
)
GENERATIONS = flags.DEFINE_list(
  'generations', ['v5e', 'v5p', 'v6e', 'tpu7x'], 'TPUs of `kernels`.'
)
OPERATIONS = flags.DEFINE_list(
  'operations',
  list(kernel_cost.OPERATIONS),
  'Operations of `kernels`, `bandwidth` and `device`.',
)
BLOCKS = flags.DEFINE_integer(
  'blocks', 4, 'Blocks of the model of `device`.', lower_bound=1
)
ROWS = flags.DEFINE_integer(
  'rows', 8, 'Rows a step and device of `device`.', lower_bound=1
)
TABLES = flags.DEFINE_multi_enum(
  'table',
  ['errors', 'operations', 'attention', 'steps'],
  ['errors', 'operations', 'attention', 'steps'],
  'Tables of `device`; can be given several times.',
)
DATA = flags.DEFINE_string('data', '', 'Token folder of `data`.')
LATENCY_MS = flags.DEFINE_float('latency_ms', 20, 'Of a read of `data`.')
IMPLEMENTATION = flags.DEFINE_enum(
  'implementation',
  None,
  ['xla', 'pallas', 'triton'],
  'Implementation that `bandwidth` times; by default the best available.',
)


def main(what):
  COMMANDS[what]()


def _device():
  for name in TABLES.value:
    rows = {
      'errors': lambda: on_device.parity_rows(OPERATIONS.value),
      'operations': _each_bandwidth,
      'attention': lambda: on_device.attention_rows(ROUNDS.value),
      'steps': _each_step,
    }[name]()
    if not JSON.value:
      print(f'\n{name} on {jax.devices()[0].device_kind}\n')
    _print_rows(rows, {'table': name})


def _each_bandwidth():
  for name in on_device.implementations():
    for row in _operations(name):
      yield {'implementation': name, **row}


def _each_step():
  base = on_device.base(BLOCKS.value, ROWS.value)
  return on_device.step_rows(base, ('residual', *KINDS.value), ROUNDS.value)


def _operations(implementation):
  """The rows of `kernel_timing` that the flags ask for."""
  return kernel_timing.rows(
    [name for name in OPERATIONS.value if name != 'sinkhorn'],
    [int(width) for width in WIDTHS.value],
    TOKENS.value,
    STREAMS.value,
    implementation,
    ROUNDS.value,
  )


def _print_rows(rows, extra=None):
  """All columns as a Markdown table, or each row as JSON with `extra`."""
  for number, row in enumerate(rows):
    if JSON.value:
      print(json.dumps({**(extra or {}), **row}), flush=True)
      continue
    if not number:
      print(f'| {" | ".join(row)} |\n|---{"|---:" * (len(row) - 1)}|')
    cells = (
      f'{v:.4g}' if isinstance(v, float) else str(v) for v in row.values()
    )
    print(f'| {" | ".join(cells)} |', flush=True)


def _bandwidth():
  if not JSON.value:
    print(f'{TOKENS.value} tokens, n = {STREAMS.value}, bfloat16, ', end='')
    print(f'{jax.devices()[0].device_kind}\n')
  _print_rows(_operations(IMPLEMENTATION.value))


def _data():
  with tempfile.TemporaryDirectory() as name:
    folder = pathlib.Path(DATA.value or name)
    if not DATA.value:
      reading_cost.make_folder(folder, 2**27)
    seconds = LATENCY_MS.value / 1e3
    _print_rows(reading_cost.rows(folder, latency_s=seconds))


def _triton():
  # Imported here, since Triton is not installed everywhere.
  from mhc.kernels.triton import resources

  widths = [int(width) for width in KERNEL_WIDTHS.value]
  _print_rows(resources.rows(widths))


def _kernels():
  folder = bundles.folder()
  widths = [int(width) for width in KERNEL_WIDTHS.value]
  if not JSON.value:
    print(kernel_cost.HEADER)
  rows = kernel_cost.rows(OPERATIONS.value, widths, GENERATIONS.value, folder)
  for row in rows:
    text = json.dumps(row) if JSON.value else kernel_cost.line(row)
    print(text, flush=True)
  bundles.empty(folder)
  folder.rmdir()


def _attention():
  folder = bundles.folder()
  if not JSON.value:
    print(attention_cost.HEADER)
  for generation in GENERATIONS.value:
    for row in attention_cost.rows(attention_cost.Case(), generation, folder):
      text = json.dumps(row) if JSON.value else attention_cost.line(row)
      print(text, flush=True)
  folder.rmdir()


def _overhead():
  folder = bundles.folder()
  sizes, generations = connection_cost.SIZES, GENERATIONS.value
  _print_rows(connection_cost.rows(sizes, generations, folder))
  folder.rmdir()


def _connections():
  widths = [int(width) for width in WIDTHS.value]
  cases = list(_cases(TOKENS.value, STREAMS.value, widths, KINDS.value))
  if not JSON.value:
    print(f'{TOKENS.value} tokens, n = {STREAMS.value}, float32, ', end='')
    print(f'{jax.devices()[0].device_kind}\n')
    print('| op | C | direction | ms | copy ms | x copy |')
    print('|---|---:|---|---:|---:|---:|')
  for op, width, direction, function, arguments in cases:
    tensor = _normal(0, TOKENS.value, STREAMS.value, width)
    seconds, copy = kernel_timing.seconds(
      function, arguments, tensor, ROUNDS.value
    )
    row = {
      'op': op,
      'tokens': TOKENS.value,
      'n': STREAMS.value,
      'C': width,
      'direction': direction,
      'ms': 1e3 * seconds,
      'copy_ms': 1e3 * copy,
      'ratio_to_copy': seconds / copy,
    }
    if JSON.value:
      print(json.dumps(row), flush=True)
    else:
      print(
        f'| {op} | {width} | {direction} | {row["ms"]:.2f} | '
        f'{row["copy_ms"]:.2f} | {row["ratio_to_copy"]:.2f} |',
        flush=True,
      )


def _recompute():
  base = config.ModelConfig(num_blocks=16, dim=256, ffn_dim=512)
  rows, length = 64, 64
  unit = rows * length * base.dim * 4
  sublayers = 2 * base.num_blocks
  settings = [('none', 2, 'residual'), ('none', 2, 'mhc')]
  best = recompute.optimal_interval(sublayers, STREAMS.value)
  settings += [('mhc', every, 'mhc') for every in (2, 4, 6, 8, 16, 32)]
  settings += [('mhc+block', best, 'mhc'), ('full', best, 'mhc')]
  if not JSON.value:
    print(
      f'{sublayers} sub-layers, n = {STREAMS.value}, C = {base.dim}, '
      f'{rows * length} tokens, L_r* = {best}; in C numbers a token\n'
    )
    print(
      '| policy | L_r | connection | streams by formula | XLA temporaries |'
    )
    print('|---|---:|---|---:|---:|')
  for policy, every, kind in settings:
    model = dataclasses.replace(
      base,
      recompute=policy,
      recompute_every=every,
      connection=config.ConnectionConfig(kind=kind, num_streams=STREAMS.value),
    )
    streams = memory.activations(model)['streams'] / (4 * base.dim)
    compiled = memory.compile_gradient(model, rows, length)
    measured = compiled.memory_analysis().temp_size_in_bytes / unit
    if JSON.value:
      row = {
        'policy': policy,
        'L_r': every,
        'connection': kind,
        'streams_by_formula': streams,
        'xla_temporaries': measured,
      }
      print(json.dumps(row), flush=True)
    else:
      shown = '' if policy == 'none' else every
      print(
        f'| {policy} | {shown} | {kind} | {streams:.0f} | {measured:.1f} |',
        flush=True,
      )


def _telemetry():
  base = config.Config(probe_every=25)
  rows = []
  for blocks in (4, 16):
    wide = dataclasses.replace(base.model, num_blocks=blocks)
    guarded = dataclasses.replace(base, model=wide)
    free = dataclasses.replace(
      guarded, guards=dataclasses.replace(base.guards, nonfinite='log')
    )
    with_guard, without, probe = _step_times(guarded, free)
    rows.append(
      {
        'blocks': blocks,
        'step_ms': 1e3 * without,
        'skipping': with_guard / without - 1,
        'probe_steps': probe / without,
        'probe_every_25': probe / without / 25,
      }
    )
  if JSON.value:
    print(*map(json.dumps, rows), sep='\n')
    return
  print(
    '| blocks | step, ms | guard in the step | a probe, in steps | each 25 |'
  )
  print('|---:|---:|---:|---:|---:|')
  for row in rows:
    print(
      f'| {row["blocks"]} | {row["step_ms"]:.1f} | {row["skipping"]:+.1%} | '
      f'{row["probe_steps"]:.2f} | {row["probe_every_25"]:.2%} |'
    )


def _step_times(guarded, free):
  """Median seconds of a step with skipping guards, without, and of a probe."""
  made = [step.build(settings) for settings in (guarded, free)]
  states = [programs.init(0) for programs in made]
  tokens = made[1].random_tokens()
  row = partition.put(
    np.asarray(tokens)[:1, :-1], made[1].mesh, partition.REPLICATED
  )
  samples = [], [], []
  for number in range(ROUNDS.value + 2):
    for which in range(3):
      start = time.perf_counter()
      if which == 2:
        jax.block_until_ready(made[1].probe(states[1], row))
      else:
        states[which], metrics = made[which].train(
          states[which], tokens, made[which].inputs()
        )
        jax.block_until_ready(metrics)
      if number >= 2:
        samples[which].append(time.perf_counter() - start)
  return [statistics.median(times) for times in samples]


def _cases(tokens, n, widths, kinds) -> Iterator[tuple]:
  """Yields (op, C, direction, function, arguments)."""

  def both_ways(op, width, function, arguments, cotangent):
    def pull_back(cotangent, *arguments):
      return jax.vjp(function, *arguments)[1](cotangent)

    yield op, width, 'forward', function, arguments
    yield op, width, 'forward+backward', pull_back, (cotangent, *arguments)

  for width in widths:
    logits = _normal(1, 4 * tokens, n, n)
    yield from both_ways(
      'sinkhorn', width, manifold.sinkhorn_project, (logits,), logits[::-1]
    )
    x = _normal(2, tokens, n, width)
    for kind in kinds:
      settings = config.ConnectionConfig(kind=kind, num_streams=n)
      connection = residual.make_connection(
        settings, width, 0, norm_eps=1e-20, depth=2, is_first=True
      )
      # Away from the initial zeros, which a compiler could exploit.
      connection = jax.tree.map(
        lambda leaf: leaf + 0.01 * _normal(3, *leaf.shape), connection
      )
      yield from both_ways(
        f'site {kind}', width, _site, (connection, x), _normal(4, *x.shape)
      )


def _site(connection, x):
  h, context = connection.pre(x)
  return connection.post(h, context)


def _normal(seed, *shape):
  return jax.random.normal(jax.random.key(seed), shape)


COMMANDS = {
  'connections': _connections,
  'recompute': _recompute,
  'kernels': _kernels,
  'attention': _attention,
  'overhead': _overhead,
  'triton': _triton,
  'bandwidth': _bandwidth,
  'telemetry': _telemetry,
  'data': _data,
  'device': _device,
}


if __name__ == '__main__':
  cli.run(main, choices=tuple(COMMANDS))
