"""Installs `adaptra_plugin`; `patches/` and `launch/` become its subpackages."""

from setuptools import find_packages, setup

HERE_PACKAGES = find_packages(include=["adaptra_plugin", "adaptra_plugin.*"])
# enough for the tests of the pure packages (make test-fast); without numba they take minutes
TEST = ["pytest==9.2.0", "pytest-timeout==2.4.0", "hypothesis==6.170.15", "numba==0.68.1"]

setup(
    name="adaptra-plugin",
    version="0.1.0",
    description="Slack-adaptive pipeline schedules and delegated p2p for DeepSpeed and Megatron-core",
    python_requires=">=3.10",
    packages=[*HERE_PACKAGES, "adaptra_plugin.patches", "adaptra_plugin.launch"],
    package_dir={
        "adaptra_plugin": "adaptra_plugin",
        "adaptra_plugin.patches": "patches",
        "adaptra_plugin.launch": "launch",
    },
    install_requires=[
        "torch>=2.4",
        "pydantic>=2.5",  # the typed configuration
        "numpy>=1.24",  # samples, windows, the simulator's tables
        "packaging>=23",  # version ranges of the hosts
        "xxhash>=3.2",  # checksums of chunks at memory speed, without holding the interpreter lock
        "psutil>=5.9",  # addresses of network interfaces
        "rich>=13",  # tables and progress of the command line and the demo
    ],
    extras_require={
        "deepspeed": ["deepspeed>=0.16,<0.20"],
        "megatron": ["megatron-core>=0.14,<0.20"],
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
        "test": TEST,
        # the hosts and tools that the tests run against, pinned
        "dev": [
            "torch==2.13.0",
            "deepspeed==0.19.8",
            "megatron-core==0.16.1",
            "wandb==0.31.0",
            "matplotlib==3.11.2",
            "ortools==9.15.6755",
            "ninja==1.13.2",
            "psutil==7.2.2",
            *TEST,
            "ruff==0.17.6",
            "mypy==2.4.1",
        ],
    },
    entry_points={
        # torch calls this at the end of `import torch`: it registers a post-import hook and nothing else
        "torch.backends": ["adaptra = adaptra_plugin._autoload:register"],
        "console_scripts": ["adaptra = adaptra_plugin.cli:main"],
    },
)
