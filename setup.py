"""Packaging; `constraints.txt` pins the versions that were tested."""

import pathlib

import setuptools

setuptools.setup(
  name='diffusion_distillation',
  version='0.1.0',
  description='Diffusion models that need one to eight network calls, by distillation, in JAX.',
  long_description=pathlib.Path(__file__).with_name('README.md').read_text(),
  long_description_content_type='text/markdown',
  license='Apache-2.0',
  packages=[
    *setuptools.find_packages(include=['diffusion_distillation*']),
    'diffusion_distillation.configs',
  ],
  package_dir={'diffusion_distillation.configs': 'configs'},
  entry_points={'console_scripts': ['diffusion-distillation = diffusion_distillation.__main__:main']},
  package_data={'diffusion_distillation.evaluation': ['*.html']},
  python_requires='>=3.11',
  install_requires=[
    'absl-py>=2.1',
    'array_record>=0.8',
    'clu>=0.0.12',
    'flatbuffers>=24.3',  # an undeclared requirement of jax.export
    'flax>=0.12',
    'fsspec>=2024.6',
    'importlib_resources>=6',  # an undeclared requirement of tensorflow-datasets
    'jax>=0.10',
    'jinja2>=3.1',
    'matplotlib>=3.9',
    'ml_collections>=1.1',
    'numpy>=2.0',
    'optax>=0.2.8',
    'orbax-checkpoint>=0.12',
    'pillow>=11.3',
    'safetensors>=0.5',
    'scikit-learn>=1.5',
    'tensorboardX>=2.6.2',
    'tensorflow-datasets>=4.9.10',
    'threadpoolctl>=3.5',
    'tqdm>=4.66',
  ],
  extras_require={
    'cuda': ['jax[cuda13]'],
    'tpu': ['jax[tpu]'],
    'tf': ['tensorflow-cpu>=2.20'],  # to download and prepare datasets; reading them does not need it
    'gcs': ['gcsfs'],  # folders at gs://
    's3': ['s3fs'],  # folders at s3://
    'serve': ['gradio>=6.0'],  # for --mode=serve
    'text': ['tokenizers>=0.21'],  # for --prompts
    'dev': [
      'gradio>=6.0',
      'ipykernel>=6.29',  # for notebooks/
      'mypy>=1.15',
      'nbclient>=0.10',
      'pytest>=8.3',
      'pytest-cov>=6.0',
      'pytest-timeout>=2.3',
      'pytest-xdist>=3.6',
      'ruff>=0.9',
      'scipy>=1.14',
      'tokenizers>=0.21',
    ],
  },
)
