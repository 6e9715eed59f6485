"""Installs critkl_jax; settings of the tools are in pyproject.toml."""

import pathlib

import setuptools

HERE = pathlib.Path(__file__).parent
TENSORBOARD = ['tensorboardX>=2.6.4']
TEXT = ['tokenizers>=0.21.0']
TASKS = [*TEXT, 'reasoning-gym>=0.1.19', 'rouge-score>=0.1.2']

setuptools.setup(
    name='critkl-jax',
    version='0.1.0',
    description='Certainty-weighted KL penalties for reinforcement learning of language models, in JAX.',
    long_description=(HERE / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    python_requires='>=3.11',
    # The binaries are a folder of the checkout and, where the package is installed, a package inside of it.
    packages=[*setuptools.find_packages(include=['critkl_jax', 'critkl_jax.*']), 'critkl_jax.experiments'],
    package_dir={'critkl_jax.experiments': 'experiments'},
    entry_points={'console_scripts': ['critkl = critkl_jax.experiments.__main__:main']},
    package_data={'critkl_jax': ['py.typed', 'checkpoints/**/*', 'analysis/page.*']},
    install_requires=[  # not before the versions in tests/oldest.txt, which were tried together
        'absl-py>=2.3.1',
        'chex>=0.1.91',
        'etils[epath]>=1.14.0',
        'flax>=0.12.6',
        'jax>=0.10.0',
        'matplotlib>=3.9.4',
        'numpy>=2.0.2',
        'optax>=0.2.6',
        'orbax-checkpoint>=0.11.28',
        'scipy>=1.14.1',
        'tqdm>=4.66.6',
    ],
    extras_require={
        'cuda12': ['jax[cuda12]'],
        'tpu': ['jax[tpu]'],
        'h100': ['jax[cuda13-local]', 'nvidia-cuda-nvcc>=13', 'nvidia-nvvm>=13'],  # its compiler alone, to run nothing
        'text': TEXT,
        'chat': [*TEXT, 'jinja2', 'transformers'],
        'tasks': TASKS,
        'tensorboard': TENSORBOARD,
        'wandb': ['wandb>=0.31'],
        'bench': ['torch', 'tokamax', 'transformers', 'trl', 'datasets', 'tokenizers'],
        'test': ['hypothesis>=6.100.0', 'pytest>=8.0.2', 'pytest-xdist>=3.5.0', 'ruff>=0.9', 'setuptools>=77',
                 *TENSORBOARD, *TASKS],
    },
)
