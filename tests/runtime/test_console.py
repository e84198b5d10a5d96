"""What cannot be said is not said, and costs nothing."""

import subprocess
import sys

import plain_python
import pytest

# A process that says a lot in every way, and then ends well.
SPEAKS = """
import sys
from mhc.runtime import console
console.never_fail()
with console.progress_bar(3, 0, 'label') as bar:
  for number in range(3):
    print('x' * 100_000)
    console.print_line('y' * 100_000)
    sys.stderr.write('z\\n')
    bar.update()
open(sys.argv[1], 'w').write('done')
"""


@pytest.mark.parametrize(
  'where',
  ['| head -c 10', '2>&1 | true', '>/dev/full 2>&1', '>&- 2>&-', '2>&-'],
)
def test_streams_that_fail(where, tmp_path):
  code, done = tmp_path / 'speaks.py', tmp_path / 'done'
  code.write_text(plain_python.FRONT + SPEAKS)
  result = subprocess.run(
    [
      *('bash', '-o', 'pipefail', '-c'),
      f'{sys.executable} {code} {done} {where}',
    ],
    capture_output=True,
    text=True,
    check=False,
  )
  assert result.returncode == 0, result.stderr
  assert done.read_text() == 'done'
  assert 'Traceback' not in result.stderr
