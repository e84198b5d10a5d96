"""A preparation that is killed ends like one that was not; memory is bounded.

    python tests/slow/prepare.py --kills=10 --documents=10000000

Text of this machine (the Python files of site-packages) is tokenised by words,
by one process and by two, and once more with SIGKILLs at random times, after
each of which the same command goes on: the folders are the same, bit for bit.
Then a file of many tiny documents is prepared, and the largest memory of all
processes together is given. About 15 minutes on two idle cores.
"""

import argparse
import itertools
import json
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGE_KIB = 4


def prepare(path, out, *flags):
  return subprocess.Popen(
    [
      *(sys.executable, str(ROOT / 'launch' / 'prepare_data.py')),
      *(f'--path={path}', f'--out={out}', *flags),
    ],
    stderr=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    text=True,
  )


def finish(process):
  error = process.communicate()[1]
  assert process.returncode == 0, error[-2000:]


def content(folder):
  """Everything but the name of the source's own folder."""
  return {
    file.relative_to(folder): file.read_bytes()
    for file in folder.rglob('*')
    if file.is_file()
  }


def texts(folder, least_bytes):
  """JSON lines of the Python files of the environment, in files of 4 MB.

  As often as it takes, each time with another first line.
  """
  sources = sorted(pathlib.Path(json.__file__).parents[1].rglob('*.py'))
  number = size = part = 0
  lines = []
  for time_, file in ((n, f) for n in itertools.count() for f in sources):
    try:
      text = f'# {time_}\n{file.read_text()}'
    except (OSError, UnicodeDecodeError):
      continue
    lines.append(json.dumps({'text': text}))
    part += len(text)
    if part > 4_000_000:
      (folder / f'{number:03d}.jsonl').write_text('\n'.join(lines))
      number, size, part, lines = number + 1, size + part, 0, []
    if size >= least_bytes:
      return size


def resident_kib(process):
  """KiB of a process and of those below it."""
  total, waiting = 0, [process.pid]
  while waiting:
    pid = waiting.pop()
    try:
      proc = pathlib.Path(f'/proc/{pid}')
      total += int((proc / 'statm').read_text().split()[1]) * PAGE_KIB
      for task in (proc / 'task').iterdir():
        waiting += map(int, (task / 'children').read_text().split())
    except OSError:
      continue
  return total


def killed(path, out, flags, number, longest):
  """Prepares again and again, with so many SIGKILLs; returns when they came."""
  chance, times = random.Random(0), []
  while True:
    process, start = prepare(path, out, *flags), time.perf_counter()
    if len(times) < number:
      try:
        process.wait(chance.uniform(0.5, longest))
      except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        times.append(time.perf_counter() - start)
        continue
    finish(process)
    if len(times) == number:
      return times
    shutil.rmtree(out)  # it came to its end before: from the start


def main():
  parser = argparse.ArgumentParser()
  parser.add_argument('--kills', type=int, default=10)
  parser.add_argument('--documents', type=int, default=10**7)
  parser.add_argument('--bytes', type=int, default=60_000_000)
  arguments = parser.parse_args()
  with tempfile.TemporaryDirectory() as name:
    root = pathlib.Path(name)
    folder = root / 'texts'
    folder.mkdir()
    size = texts(folder, arguments.bytes)
    finish(prepare(folder, root / 'words', '--tokenizer=train:8192'))
    words = f'--tokenizer={root / "words" / "tokenizer.json"}'
    seconds = {}
    for workers in (1, 2):
      start = time.perf_counter()
      finish(
        prepare(folder, root / f'{workers}', words, f'--workers={workers}')
      )
      seconds[workers] = time.perf_counter() - start
      print(
        f'{workers} workers: {size / 1e6:.0f} MB in {seconds[workers]:.1f} s, '
        f'{size / 1e6 / seconds[workers]:.2f} MB/s',
        flush=True,
      )
    print(f'two are {seconds[1] / seconds[2]:.2f} times as fast as one')
    want = content(root / '1')
    assert content(root / '2') == want
    times = killed(
      folder, root / 'killed', (words,), arguments.kills, 0.6 * seconds[2]
    )
    assert content(root / 'killed') == want
    print(
      f'killed after {", ".join(f"{t:.1f}" for t in times)} s: the same to the '
      'last bit',
      flush=True,
    )
    file = root / 'tiny.jsonl'
    with file.open('w') as lines:
      for number in range(arguments.documents):
        lines.write(f'{{"text": "n {number}"}}\n')
    process, most = prepare(file, root / 'tiny', '--tokenizer=bytes'), 0
    start = time.perf_counter()
    while process.poll() is None:
      most = max(most, resident_kib(process))
      time.sleep(0.2)
    finish(process)
    index = json.loads((root / 'tiny' / 'index.json').read_text())
    assert index['num_documents'] == arguments.documents
    print(
      f'{arguments.documents:,} tiny documents in '
      f'{time.perf_counter() - start:.0f} s, all processes together at most '
      f'{most / 2**20:.2f} GiB'
    )
    assert most / 2**20 < 2


if __name__ == '__main__':
  main()
