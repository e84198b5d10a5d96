"""Mains in processes that are forked when all imports, seconds, are made.

    with Mains(environment) as mains:
      result = mains.run(path_of_the_main, arguments, cwd=None)

The process that forks is this file as a script: it imports what the mains
import, and takes one request a line.
"""

import ast
import gc
import json
import os
import pathlib
import runpy
import subprocess
import sys
import tempfile

LAUNCH = pathlib.Path(__file__).resolve().parents[1] / 'launch'


class Mains:
  """A process that has imported everything, and waits for a main to run."""

  def __init__(self, environment):
    self._forker = subprocess.Popen(
      [sys.executable, __file__],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      env=environment,
      text=True,
    )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    with self._forker:
      self._forker.stdin.close()

  def run(
    self, command, cwd=None, environment=None
  ) -> subprocess.CompletedProcess:
    """As `subprocess.run([sys.executable, *command])` with captured text.

    `environment` adds variables that are read after the imports.
    """
    command = list(map(str, command))
    with tempfile.TemporaryDirectory() as folder:
      files = [pathlib.Path(folder, name) for name in ('out', 'error')]
      cwd = str(cwd or pathlib.Path.cwd())
      request = [command, *map(str, files), cwd, environment or {}]
      print(json.dumps(request), file=self._forker.stdin, flush=True)
      status = int(self._forker.stdout.readline())
      texts = [file.read_text() for file in files]
    return subprocess.CompletedProcess(command, status, *texts)


def make_imports(folder: pathlib.Path):
  """Imports what the scripts of a folder import, not inside of anything."""
  for path in sorted(folder.glob('[!_]*.py')):
    for node in ast.parse(path.read_text()).body:
      if isinstance(node, ast.Import | ast.ImportFrom):
        exec(compile(ast.Module([node], []), path, 'exec'), {})
  gc.freeze()  # at its end no process looks through what it has not made


def wait_for_a_request() -> list[str]:
  """Forks for each request; returns its command in the forked process."""
  for line in sys.stdin:
    command, *files, cwd, environment = json.loads(line)
    child = os.fork()
    if not child:
      os.environ.update(environment)
      for number, file in enumerate([os.devnull, *files]):
        flags = os.O_WRONLY | os.O_CREAT if number else os.O_RDONLY
        os.dup2(os.open(file, flags), number)
      os.chdir(cwd)
      return command
    _, status = os.waitpid(child, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)
  sys.exit()


if __name__ == '__main__':
  make_imports(LAUNCH)
  gc.set_threshold(50_000, 20, 100)
  sys.argv = wait_for_a_request()
  sys.path[0] = str(LAUNCH)
  runpy.run_path(sys.argv[0], run_name='__main__')
