"""prepare.sbatch and prepare_job.yaml: which machine does which share."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
SCRIPT, JOB = (
  ROOT / 'launch' / name for name in ('prepare.sbatch', 'prepare_job.yaml')
)
FLAGS = ("--path=/s/my 'best' $HOME/**/*.txt", '--out=/s/out', '--stage=tokens')
ARRAY = {
  'SLURM_JOB_ID': '7',
  'SLURM_ARRAY_TASK_ID': '3',
  'SLURM_ARRAY_TASK_MIN': '0',
  'SLURM_ARRAY_TASK_COUNT': '8',
  'SLURM_CPUS_PER_TASK': '4',
}


def run(*arguments, **environment):
  return subprocess.run(
    [shutil.which('bash'), SCRIPT, *arguments],
    env={'PATH': os.environ['PATH'], **environment},
    capture_output=True,
    text=True,
    check=False,
    timeout=30,
  )


def fake_python(folder, text):
  file = folder / 'python'
  file.write_text(f'#!/usr/bin/env bash\n{text}\n')
  file.chmod(0o755)
  return str(file)


def test_shellcheck():
  checker = pathlib.Path(sys.executable).with_name('shellcheck')
  result = subprocess.run(
    [checker, '--norc', SCRIPT], capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stdout


def test_a_dry_run_prints_the_command():
  result = run(*FLAGS, MHC_DRY_RUN='1')
  assert result.returncode == 0, result.stderr
  printed = [shlex.split(line[2:]) for line in result.stdout.splitlines()]
  python = str(ROOT / '.venv' / 'bin' / 'python')
  assert printed == [
    ['cd', str(ROOT)],
    [python, 'launch/prepare_data.py', *FLAGS, '--shard=0/1', '--workers=0'],
  ]


def test_a_task_does_its_share(tmp_path):
  python = fake_python(tmp_path, 'printf "%s\\n" "$@"; exit 3')
  result = run(*FLAGS, **ARRAY, PYTHON=python)
  assert result.returncode == 3
  words = ['launch/prepare_data.py', *FLAGS, '--shard=3/8', '--workers=4']
  assert result.stdout.splitlines() == words


@pytest.mark.parametrize(
  ('arguments', 'changes', 'message'),
  [
    (FLAGS, {'SLURM_ARRAY_TASK_ID': ''}, 'not an array'),
    (FLAGS, {'SLURM_ARRAY_TASK_MIN': '1'}, 'must be 0-N'),
    (FLAGS, {'SLURM_ARRAY_TASK_COUNT': '3'}, 'task 3 of 3'),
    (['--out=here'], {}, '--out=here must be absolute'),
    (FLAGS, {'PYTHON': '/nowhere'}, '/nowhere is missing'),
  ],
)
def test_what_cannot_be_shared_is_refused(arguments, changes, message):
  result = run(*arguments, **{**ARRAY, 'PYTHON': sys.executable, **changes})
  assert result.returncode == 2
  assert message in result.stderr


def test_at_its_time_limit_a_task_is_queued_again(tmp_path):
  bin_ = tmp_path / 'bin'
  bin_.mkdir()
  for name, text in (
    ('squeue', 'echo RUNNING'),
    ('scontrol', f'echo "$@" > {tmp_path}/requeued'),
  ):
    pathlib.Path(fake_python(tmp_path, text)).rename(bin_ / name)
  python = fake_python(tmp_path, f'touch {tmp_path}/started; sleep 3')
  process = subprocess.Popen(
    [shutil.which('bash'), SCRIPT, *FLAGS],
    env={**ARRAY, 'PYTHON': python, 'PATH': f'{bin_}:{os.environ["PATH"]}'},
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  deadline = time.monotonic() + 10
  while not (tmp_path / 'started').exists():
    assert time.monotonic() < deadline
    time.sleep(0.02)
  process.send_signal(signal.SIGTERM)
  process.wait(timeout=20)
  assert (tmp_path / 'requeued').read_text().split() == ['requeue', '7']


def test_each_pod_does_its_share():
  job = yaml.safe_load(JOB.read_text())['spec']
  assert job['completionMode'] == 'Indexed'
  (container,) = job['template']['spec']['containers']
  environment = {one['name']: one for one in container['env']}
  number = int(environment['NUM_SHARDS']['value'])
  assert job['completions'] == job['parallelism'] == number
  path = environment['SHARD']['valueFrom']['fieldRef']['fieldPath']
  assert path.endswith("['batch.kubernetes.io/job-completion-index']")
  assert '--shard=$(SHARD)/$(NUM_SHARDS)' in container['command']
  (mount,) = container['volumeMounts']
  for word in container['command']:
    if '=/' in word:
      assert word.split('=')[1].startswith(mount['mountPath'] + '/')


def test_the_job_says_how_to_set_what_is_to_be_set():
  text = JOB.read_text()
  for name, value in re.findall(r"[\"']s#(\w+)#([^\"']*)#[\"']", text):
    text = re.sub(rf'(?<!s#){name}', value.replace('$stage', 'tokens'), text)
  assert 'REPLACE' not in yaml.safe_dump(yaml.safe_load(text))
