"""Kernels of notebooks in processes forked when all imports, seconds, are made.

    with Kernels(environment, folder) as kernels:
      kernels.spec(name)  # a folder of Jupyter's, whose kernel is forked

This file as a script forks; what Jupyter starts is a process that asks for a
kernel, passes on its signals and ends with it.
"""

import atexit
import gc
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import tempfile

HERE = pathlib.Path(__file__).resolve()
STARTED = """
import json, os, signal, socket, sys
kernel = socket.socket(socket.AF_UNIX)
kernel.connect(sys.argv[1])
environment = {k: v for k, v in os.environ.items() if k != 'JPY_PARENT_PID'}
kernel.sendall(json.dumps([sys.argv[2], os.getcwd(), environment]).encode())
kernel.shutdown(socket.SHUT_WR)
pid = int(kernel.recv(100))
for number in (signal.SIGINT, signal.SIGTERM):
  signal.signal(number, lambda number, _: os.kill(pid, number))
kernel.recv(1)
"""


class Kernels:
  """A process that has imported everything, and forks kernels."""

  def __init__(self, environment, folder: pathlib.Path):
    self._address = folder / 'kernels'
    self._forker = subprocess.Popen(
      [sys.executable, __file__, self._address],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env=environment,
    )
    spec = folder / 'jupyter' / 'kernels' / 'forked'
    spec.mkdir(parents=True)
    argv = [sys.executable, '-IS', '-c', STARTED, str(self._address)]
    (spec / 'kernel.json').write_text(
      json.dumps(
        {
          'argv': [*argv, '{connection_file}'],
          'display_name': 'forked',
          'language': 'python',
        }
      )
    )
    self.path = str(folder / 'jupyter')

  def __enter__(self):
    assert self._forker.stdout.readline()  # it listens
    return self

  def __exit__(self, *_):
    with self._forker:
      self._forker.stdin.close()
      self._forker.terminate()


def wait_for_a_request(address: str) -> str:
  """Forks for each request; returns its connection file in the fork."""
  server = socket.socket(socket.AF_UNIX)
  server.bind(address)
  server.listen()
  signal.signal(signal.SIGTERM, lambda *_: sys.exit())
  print('listens', flush=True)
  children = []

  def reap():
    for child in children:
      os.waitpid(child, 0)

  atexit.register(reap)
  while True:
    client, _ = server.accept()
    with client.makefile('r') as request:
      file, cwd, environment = json.load(request)
    child = os.fork()
    if not child:
      signal.signal(signal.SIGTERM, signal.SIG_DFL)
      atexit.unregister(reap)
      server.close()
      os.environ.clear()
      os.environ.update(environment)
      os.chdir(cwd)
      client.sendall(str(os.getpid()).encode())
      client.detach()  # open until the kernel ends
      return file
    client.close()
    children.append(child)


if __name__ == '__main__':
  from ipykernel import kernelapp

  sys.path.insert(0, str(HERE.parents[1]))
  import forked_mains

  # As a kernel sets it, but before Matplotlib is imported.
  os.environ['MPLBACKEND'] = 'module://matplotlib_inline.backend_inline'
  forked_mains.make_imports(HERE.parents[2] / 'notebooks' / 'src')
  file = wait_for_a_request(sys.argv[1])
  tempfile.tempdir = None  # the environment's, which is another
  gc.set_threshold(50_000, 20, 100)
  sys.argv = ['kernel', '-f', file]
  kernelapp.launch_new_instance()
