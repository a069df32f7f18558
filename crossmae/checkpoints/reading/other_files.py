"""Names for files and folders without readable weights: what they are, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

from crossmae.errors import counted
from crossmae.files import load_json

_MAX_LISTED = 10_000
_WEB_PAGE = (b"<!doctype", b"<html", b"<head", b"<?xml", b"<error")
_UNPACK = "Unpack it and name the weight file in it."
_PYTORCH = "Use the PyTorch or safetensors file of the same model."
_WEIGHTS = "Name a weight file (.safetensors, .pth, .pt, .pkl) or the folder of a run."
_DCP = (
    "a distributed checkpoint of torch (DCP), one part for each process. If you trust its author, join the parts: "
    "`python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} weights.pth`, and name weights.pth."
)
_ADAPTER = "an adapter of peft (LoRA) without its model. Merge both with peft (merge_and_unload), and save the model."
_TENSORFLOW = f"a TensorFlow model. {_PYTORCH}"
# Names that tell the kind of a file or folder.
_NAMES = {
    r".*\.distcp": _DCP,
    r"latest|last_checkpoint": "the name of a checkpoint, not weights. Name the folder {folder}.",
    r".*\.(index|data-\d+-of-\d+)|saved_model\.pb|.*\.(pb|tflite|meta)|checkpoint": _TENSORFLOW,
    r"adapter_(config\.json|model\..*)": _ADAPTER,
    r"events\.out\.tfevents.*": f"a log of TensorBoard, not weights. {_WEIGHTS}",
    r".*\.(crdownload|part|partial|incomplete|aria2|tmp)": "a download that is not complete. Download it again.",
    r".*\.(engine|plan|trt|mlmodel|mlpackage|rknn|ncnn)": f"a model compiled for one device. {_PYTORCH}",
    r".*\.(ya?ml)": f"a YAML file, such as the config of a run, not weights. {_WEIGHTS}",
    r".*\.(csv|tsv|log|txt|md|py|ipynb|html?)": f"a file of text, not weights. {_WEIGHTS}",
}
# Kinds of files by their first bytes.
_HEADS = (
    (re.compile(rb"\x1f\x8b|BZh|\xfd7zXZ\0|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!"), f"a compressed file. {_UNPACK}"),
    (re.compile(rb".{257}ustar", re.DOTALL), f"a tar archive. {_UNPACK}"),
    (re.compile(rb"\x89HDF\r\n"), f"an HDF5 file, as TensorFlow and Keras write. {_PYTORCH}"),
    (re.compile(rb"[\x81-\x8f\xde\xdf].{0,4}[\xa1-\xbf\xd9]", re.DOTALL), f"msgpack, as Flax (JAX) writes. {_PYTORCH}"),
    (re.compile(rb"\x08.\x12.{0,40}", re.DOTALL), f"an ONNX model, whose weights have lost their names. {_PYTORCH}"),
    (re.compile(rb"GGUF|GGML|lmgg|ggjt"), f"a GGUF file of quantized weights. {_PYTORCH}"),
    (re.compile(rb".{4}TFL3", re.DOTALL), _TENSORFLOW),
    (re.compile(rb"\x93NUMPY"), "one NumPy array (.npy) without a name. Save a state dict."),
    (re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|BM.{4}\0\0|RIFF.{4}WEBP|[IM]{2}[*\0]{2}", re.DOTALL), "an image"),
    (re.compile(rb".{4}ftyp|RIFF.{4}AVI|\x1aE\xdf\xa3", re.DOTALL), "a video or an image"),
    (re.compile(rb"%PDF"), "a PDF"),
)
_IMAGES = {".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp", ".gif"}


def failed_download(head: bytes) -> str:
    """Describe the remains of a failed download, or return ""."""
    if not head:
        return "the file is empty (0 bytes). Copy or download it again."
    if head.lstrip().lower().startswith(_WEB_PAGE):
        return "a web page, not weights. Check the address and the log-in of the download."
    if head.startswith(b"version https://git-lfs"):
        return "a git-lfs pointer, not the file itself. Run `git lfs pull` where it comes from."
    return ""


def other_file(path: Path, head: bytes) -> str:
    """Describe a file by its name or first bytes, or return ""."""
    named = next((what for pattern, what in _NAMES.items() if re.fullmatch(pattern, path.name)), "")
    if named:
        return named.replace("{folder}", str(path.absolute().parent))
    binary = next((what for pattern, what in _HEADS if pattern.match(head)), "")
    return binary if "." in binary or not binary else f"{binary}, not weights. {_WEIGHTS}"


def other_text(path: Path, text: str) -> str:
    """Describe JSON that is no index of weights, "" if damaged."""
    try:
        content = load_json(text)
    except ValueError:
        first = text.lstrip().partition("\n")[0]
        return f"a log of JSON lines, not weights. {_WEIGHTS}" if "\n" in text.strip() and _is_json(first) else ""
    keys = content.keys() if isinstance(content, dict) else set()
    what = "a COCO file of annotations" if {"images", "annotations"} <= keys else ""
    what = what or ("the config of a model" if {"model_type", "architecture", "architectures"} & keys else "")
    return f"{what + ', ' if what else ''}JSON, but not an index of weights (no weight_map). {_WEIGHTS}"


def other_folder(folder: Path) -> str:
    """Describe a folder of another kind, or return ""."""
    names = {entry.name for entry in islice(folder.iterdir(), _MAX_LISTED)}
    if ".metadata" in names or any(name.endswith(".distcp") for name in names):
        return _DCP.format(folder=folder)
    if "saved_model.pb" in names or any(re.fullmatch(r".*\.data-\d+-of-\d+", name) for name in names):
        return _TENSORFLOW
    if any(name.startswith("adapter_") for name in names):
        return _ADAPTER
    files = list(_files(folder))
    images = sum(file.suffix.lower() in _IMAGES for file in files)
    tars = sum(file.suffix == ".tar" for file in files)
    if 2 * (images + tars) > len(files):
        what = counted(images, "image") if images >= tars else counted(tars, "tar file")
        return f"a folder of data ({what}), not weights. {_WEIGHTS}"
    return ""


def weight_files(folder: Path, suffixes: tuple[str, ...]) -> list[str]:
    """List the files with one of the suffixes, also in subfolders."""
    return sorted(str(file.relative_to(folder)) for file in _files(folder) if file.suffix in suffixes)


def _files(folder: Path) -> Iterator[Path]:
    # The folder may have a million images.
    return (path for path in islice(chain(folder.glob("*"), folder.glob("*/*")), _MAX_LISTED) if not path.is_dir())


def _is_json(text: str) -> bool:
    try:
        return isinstance(load_json(text), dict)
    except ValueError:
        return False
