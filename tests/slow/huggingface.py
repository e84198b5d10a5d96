"""The reference of Hugging Face's models does what transformers does.

    python tests/slow/huggingface.py --env=/tmp/huggingface

Makes an environment with torch and the newest transformers (6 GB, for torch
comes with the CUDA libraries, which its CPU part does not start without) and,
in it, for random folders of all four models,

* transformers loads the folder: no tensor may be missing, unknown or of another
  shape, and what it saves must be the same tensors, bit for bit;
* its logits of 512 tokens, in float32 on the CPU, must be those of
  tests/huggingface_reference.py within 1e-4, with every argmax.

Our own models with mHC and identity are written as well, and their logits must
be those of the models here, by the modeling_mhc.py that their folders have;
identity's connections must be those of transformers' Hy4 but for its eps.

Prints a line a folder, with three logits, which are pinned here for
tests/interop/test_huggingface_reference.py; ends with status 1 if one differs.

    python tests/slow/huggingface.py --folder=exported --folder=another

does so for folders that exist, as of an export. Needs the network, PyPI alone.
"""

import argparse
import os
import pathlib
import subprocess
import sys
import tempfile
import types
from typing import Any, NamedTuple

if __name__ == '__main__':
  sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import huggingface_reference as reference
import numpy as np

PACKAGES = ('torch', 'transformers', 'safetensors', 'numpy')
LENGTH, TOLERANCE = 512, 1e-4
LOGITS = 'expected_logits.npy'
HY4 = 'hy4.npz'
PINNED = 63  # the token whose last three logits are pinned
LLAMA, QWEN2, QWEN3, DEEPSEEK = reference.MODEL_TYPES
LINEAR = {'rope_type': 'linear', 'factor': 4.0}
LLAMA3 = {
  'rope_type': 'llama3',
  'factor': 4.0,
  'low_freq_factor': 1.0,
  'high_freq_factor': 4.0,
  'original_max_position_embeddings': 128,
}
YARN = {'factor': 4.0, 'original_max_position_embeddings': 128}
NEW_YARN = {'rope_type': 'yarn', **YARN}
# As DeepSeek's own folders have it.
OLD_YARN = {'type': 'yarn', 'beta_fast': 32, 'beta_slow': 1, **YARN}


class Case(NamedTuple):
  """A random folder, and three logits that transformers gives it."""

  architecture: str
  changes: dict[str, Any]
  version: int = 4
  pinned: tuple[float, ...] = ()


CASES = {
  'llama': Case(LLAMA, {}, pinned=(1.465633, -0.236848, -1.154950)),
  'llama, tied': Case(
    LLAMA,
    dict(tie_word_embeddings=True, head_dim=16, rms_norm_eps=1e-3),
    pinned=(0.599771, -0.773739, -0.336780),
  ),
  'llama, linear': Case(
    LLAMA, dict(rope_scaling=LINEAR), pinned=(0.470788, -0.720949, -1.215376)
  ),
  'llama, llama3': Case(
    LLAMA,
    dict(rope_scaling=LLAMA3, rope_theta=5e5),
    5,
    pinned=(0.257880, -0.723642, -1.859622),
  ),
  'llama, biases': Case(
    LLAMA,
    dict(attention_bias=True, mlp_bias=True),
    pinned=(0.200012, 2.169305, -0.222230),
  ),
  'qwen2': Case(QWEN2, {}, pinned=(0.728197, 0.771588, 0.404504)),
  'qwen2, yarn': Case(
    QWEN2,
    dict(rope_scaling=NEW_YARN, tie_word_embeddings=True),
    5,
    pinned=(-0.056113, 0.952882, -0.673169),
  ),
  'qwen3': Case(
    QWEN3,
    dict(head_dim=16, rope_theta=1e6),
    5,
    pinned=(0.332535, -0.235791, 0.806028),
  ),
  'qwen3, yarn': Case(
    QWEN3,
    dict(
      rope_scaling=NEW_YARN | {'attention_factor': 1.5, 'truncate': False},
      rms_norm_eps=1e-3,
    ),
    pinned=(0.290569, 0.566353, 0.658126),
  ),
  'deepseek': Case(DEEPSEEK, {}, pinned=(0.227608, 1.119887, 0.467778)),
  'deepseek, q_lora': Case(
    DEEPSEEK,
    dict(q_lora_rank=12, rms_norm_eps=1e-2),
    5,
    pinned=(0.364386, -1.133513, 0.018473),
  ),
  'deepseek, yarn': Case(
    DEEPSEEK,
    dict(
      q_lora_rank=12,
      rope_scaling=OLD_YARN | {'mscale': 1.0, 'mscale_all_dim': 1.0},
    ),
    pinned=(0.141998, -1.634500, -0.063865),
  ),
  'deepseek, other mscale': Case(
    DEEPSEEK,
    dict(
      rope_scaling=OLD_YARN | {'mscale': 0.7, 'mscale_all_dim': 1.3},
      rope_interleave=False,
    ),
    5,
    pinned=(1.731067, 0.825998, 0.864411),
  ),
  'deepseek, no groups': Case(
    DEEPSEEK,
    dict(n_group=1, topk_group=1, num_experts_per_tok=3, n_shared_experts=2),
    pinned=(0.332923, 1.509233, 1.163270),
  ),
  'deepseek, not normed': Case(
    DEEPSEEK,
    dict(norm_topk_prob=False, tie_word_embeddings=True, attention_bias=True),
    pinned=(0.602434, 1.243128, 0.478924),
  ),
}


def main():
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--env', help='Keep the environment there, or use it.')
  parser.add_argument(
    '--folder', action='append', default=[], help='Compare this one instead.'
  )
  parser.add_argument(
    '--ours', action='append', default=[], help=argparse.SUPPRESS
  )
  parser.add_argument('--inside', action='store_true', help=argparse.SUPPRESS)
  flags = parser.parse_args()
  folders = [pathlib.Path(folder).resolve() for folder in flags.folder]
  if flags.inside:
    ours = [pathlib.Path(folder) for folder in flags.ours]
    sys.exit(not compare_all(folders, ours))
  with tempfile.TemporaryDirectory() as temporary:
    python = environment(pathlib.Path(flags.env or temporary).resolve())
    command = [python, __file__, '--inside']
    command += [f'--folder={folder}' for folder in folders]
    if not folders:
      from slow import huggingface_ours

      ours = huggingface_ours.write(pathlib.Path(temporary) / 'ours')
      command += [f'--ours={folder}' for folder in ours]
    offline = {'HF_HUB_OFFLINE': '1', 'TOKENIZERS_PARALLELISM': 'false'}
    sys.exit(
      subprocess.run(command, env=os.environ | offline, check=False).returncode
    )


def environment(folder: pathlib.Path) -> pathlib.Path:
  """The Python of an environment with PACKAGES, which is made if need be."""
  python, done = folder / 'bin' / 'python', folder / 'installed'
  if not done.exists():
    subprocess.run([sys.executable, '-m', 'venv', folder], check=True)
    quiet = ('--quiet', '--disable-pip-version-check')
    subprocess.run(
      [python, '-m', 'pip', 'install', *quiet, *PACKAGES], check=True
    )
    done.touch()
  return python


def compare_all(folders: list[pathlib.Path], ours: list[pathlib.Path]) -> bool:
  """Compares folders, or else all cases; whether all agree."""
  import torch
  import transformers

  torch.set_num_threads(1)
  transformers.utils.logging.disable_progress_bar()
  print(f'torch {torch.__version__}, transformers {transformers.__version__}')
  if folders:
    return all([compare(str(folder), folder) for folder in folders])
  good = [compare(folder.name, folder) for folder in ours]
  good.append(compare_hy4(ours[0].parent / HY4))
  for name, case in CASES.items():
    with tempfile.TemporaryDirectory() as folder:
      write(case, folder)
      good.append(compare(name, pathlib.Path(folder), case.pinned))
  return all(good)


def write(case: Case, folder):
  """Writes the folder of a case."""
  reference.random_folder(
    folder, case.architecture, version=case.version, **case.changes
  )


def tokens(vocab_size: int) -> np.ndarray:
  """The tokens that are compared."""
  return np.random.default_rng(0).integers(vocab_size, size=(1, LENGTH))


def compare(name: str, folder: pathlib.Path, pinned=()) -> bool:
  """Compares one folder's logits, in a line; whether they agree."""
  model, problems = loaded(folder)
  given = tokens(model.config.vocab_size)
  theirs, ours = logits(model, given), expected(folder, given)
  three = theirs[0, PINNED, -3:]
  worst = np.max(np.abs(theirs - ours))
  same = np.mean(np.argmax(theirs, -1) == np.argmax(ours, -1))
  if not worst <= TOLERANCE:
    problems.append('the logits differ')
  if same < 1:
    problems.append('the argmax differs')
  if pinned and not np.allclose(three, pinned, 0, TOLERANCE):
    problems.append(f'three were {pinned}')
  numbers = ', '.join(f'{number:.6f}' for number in three)
  print(
    f'{name}: difference {worst:.1e} of deviation {np.std(ours):.2f}, argmax '
    f'{same:.1%}, three {numbers}',
    *(f'FAILED: {problem}' for problem in problems),
    flush=True,
  )
  return not problems


def compare_hy4(file: pathlib.Path) -> bool:
  """Compares identity connections with those of Hy4, of which eps is 1e-6."""
  import torch
  from transformers.models.hy_v4 import modeling_hy_v4 as theirs

  found = {name: torch.tensor(a) for name, a in np.load(file).items()}
  _, streams, dim = found['x'].shape
  config = types.SimpleNamespace(
    hc_mult=streams,
    hidden_size=dim,
    hc_eps=0.0,
    hc_magnitude=2.0,
    rms_norm_eps=float(found['eps']),
  )
  layer = theirs.HYV4HyperConnection(config)
  head = theirs.HYV4HyperHead(config)
  for module, prefix in (
    (layer, 'model.layers.0.attn_hc.'),
    (head, 'model.hc_head.'),
  ):
    names = {name.removeprefix(prefix): name for name in found}
    module.load_state_dict({n: found[names[n]] for n in module.state_dict()})
  with torch.no_grad():
    post, h = layer(found['x'][None])
    closed = head(found['x'][None])
  worst = max(
    float((a[0] - found[name]).abs().max())
    for a, name in ((post, 'post'), (h, 'h'), (closed, 'head'))
  )
  print(f'connections of Hy4: difference {worst:.1e}')
  return worst < 1e-5


def expected(folder: pathlib.Path, given: np.ndarray) -> np.ndarray:
  """The logits that came with a folder, or those of the reference."""
  file = folder / LOGITS
  return np.load(file) if file.exists() else reference.logits(folder, given)


def loaded(folder: pathlib.Path):
  """The model of a folder by transformers, and what is wrong with it."""
  import torch
  import transformers

  model, found = transformers.AutoModelForCausalLM.from_pretrained(
    folder,
    dtype=torch.float32,
    trust_remote_code=(folder / 'modeling_mhc.py').exists(),
    attn_implementation='eager',
    output_loading_info=True,
  )
  problems = [f'{kind}: {names}' for kind, names in found.items() if names]
  with tempfile.TemporaryDirectory() as saved:
    model.save_pretrained(saved)
    ours, theirs = tensors(folder), tensors(pathlib.Path(saved))
  if sorted(ours) != sorted(theirs):
    differ = sorted({*ours} ^ {*theirs})
    problems.append(f'saved by transformers or by us alone: {differ}')
  elif not all(np.array_equal(ours[key], theirs[key]) for key in ours):
    problems.append('saved tensors differ')
  return model.eval(), problems


def tensors(folder: pathlib.Path) -> dict[str, np.ndarray]:
  """All tensors of a folder."""
  found = {}
  for file in folder.glob('*.safetensors'):
    found |= reference.read_tensors(file)
  return found


def logits(model, given: np.ndarray) -> np.ndarray:
  """The logits of a model of transformers."""
  import torch

  with torch.no_grad():
    found = model(torch.from_numpy(given), use_cache=False).logits
  return found.numpy().astype(np.float64)


if __name__ == '__main__':
  main()
