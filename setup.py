"""Installs `adaptra_plugin`. Its packages `patches` and `launch` are links to the folders beside it."""

import sys
from pathlib import Path

from setuptools import find_packages, setup

sys.path.insert(0, str(Path(__file__).parent))

from adaptra_plugin.patches.hosts import HOSTS

setup(
    name="adaptra-plugin",
    version="0.1.0",
    description="Slack-adaptive pipeline schedules and delegated p2p for DeepSpeed and Megatron-core",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Developers",
        "Intended Audience :: Science/Research",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: System :: Distributed Computing",
        "Typing :: Typed",
    ],
    python_requires=">=3.10",
    packages=find_packages(include=["adaptra_plugin", "adaptra_plugin.*"]),
    package_data={"adaptra_plugin": ["py.typed"]},
    install_requires=[
        "torch>=2.4",
        "pydantic>=2.5",  # the typed configuration
        "numpy>=1.24",  # samples, windows, the simulator's tables
        "packaging>=23",  # version ranges of the hosts
        "xxhash>=3.2",  # checksums of segments at memory speed, without holding the interpreter lock
        "psutil>=5.9",  # addresses of network interfaces
        "pyyaml>=6",  # configurations of jobs, for `adaptra check`
        "rich>=13",  # tables and progress of the command line and the demo
    ],
    extras_require={
        **{host.name: [f"{host.distribution}{host.versions}"] for host in HOSTS.values()},
        "rdma": [
            "pyverbs"
        ],  # must match rdma-core; better from the system (Debian: python3-pyverbs), where it is found too
        "wandb": [
            "wandb>=0.27",
            "requests>=2.28",
        ],  # the end of an upload can be limited, and leaves everything on the disk
        "plots": ["matplotlib>=3.7"],
        "exact": ["ortools>=9.10"],  # CP-SAT, the exact planner
        "fast": ["numba>=0.60"],  # compiled simulator
        "docs": ["mkdocs>=1.6,<2"],  # `make docs`
        # the hosts and tools that the tests run against, pinned
        "dev": [
            "torch==2.13.0",
            "deepspeed==0.19.8",
            "megatron-core==0.16.1",
            "wandb==0.31.0",
            "matplotlib==3.11.2",
            "ortools==9.15.6755",
            "numba==0.68.1",
            "ninja==1.13.2",
            "mkdocs==1.6.1",
            "psutil==7.2.2",
            "pyyaml==6.0.4",  # configurations of GPT-NeoX, which tests/compat reads
            "pytest==9.2.0",
            "pytest-timeout==2.4.0",
            "hypothesis==6.170.15",
            "ruff==0.17.6",
            "mypy==2.4.1",
            "import-linter==2.17",  # layers and circles of imports, see pyproject.toml
        ],
    },
    entry_points={
        # torch calls this at the end of `import torch`: it registers a post-import hook and nothing else
        "torch.backends": ["adaptra = adaptra_plugin._autoload:register"],
        "console_scripts": ["adaptra = adaptra_plugin.cli:main"],
    },
)
