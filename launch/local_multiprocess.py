r"""Many processes on this machine's CPUs, as if each were a host of a cluster.

    python launch/local_multiprocess.py --processes=2 --devices=4 -- \
      launch/train.py --workdir=runs/many --config.mesh.pipe=2 \
      --config.data.microbatch_size=1

What follows `--` is started that many times, each with that many devices and
told of the others by --coordinator, --num_processes and --process_id. Lines of
all but process 0 begin with their number. SIGINT and SIGTERM go to all, and a
second one kills them. If one fails, the others, which could only wait for it,
are killed; its exit status is that of this program.
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

from absl import flags

from mhc.runtime import cli

PROCESSES = flags.DEFINE_integer('processes', 2, 'How many.', lower_bound=1)
DEVICES = flags.DEFINE_integer('devices', 1, 'Of each.', lower_bound=1)
GRACE = 3  # seconds from a failure in which the others can say what they know


def main(*command):
  if not command:
    raise ValueError('nothing to start: -- launch/train.py --workdir=...')
  children, signals = [], []

  def forward(number, _):
    signals.append(number)
    for child in children:
      child.send_signal(number if len(signals) == 1 else signal.SIGKILL)

  for number in (signal.SIGINT, signal.SIGTERM):
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
  # Two processes pair what they send in the order in which it comes: without
  # this XLA sends what is ready first, which is not the same in all of them.
  order = '--xla_cpu_enable_concurrency_optimized_scheduler=false'
  others = re.sub(
    r'--xla_force_host_platform_device_count=\S+',
    '',
    os.environ.get('XLA_FLAGS', ''),
  )
  return subprocess.Popen(
    [
      sys.executable,
      *command,
      f'--coordinator=127.0.0.1:{port}',
      f'--num_processes={PROCESSES.value}',
      f'--process_id={index}',
    ],
    env={
      **os.environ,
      'JAX_PLATFORMS': 'cpu',
      'XLA_FLAGS': f'{others} {order} {devices}',
    },
    stdout=subprocess.PIPE,
    # Of process 0 it may be a terminal, with a progress bar.
    stderr=subprocess.PIPE if index else None,
    text=True,
    # Of a terminal's Ctrl-C they hear from here alone.
    start_new_session=True,
  )


def _wait(children) -> int:
  """The exit status of the first that fails; 0 if none does."""
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
      # Of one that a signal ended, as a shell says it.
      status = code if code > 0 else 128 - code
      killer.start()
  killer.cancel()
  return status


def _print(index, source, sink):
  for line in source:
    # Not what Gloo says whenever it connects, in several threads at once.
    if line.strip() and 'peer ranks' not in line:
      sink.write(f'[{index}] {line}' if index else line)
      sink.flush()


def _free_port() -> int:
  """Below those that the system gives to connections, which may take it."""
  while True:
    port = random.randrange(20_000, 32_768)
    with socket.socket() as probe, contextlib.suppress(OSError):
      probe.bind(('127.0.0.1', port))
      return port


if __name__ == '__main__':
  cli.run(main, words=True)
