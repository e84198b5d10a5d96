r"""Runs several processes on this machine's CPUs, like hosts of a cluster.

    python launch/local_multiprocess.py --processes=2 --devices=4 -- \
      launch/train.py --workdir=runs/many --config.mesh.pipe=2 \
      --config.data.microbatch_size=1

The command after `--` is started --processes times, each with --devices CPU
devices and its --coordinator, --num_processes and --process_id. Lines of all
but process 0 begin with the process index. SIGINT and SIGTERM are forwarded to
all; a later one, after a second, kills them. They get SIGTERM, too, when this
program is killed. If one fails, the others, which could only wait for it, are
killed, and its exit status becomes that of this program.
Installed without a clone, the command is `-m mhc.launch.train ...`.
"""

import contextlib
import os
import queue
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

from absl import flags

from mhc.runtime import cli
from mhc.runtime import processes
from mhc.runtime import signals

PROCESSES = flags.DEFINE_integer(
  'processes', 2, 'Number of processes to start.', lower_bound=1
)
DEVICES = flags.DEFINE_integer(
  'devices', 1, 'CPU devices per process.', lower_bound=1
)
GRACE = 3  # seconds after a failure in which the others can report theirs


def main(*command):
  if not command:
    raise ValueError(
      'no command to start: append -- launch/train.py --workdir=..., or '
      '-- -m mhc.launch.train --workdir=... without a clone'
    )
  children, first = [], []

  def forward(number, _):
    first.append(time.monotonic())
    if len(first) == 1 or first[-1] - first[0] > signals.SAME_S:
      for child in children:
        child.send_signal(number if len(first) == 1 else signal.SIGKILL)

  for number in signals.heeded():
    signal.signal(number, forward)
  port, printers = _free_port(), []
  for index in range(PROCESSES.value):
    child = _start(command, index, port)
    children.append(child)
    for source, sink in (child.stdout, sys.stdout), (child.stderr, sys.stderr):
      if source:
        printer = threading.Thread(target=_print, args=(index, source, sink))
        printer.start()
        printers.append(printer)
  status = _wait(children)
  for printer in printers:
    printer.join()
  sys.exit(status)


def _start(command, index, port):
  devices = f'--xla_force_host_platform_device_count={DEVICES.value}'
  # Two processes pair messages in the order in which they arrive: without this
  # XLA sends whatever is ready first, which differs between processes.
  order = '--xla_cpu_enable_concurrency_optimized_scheduler=false'
  others = re.sub(
    r'--xla_force_host_platform_device_count=\S+',
    '',
    os.environ.get('XLA_FLAGS', ''),
  )
  return subprocess.Popen(
    processes.tied(
      [
        sys.executable,
        *command,
        f'--coordinator=127.0.0.1:{port}',
        f'--num_processes={PROCESSES.value}',
        f'--process_id={index}',
      ]
    ),
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'{others} {order} {devices}',
    },
    stdout=subprocess.PIPE,
    # That of process 0 may be a terminal, with a progress bar.
    stderr=subprocess.PIPE if index else None,
    text=True,
    # A terminal's Ctrl-C reaches them through this process only.
    start_new_session=True,
  )


def _wait(children) -> int:
  """Returns the exit status of the first that fails; 0 if none does."""
  ended, status = queue.SimpleQueue(), 0

  def kill():
    for child in children:
      child.kill()

  killer = threading.Timer(GRACE, kill)
  for child in children:
    report = lambda child=child: ended.put(child.wait())
    threading.Thread(target=report, daemon=True).start()
  for _ in children:
    code = ended.get()
    if code and not status:
      # 128 + signal for one that a signal ended, as in a shell.
      status = code if code > 0 else 128 - code
      killer.start()
  killer.cancel()
  return status


def _print(index, source, sink):
  for line in source:
    # Without Gloo's message about each connection, from several threads.
    if line.strip() and 'peer ranks' not in line:
      sink.write(f'[{index}] {line}' if index else line)
      sink.flush()


def _free_port() -> int:
  """Returns a free port below the range that the system gives connections."""
  while True:
    port = random.randrange(20_000, 32_768)
    with socket.socket() as probe, contextlib.suppress(OSError):
      probe.bind(('127.0.0.1', port))
      return port


if __name__ == '__main__':
  cli.run(main, words=True, computes=False)
