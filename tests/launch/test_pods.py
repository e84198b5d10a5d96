"""The launchers of pods, with stand-ins for the clusters' commands.

Nothing here reaches a cluster. The scripts are real, as is what they send to
the workers, each of which is a folder; `gcloud`, `srun` and the Python of the
workers are stand-ins (`fakes/`) that fail as they are told to.
"""

import math
import os
import pathlib
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time

from kubeflow_trainer_api.models import io_k8s_api_batch_v1_job
from kubeflow_trainer_api.models import jobset_v1alpha2_job_set
import pytest
import yaml

from mhc.config import dicts

ROOT = pathlib.Path(__file__).resolve().parents[2]
FAKES = pathlib.Path(__file__).with_name('fakes')
POD, SLURM, JOBSET, COMPARE, JOB = (
  ROOT / 'launch' / name
  for name in (
    *('tpu_pod.sh', 'slurm.sbatch', 'gke_jobset.yaml'),
    *('compare.sbatch', 'compare_job.yaml'),
  )
)
PREPARE = ROOT / 'launch' / 'prepare_job.yaml'
FLAGS = (
  '--config=configs/paper_27b.py',
  "--config.data.path=gs://b/my 'best' $HOME/**/*.txt",
  '--config.seed=',
)
# Before the user's own: of a flag that is given twice the last counts.
STARTED = ('--distributed', '--stop_status=143')
SLICE = ('--name=pod', '--zone=z-a', '--type=v5p-16', '--workdir=gs://b/run')
QUEUE = '20'  # seconds between two looks at the queue for slices
# All that the scripts may call; a real gcloud is not among it.
COMMANDS = (
  'bash cat cksum cp date dirname env flock git gzip mkdir mktemp rm sed '
  'setsid tar touch tr true wc'
)


class Cluster:
  """A clone with one commit, and the commands of a cluster around it."""

  def __init__(self, folder):
    self.folder, self.clone = folder / 'fake', folder / 'clone'
    bin_ = self.folder / 'bin'
    for home in ('0', '1', 'bin'):
      (self.folder / home).mkdir(parents=True)
    for name in COMMANDS.split():
      (bin_ / name).symlink_to(shutil.which(name))
    for name in ('sleep', 'tail'):
      (self.folder / f'real_{name}').symlink_to(shutil.which(name))
    shutil.copytree(FAKES, bin_, dirs_exist_ok=True)
    (self.clone / 'launch').mkdir(parents=True)
    for name in ('tpu_pod.sh', 'train.py', 'compare.py'):
      shutil.copy(ROOT / 'launch' / name, self.clone / 'launch' / name)
    shutil.copy(ROOT / 'constraints.txt', self.clone)
    # Slurm runs a copy in a folder of its own.
    self.spooled = pathlib.Path(shutil.copy(SLURM, folder / 'slurm_script'))
    self.compare = pathlib.Path(shutil.copy(COMPARE, folder / 'compare_script'))
    self.python = self.clone / '.venv' / 'bin' / 'python'
    self.python.parent.mkdir(parents=True)
    self.python.symlink_to(FAKES / 'train')
    self.environment = {
      'FAKE': str(self.folder),
      'HOME': str(folder),
      'PATH': str(bin_),
      'SLURM_CPUS_PER_TASK': '4',
      'SLURM_JOB_ID': '7',
      'SLURM_SUBMIT_DIR': str(self.clone),
    }
    identity = ('-c', 'user.name=t', '-c', 'user.email=t@example.com')
    for words in (['init', '-q'], ['add', '.'], ['commit', '-qm', 'one']):
      subprocess.run(
        ['git', *identity, *words],
        cwd=self.clone,
        env=self.environment,
        check=True,
      )

  def lives(self, *statuses):
    """What becomes of the run, each time that it is started."""
    self.write('lives', ''.join(f'{status}\n' for status in statuses))

  def write(self, name, text):
    (self.folder / name).write_text(text)

  def lines(self, name):
    file = self.folder / name
    return file.read_text().splitlines() if file.exists() else []

  def wait_for(self, name):
    deadline = time.monotonic() + 10
    while not self.lines(name):
      assert time.monotonic() < deadline, name
      time.sleep(0.02)

  def run(self, script, *arguments, **environment):
    return subprocess.run(
      [shutil.which('bash'), script, *arguments],
      env=self.environment | environment,
      capture_output=True,
      text=True,
      check=False,
      timeout=30,
    )

  def start(self, script, *arguments):
    # Tests may be started in the background, where Ctrl-C is ignored.
    command = shutil.which('env'), '--default-signal=INT', shutil.which('bash')
    return subprocess.Popen(
      [*command, script, *arguments],
      env=self.environment,
      stdout=subprocess.DEVNULL,
      stderr=subprocess.PIPE,
      text=True,
      start_new_session=True,
    )

  def pod(self, *arguments):
    return self.run(self.clone / 'launch' / 'tpu_pod.sh', *arguments)

  def slurm(self, *flags, **environment):
    return self.run(self.spooled, '--workdir=/s/r', *flags, **environment)


@pytest.fixture
def cluster(tmp_path):
  cluster = Cluster(tmp_path)
  yield cluster
  cluster.write('go', 'so that nothing waits after a test that failed')


def refused(result, *needles):
  assert result.returncode == 2, result.stderr
  assert result.stderr.startswith('error: ')
  assert result.stderr.count('\n') == 1
  for needle in needles:
    assert needle in result.stderr


def commands(stdout):
  """The words of every command that a dry run has printed."""
  printed = re.split(r'^\+ ', stdout, flags=re.MULTILINE)[1:]
  return [shlex.split(text, comments=True) for text in printed]


@pytest.mark.parametrize(
  'script',
  [POD, SLURM, COMPARE, *sorted(FAKES.iterdir())],
  ids=lambda path: path.name,
)
def test_shellcheck(script):
  checker = pathlib.Path(sys.executable).with_name('shellcheck')
  result = subprocess.run(
    [checker, '--norc', script], capture_output=True, text=True, check=False
  )
  assert result.returncode == 0, result.stdout
  assert len(script.read_text().splitlines()) <= 420


# --- tpu_pod.sh ---


def test_what_cannot_work_is_refused_before_a_slice_is_asked_for(cluster):
  (cluster.clone / 'launch' / 'preflight.py').touch()
  cluster.python.unlink()
  cluster.python.write_text(
    '#!/bin/sh\necho "$JAX_PLATFORMS $*" >> "$FAKE/looked"\nexit 2\n'
  )
  cluster.python.chmod(0o755)
  result = cluster.pod(*SLICE, '--', *FLAGS)
  assert result.returncode == 2
  assert not cluster.lines('calls')
  (looked,) = cluster.lines('looked')
  assert looked.startswith('cpu ')
  assert '/launch/preflight.py --topology=v5p-16 --config=configs/' in looked
  cluster.python.unlink()
  result = cluster.pod(*SLICE, '--dry-run', '--', *FLAGS)
  assert result.returncode == 0, result.stderr
  assert 'no preflight, which needs the Python that make' in result.stderr


def test_pod_dry_run_prints_all_and_runs_nothing(cluster):
  result = cluster.pod(
    *SLICE, '--spot', '--project', 'p', '--retries=3', '--dry-run', '--', *FLAGS
  )
  assert result.returncode == 0, result.stderr
  assert not cluster.lines('calls')
  printed = commands(result.stdout)
  assert [' '.join(words[3:5]) for words in printed[1:]] == [
    'tpu-vm describe',
    'queued-resources describe',
    'queued-resources create',
    'tpu-vm ssh',
    'tpu-vm scp',
    'tpu-vm ssh',
    'tpu-vm ssh',
    'tpu-vm ssh',
  ]
  for words in printed[1:]:
    assert words[:3] == ['gcloud', 'compute', 'tpus']
    assert {'--zone=z-a', '--project=p', '--quiet'} < set(words)
  assert {
    '--accelerator-type=v5p-16',
    '--runtime-version=v2-alpha-tpuv5',
    '--spot',
  } < set(printed[3])
  ssh = [words for words in printed if words[4:5] == ['ssh']]
  sent = [word for words in ssh for word in words if '--command=' in word]
  alive, setup, start, follow = (w.rsplit('}; ', 1) for w in sent)
  assert alive[1].startswith('alive ')
  assert "pip install --quiet -c constraints.txt '.[train,tpu,gcs]'" in setup[0]
  main = 'python launch/train.py --distributed --stop_status=143 "$@"'
  assert main in start[0]
  assert shlex.split(start[1])[3:] == ['--workdir=gs://b/run', *FLAGS]
  assert follow[1] == 'follow'
  assert 'up to 3 retries, after 30, 60' in result.stdout
  assert 'last checkpoint in gs://b/run' in result.stdout


def test_pod_trains_on_all_workers_and_retries(cluster):
  cluster.lives(1, 0)
  result = cluster.pod(*SLICE, '--', *FLAGS)
  assert result.returncode == 0, result.stderr
  for worker in '01':
    assert cluster.lines(f'{worker}/life') == ['2']
    assert cluster.lines(f'{worker}/arguments') == [
      'tpu,cpu',
      'launch/train.py',
      *STARTED,
      '--workdir=gs://b/run',
      *FLAGS,
    ]
  assert 'worker 0, life 1\nworker 0, life 2' in result.stdout
  assert 'worker 1' not in result.stdout
  assert cluster.lines('sleeps') == [QUEUE, '30']
  assert 'status 1: retry 1 of 20' in result.stderr
  assert cluster.lines('calls').count('queued-resources create ') == 1
  assert 'queued-resources delete pod --force' in result.stdout


@pytest.mark.parametrize(
  ('node', 'queue', 'delete'),
  [
    ('PREEMPTED', 'ACTIVE', 'queued-resources'),
    ('', 'SUSPENDED', 'queued-resources'),
    ('TERMINATED', '', 'tpu-vm'),
  ],
)
def test_pod_takes_a_new_slice_after_preemption(cluster, node, queue, delete):
  cluster.lives('preempted', 0)
  (cluster.folder / 'after').mkdir()
  cluster.write('after/node', node)
  cluster.write('after/queue', queue)
  result = cluster.pod(*SLICE, '--spot')
  assert result.returncode == 0, result.stderr
  calls = cluster.lines('calls')
  assert calls.count('queued-resources create ') == 2
  assert [call for call in calls if 'delete' in call] == [f'{delete} delete ']
  assert calls.count('tpu-vm scp all') == 2
  assert '--spot' in cluster.lines('created')


def test_pod_uses_a_slice_that_is_there(cluster):
  cluster.lives(0)
  cluster.write('node', 'READY')
  assert cluster.pod(*SLICE).returncode == 0
  assert not any('create' in call for call in cluster.lines('calls'))


def test_pod_gives_up(cluster):
  cluster.lives(1, 1, 1, 0)
  result = cluster.pod(*SLICE, '--retries=2')
  assert result.returncode == 1
  assert 'gave up after 2 retries' in result.stderr
  assert cluster.lines('0/life') == ['3']
  assert cluster.lines('sleeps') == [QUEUE, '30', '60']


def test_pod_does_not_repeat_a_mistake(cluster):
  cluster.lives(2)
  result = cluster.pod(*SLICE)
  assert result.returncode == 2
  assert cluster.lines('0/life') == ['1']
  assert cluster.lines('sleeps') == [QUEUE]


def test_pod_finds_its_run_again(cluster):
  cluster.lives('wait', 0)
  script = cluster.clone / 'launch' / 'tpu_pod.sh'
  with cluster.start(script, *SLICE, '--', *FLAGS) as watcher:
    cluster.wait_for('0/arguments')
    cluster.wait_for('1/arguments')
    while 'tpu-vm ssh 0' not in cluster.lines('calls')[-1]:
      time.sleep(0.02)  # it follows now
    os.killpg(watcher.pid, signal.SIGINT)
    assert 'the\nsame command follows it' in watcher.stderr.read()
  assert watcher.returncode == 130
  cluster.write('calls', '')
  with cluster.start(script, *SLICE, '--', *FLAGS) as watcher:
    while cluster.lines('calls').count('tpu-vm ssh 0') < 2:
      time.sleep(0.02)
    cluster.write('go', 'yes')
    assert 'finished' in watcher.stderr.read()
  assert watcher.returncode == 0
  assert cluster.lines('0/life') == ['1']
  # Other flags are another run: the one before is ended first.
  (cluster.folder / 'go').unlink()
  cluster.lives('', 'wait', 0)
  with cluster.start(script, *SLICE) as watcher:
    while cluster.lines('0/life') != ['2'] or cluster.lines('1/life') != ['2']:
      time.sleep(0.02)
    os.killpg(watcher.pid, signal.SIGINT)
  result = cluster.pod(*SLICE, '--', *FLAGS)
  assert result.returncode == 0, result.stderr
  assert cluster.lines('0/life') == ['3']
  assert cluster.lines('0/ended') == cluster.lines('1/ended') == ['yes']


def test_pod_refuses_in_one_line(cluster):
  refused(cluster.pod(), '--name')
  refused(cluster.pod(*SLICE[:3]), '--workdir')
  refused(cluster.pod(*SLICE, '--workdir=/tmp/run'), '/tmp/run', 'gs://')
  refused(cluster.pod(*SLICE, '--config=x.py'), '--config=x.py', 'after --')
  refused(cluster.pod(*SLICE, '--retries=many'), '--retries=many')
  refused(cluster.pod(*SLICE, '--type=v9-8'), '--runtime-version', 'v9-8')
  refused(cluster.pod('--name'), '--name has no value')
  (cluster.folder / 'bin' / 'gcloud').unlink()
  refused(cluster.pod(*SLICE), 'gcloud is not on PATH')
  assert cluster.pod('--help').stdout.startswith('Trains on a slice')


# --- slurm.sbatch ---


def test_slurm_dry_run_prints_what_srun_would_run(cluster):
  result = cluster.run(
    SLURM,
    '--workdir=/s/r',
    *FLAGS,
    MHC_DRY_RUN='1',
    MHC_RETRIES='3',
    SLURM_JOB_ID='',
    SLURM_SUBMIT_DIR='',
  )
  assert result.returncode == 0, result.stderr
  printed = commands(result.stdout)
  (srun,) = (words for words in printed if words[0] == 'srun')
  main = srun.index('launch/train.py')
  assert srun[main:] == [
    'launch/train.py',
    *STARTED,
    '--workdir=/s/r',
    *FLAGS,
  ]
  assert ['export', 'JAX_PLATFORMS=cuda,cpu'] in printed
  extras = '[train,cuda13,triton]'
  assert any(words[-1].endswith(f'source{extras}') for words in printed)
  assert printed[-1] == ['scontrol', 'requeue', 'JOB']
  assert 'up to 3' in result.stdout
  assert 'last checkpoint' in result.stdout
  assert not (ROOT / 'runs' / 'slurm-JOB').exists()


def test_slurm_goes_back_to_the_queue_until_it_succeeds(cluster):
  cluster.lives(1, 0)
  first = cluster.slurm(*FLAGS)
  assert first.returncode == 1, first.stderr
  assert 'retry 1 of 5' in first.stderr
  assert cluster.lines('scontrol') == ['requeue 7']
  cluster.write('scontrol', '')
  (cluster.folder / 'bin' / 'python3.12').unlink()  # set up once a job
  assert cluster.slurm(*FLAGS).returncode == 0
  assert not cluster.lines('scontrol')
  words = cluster.lines('srun')
  main = words.index('launch/train.py')
  assert words[main + 1 :] == [*STARTED, '--workdir=/s/r', *FLAGS]
  assert {'--kill-on-bad-exit=1', '--cpus-per-task=4'} < set(words)
  python = pathlib.Path(words[main - 1])
  assert python.is_file()
  assert (python.parents[2] / 'source' / 'launch' / 'train.py').is_file()


def test_slurm_gives_up(cluster):
  cluster.lives(1, 1, 1, 0)
  for life in range(3):
    cluster.write('scontrol', '')
    result = cluster.slurm(MHC_RETRIES='2')
    assert result.returncode == 1
    assert cluster.lines('scontrol') == ['requeue 7'] * (life < 2)
  assert 'gave up after 2 retries' in result.stderr


def test_slurm_does_not_repeat_a_mistake(cluster):
  cluster.lives(2)
  assert cluster.slurm().returncode == 2
  assert not cluster.lines('scontrol')


@pytest.mark.parametrize('state', ['RUNNING', 'COMPLETING'])
def test_slurm_saves_before_its_time_is_up(cluster, state):
  """And does not come back when it has been cancelled."""
  cluster.lives('wait')
  cluster.write('squeue', state)
  with cluster.start(cluster.spooled, '--workdir=/s/r') as job:
    cluster.wait_for('process')
    os.kill(job.pid, signal.SIGTERM)
    if state == 'COMPLETING':  # Slurm itself ends the processes
      os.kill(int(cluster.lines('process')[0]), signal.SIGUSR1)
    job.stderr.read()
  assert job.returncode == 143
  again = state == 'RUNNING'
  assert cluster.lines('scancel') == ['--signal=TERM 7'] * again
  assert cluster.lines('scontrol') == ['requeue 7'] * again
  assert not (cluster.clone / 'runs' / 'slurm-7' / 'failures').exists()


def test_slurm_refuses_in_one_line(cluster):
  refused(cluster.run(cluster.spooled), '--workdir')
  refused(cluster.run(cluster.spooled, '--workdir=runs/x'), 'runs/x')
  refused(cluster.slurm(SLURM_JOB_ID=''), 'sbatch')
  refused(cluster.slurm(SLURM_SUBMIT_DIR='/'), 'launch/train.py')


def test_slurm_starts_a_process_a_gpu():
  """As jax's detection wants: process SLURM_LOCALID takes that device."""
  header = dict(re.findall(r'^#SBATCH --(\S+?)=(\S+)', SLURM.read_text(), re.M))
  assert header['ntasks-per-node'] == header['gpus-per-node']
  assert header['signal'] == 'B:TERM@120'
  assert '#SBATCH --requeue\n' in SLURM.read_text()
  assert 'gpus-per-task' not in header


# --- compare.sbatch ---


def test_compare_dry_run_prints_the_command(cluster):
  result = cluster.run(
    COMPARE,
    '--workdir=/s/r',
    *FLAGS,
    MHC_DRY_RUN='1',
    SLURM_JOB_ID='',
    SLURM_SUBMIT_DIR='',
  )
  assert result.returncode == 0, result.stderr
  printed = commands(result.stdout)
  assert printed[:2] == [
    ['cd', str(ROOT)],
    ['export', 'JAX_PLATFORMS=cuda,cpu'],
  ]
  python = str(ROOT / '.venv' / 'bin' / 'python')
  words = ['launch/compare.py', STARTED[1], '--workdir=/s/r', *FLAGS]
  assert printed[2] == [python, *words]
  assert printed[3] == ['scontrol', 'requeue', 'JOB']


def test_compare_leaves_the_runs_of_a_worker_that_fails(cluster):
  cluster.lives(1, 0)
  first = cluster.run(cluster.compare, '--workdir=/s/r', *FLAGS)
  assert first.returncode == 1
  assert 'ended with status 1: the other workers go on' in first.stderr
  second = cluster.run(cluster.compare, '--workdir=/s/r', *FLAGS)
  assert second.returncode == 0, second.stderr
  assert 'finished' in second.stderr
  assert not cluster.lines('scontrol')
  words = ['launch/compare.py', STARTED[1], '--workdir=/s/r', *FLAGS]
  assert cluster.lines('../arguments') == ['cuda,cpu', *words]


@pytest.mark.parametrize('state', ['RUNNING', 'COMPLETING'])
def test_compare_saves_before_its_time_is_up(cluster, state):
  """A worker of a job that is cancelled has its own signal, and needs one."""
  cluster.lives('wait')
  cluster.write('squeue', state)
  with cluster.start(cluster.compare, '--workdir=/s/r') as job:
    cluster.wait_for('../arguments')
    time.sleep(1)  # until it handles signals
    os.kill(job.pid, signal.SIGTERM)
    if state == 'COMPLETING':
      time.sleep(0.1)
      assert not cluster.lines('../ended')
      cluster.write('go', 'yes')
    job.stderr.read()
  again = state == 'RUNNING'
  assert job.returncode == (143 if again else 0)
  assert cluster.lines('../ended') == ['yes'] * again
  assert cluster.lines('scontrol') == ['requeue 7'] * again


def test_compare_refuses_in_one_line(cluster):
  refused(cluster.run(cluster.compare), '--workdir')
  refused(cluster.run(cluster.compare, '--workdir=runs/x'), 'runs/x')
  good = cluster.compare, '--workdir=/s/r'
  refused(cluster.run(*good, SLURM_JOB_ID=''), 'sbatch')
  refused(cluster.run(*good, SLURM_SUBMIT_DIR='/'), 'launch/compare.py')
  cluster.python.unlink()
  refused(cluster.run(*good), '.venv/bin/python is missing: install')


def test_compare_starts_workers_of_one_gpu():
  header = dict(
    re.findall(r'^#SBATCH --(\S+?)=(\S+)', COMPARE.read_text(), re.M)
  )
  assert header['array'] == '0-7'
  assert header['nodes'] == header['ntasks'] == header['gpus'] == '1'
  assert header['signal'] == 'B:TERM@120'
  assert '%a' in header['output']


@pytest.mark.parametrize('file', [COMPARE, JOB], ids=lambda path: path.name)
def test_compare_is_given_flags_that_exist(file):
  text = file.read_text()
  found = re.findall(r'(?<=[ "])--(?:workdir|stop_status|config)[^\s"]*', text)
  names = {flag[2:].split('=')[0] for flag in found}
  assert {'workdir', 'stop_status', 'config'} <= names
  (config,) = {flag.split('=')[1] for flag in found if '--config=' in flag}
  path, _, argument = config.partition(':')
  get_config = runpy.run_path(ROOT / path)['get_config']
  values = get_config(argument) if argument else get_config()
  known = dicts.leaves(values.to_dict())
  settings = {n[len('config.') :] for n in names if n.startswith('config.')}
  assert settings <= known.keys()
  assert (
    "cli.define_config('compare')"
    in (ROOT / 'launch' / 'compare.py').read_text()
  )


# --- gke_jobset.yaml and compare_job.yaml ---


def test_jobset_has_only_fields_of_its_schema():
  """Models generated from JobSet's and Kubernetes' own OpenAPI files.

  They drop what they do not know, so that a wrong name is a difference.
  """
  values = yaml.safe_load(JOBSET.read_text())
  model = jobset_v1alpha2_job_set.JobsetV1alpha2JobSet
  assert model.from_dict(values).to_dict() == values
  wrong = yaml.safe_load(
    JOBSET.read_text().replace('nodeSelector:', 'selector:')
  )
  assert model.from_dict(wrong).to_dict() != wrong
  with pytest.raises(ValueError, match='int'):
    model.from_dict(
      yaml.safe_load(
        JOBSET.read_text().replace('maxRestarts: 20', 'maxRestarts: x')
      )
    )


def test_jobset_starts_the_main_on_every_host():
  values = yaml.safe_load(JOBSET.read_text())
  assert values['apiVersion'] == 'jobset.x-k8s.io/v1alpha2'
  assert values['kind'] == 'JobSet'
  policy = values['spec']['failurePolicy']
  assert policy['maxRestarts'] > 0
  assert policy['restartStrategy'] == 'BlockingRecreate'
  assert policy['rules'][0]['action'] == 'RestartJobSetAndIgnoreMaxRestarts'
  (replicated,) = values['spec']['replicatedJobs']
  job = replicated['template']['spec']
  assert job['completionMode'] == 'Indexed'
  assert job['backoffLimit'] == 0
  pod = job['template']['spec']
  assert pod['restartPolicy'] == 'Never'
  assert pod['terminationGracePeriodSeconds'] >= 120
  node = pod['nodeSelector']
  assert node['cloud.google.com/gke-tpu-accelerator'] == 'tpu-v5p-slice'
  topology = node['cloud.google.com/gke-tpu-topology']
  chips = math.prod(map(int, topology.split('x')))
  (container,) = pod['containers']
  hosts = chips // container['resources']['limits']['google.com/tpu']
  assert job['completions'] == job['parallelism'] == hosts
  assert container['command'][:4] == ['python', 'launch/train.py', *STARTED]
  assert any(
    word.startswith('--workdir=gs://') for word in container['command']
  )


@pytest.mark.parametrize('job', [JOB, PREPARE], ids=lambda path: path.name)
def test_job_has_only_fields_of_its_schema(job):
  values = yaml.safe_load(job.read_text())
  model = io_k8s_api_batch_v1_job.IoK8sApiBatchV1Job
  assert model.from_dict(values).to_dict() == values
  wrong = yaml.safe_load(job.read_text().replace('claimName:', 'claim:'))
  assert model.from_dict(wrong).to_dict() != wrong


def test_job_starts_a_worker_a_gpu():
  values = yaml.safe_load(JOB.read_text())
  assert (values['apiVersion'], values['kind']) == ('batch/v1', 'Job')
  job = values['spec']
  assert job['completionMode'] == 'Indexed'
  assert job['completions'] == job['parallelism'] == 8
  assert job['backoffLimitPerIndex'] > 0
  pod = job['template']['spec']
  # Kubernetes refuses the limit per index with OnFailure.
  assert pod['restartPolicy'] == 'Never'
  assert pod['terminationGracePeriodSeconds'] >= 120
  (container,) = pod['containers']
  assert container['resources']['limits'] == {'nvidia.com/gpu': 1}
  assert container['command'][:2] == ['python', 'launch/compare.py']
  (mount,) = container['volumeMounts']
  (volume,) = pod['volumes']
  assert mount['name'] == volume['name']
  for word in container['command']:
    if '=/' in word:
      assert word.split('=')[1].startswith(mount['mountPath'] + '/')
  rules = job['podFailurePolicy']['rules']
  assert [rule['action'] for rule in rules] == ['Ignore', 'FailIndex']
  assert rules[1]['onExitCodes']['containerName'] == container['name']


@pytest.mark.parametrize('file', [JOBSET, JOB], ids=lambda path: path.name)
def test_jobset_says_how_to_set_what_is_to_be_set(file):
  text = file.read_text()
  for name, value in re.findall(r"'s#(\w+)#([^']*)#'", text):
    text = re.sub(rf"(?<!'s#){name}", value, text)
  assert 'REPLACE' not in yaml.safe_dump(yaml.safe_load(text))
  assert 'kubectl apply --dry-run=client' in text
