"""archlab: every modern language-model architecture, written once and compared fairly."""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="archlab",
    version="0.1.0",
    description="Every modern language-model architecture, written once in JAX/Flax and compared fairly",
    long_description=(Path(__file__).parent / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The archlab authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords="jax flax transformer mamba mixture-of-experts recurrent scaling-laws",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Intended Audience :: Science/Research",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    python_requires=">=3.11",
    packages=find_packages(include=["archlab", "archlab.*", "experiments", "launch"]),
    # Lower bounds are what the code uses, upper bounds the next release that may break it.
    install_requires=[
        "jax>=0.10,<0.13",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "chex>=0.1.92,<0.2",
        "grain>=0.2.18,<0.3",
        "tensorflow-datasets>=4.9.10,<5",
        "importlib_resources>=6,<8",  # tensorflow-datasets needs it to download, and does not say so
        "absl-py>=2.1,<3",
        "jaxtyping>=0.3,<0.4",
        "numpy>=1.26,<3",
        "scipy>=1.13,<2",
        "rich>=13,<17",
        "matplotlib>=3.9,<4",
        "safetensors>=0.5,<1",
        "tokenizers>=0.21,<1",
        "tensorboardX>=2.6,<3",
    ],
    extras_require={
        "gpu": ["jax[cuda13]>=0.10,<0.13"],
        "tpu": ["jax[tpu]>=0.10,<0.13"],
        "kernels": ["tokamax>=0.0.12,<0.1"],  # grouped products of experts, for GPUs and TPUs
        "interop": ["torch>=2.6,<3", "transformers>=5,<6"],  # the peers we measure against; never imported by archlab
        "wandb": ["wandb>=0.19,<1"],
        # pytest 9.2 ignores the groups of pytest-xdist 3.8, which our tests rely on.
        "test": ["pytest>=8,<9", "pytest-xdist>=3.6,<4"],
    },
)
