"""Installs vlpjax: ``pip install -e '.[cpu]'``.

The core trains, evaluates and reports on any hardware; extras choose the accelerator (``cpu``, ``tpu``,
``cuda``) and add the programs around training (``data``, ``beam``, ``torch``, ``gguf``, ``launch``, ``plan``) and
the tools of its developers (``dev``).  ``constraints.txt`` holds the exact versions that the checks run with.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent


def version() -> str:
    """The version that ``vlpjax/__init__.py`` states, read without importing it."""
    found = re.search(r'^__version__ = "(.+)"$', (HERE / "vlpjax" / "__init__.py").read_text(), re.MULTILINE)
    assert found, 'vlpjax/__init__.py has no line __version__ = "..."'
    return found[1]


JAX = ">=0.10.2,<0.11"

CORE = [
    "absl-py>=2.1,<3",
    "array_record>=0.8,<0.9",
    "einops>=0.8,<0.9",
    "flax>=0.12,<0.13",
    "grain>=0.2.18,<0.3",
    "importlib_resources>=6,<8",  # TFDS imports it when it reads ArrayRecord, and does not declare it
    f"jax{JAX}",
    "jaxtyping>=0.3,<0.4",
    "ml_collections>=1.1,<2",
    "ml_dtypes>=0.5,<0.7",
    "msgpack>=1.1,<2",
    "numpy>=2.1,<3",
    "optax>=0.2.5,<0.3",
    "orbax-checkpoint>=0.12,<0.13",
    "pillow>=11,<14",
    "pyarrow>=18,<27",
    "rich>=13.9,<16",
    "sentencepiece>=0.2,<0.3",
    "tensorboardX>=2.6.2,<3",
    "tensorflow-datasets>=4.9.9,<5",  # the format's reader; TensorFlow itself is not needed
    "tokenizers>=0.21,<0.24",
]

BEAM = ["apache-beam>=2.77,<3"]
LAUNCH = ["submitit>=1.5,<2"]

EXTRAS = {
    # JAX's own wheels run on CPUs; the extra exists so that every machine is chosen in the same way.
    "cpu": [f"jax[cpu]{JAX}"],
    "tpu": [f"jax[tpu]{JAX}"],
    "cuda": [f"jax[cuda13]{JAX}"],
    "cuda12": [f"jax[cuda12]{JAX}"],
    # Plans runs for TPU slices that are not there: the compiler alone, for Linux on x86-64.  (What plans must not be
    # what trains on CPUs: with it, JAX looks for TPUs first unless JAX_PLATFORMS says cpu.)
    "plan": [
        "libtpu==0.0.42.*; platform_system == 'Linux' and platform_machine == 'x86_64'",
        "matplotlib>=3.10,<4",  # draws how plans scale
    ],
    # Builds data sets; training never imports it.
    "beam": BEAM,
    "data": [*BEAM, "resvg_py==0.5.0"],  # another release of the renderer would draw other bytes
    # Compares loaders and models with PyTorch's.
    "torch": ["torch>=2.6,<3", "transformers>=5,<6", "safetensors>=0.5,<1"],
    # Reads GGUF files; safetensors, .pth and ONNX files need nothing beyond the core.
    "gguf": ["gguf>=0.17,<1"],
    # Hands jobs to Slurm; the other engines have programs of their own.
    "launch": LAUNCH,
    "dev": [
        *LAUNCH,
        "hypothesis>=6.120,<7",
        "mypy>=2.0,<3",
        "onnx>=1.18,<2",  # writes the files that our reader of its format is tested with
        "pytest>=9,<10",
        "pytest-xdist>=3.8,<4",
        "ruff>=0.17,<0.18",
    ],
}

setup(
    name="vlpjax",
    version=version(),
    description="Large-scale vision-language pretraining in JAX and Flax, for TPU and GPU pods",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE", "vlpjax/data/bundled/NOTICE"],
    python_requires=">=3.11",
    packages=find_packages(include=["vlpjax", "vlpjax.*"]),
    package_data={"vlpjax": ["data/bundled/**"]},
    install_requires=CORE,
    extras_require=EXTRAS,
    classifiers=[
        "Programming Language :: Python :: 3",
        "Intended Audience :: Science/Research",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
