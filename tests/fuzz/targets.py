"""The readers that are fuzzed: small sound files for each, and the call that reads the files."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from PIL import Image, features
from pydantic import BaseModel
from safetensors.torch import save_file

from crossmae.checkpoints.conversion.inspection import inspect
from crossmae.checkpoints.formats.model_card import model_card
from crossmae.checkpoints.formats.training_record import read_run
from crossmae.checkpoints.metadata import (
    CLASSES,
    DIGEST,
    FORMAT,
    PICKLED_METADATA,
    PIXEL_MEAN,
    PIXEL_STD,
    TRAINING,
    digest,
)
from crossmae.checkpoints.pretrained import load_pretrained
from crossmae.checkpoints.run_checkpoint import read_state
from crossmae.checkpoints.weights import read_weights, save_weights
from crossmae.classification.classifier import load_classifier
from crossmae.classification.probe.config import ProbeRunConfig
from crossmae.classification.report import build_report
from crossmae.classification.train.config import FinetuneConfig
from crossmae.classification.vit import architecture_of
from crossmae.data.images import ImageLimits, decode_image
from crossmae.data.sources import open_source
from crossmae.experiments.rows import append_row, read_rows
from crossmae.files import read_json_lines, sha256
from crossmae.models.crossmae import create_model
from crossmae.pretraining.config import PretrainConfig
from crossmae.reports.run_folder import read_log
from crossmae.training.config import load_typed_config
from crossmae.training.log import truncate_log
from crossmae.training.resume import find_start, is_complete
from tests.crossmae.classification.classifiers import write_classifier
from tests.crossmae.data.sources.source_files import encoded, tar_bytes
from tests.crossmae.experiments.sample_rows import sample_rows

LIMITS = ImageLimits(200_000, "data.max_pixels")


@dataclass(frozen=True)
class Target:
    """A reader: `make` writes sound files, and `read` gets the folder and the changed file, or words with `keys`."""

    make: Callable[[Path], object]
    read: Callable[[Path, list[str]], object]
    keys: Sequence[str] = ()
    kept: tuple[str, ...] = ()  # suffixes of files that stay as they are
    anywhere: bool = False  # a list may name files in other folders


def _keys_of(schema: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in schema.model_fields.items():
        yield f"{prefix}{name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys_of(field.annotation, f"{prefix}{name}.")


# Images.
def _picture(mode: str, size: tuple[int, int] = (13, 11)) -> Image.Image:
    rng = np.random.default_rng(0)
    values = rng.integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    if mode == "I;16":
        return Image.fromarray(rng.integers(0, 65536, (size[1], size[0]), dtype=np.uint16))
    if mode == "F":
        return Image.fromarray(rng.random((size[1], size[0]), dtype=np.float32))
    return (
        Image.fromarray(values, "RGBA").convert(mode) if mode != "P" else Image.fromarray(values[..., :3]).quantize(9)
    )


KINDS = [("PNG", mode) for mode in ("RGB", "L", "P", "RGBA", "1", "I;16", "LA")]
KINDS += [
    ("JPEG", "RGB"),
    ("JPEG", "L"),
    ("JPEG", "CMYK"),
    ("BMP", "RGB"),
    ("BMP", "P"),
    ("DIB", "RGB"),
    ("PPM", "RGB"),
]
KINDS += [("GIF", "P"), ("PCX", "P"), ("TGA", "RGBA"), ("TIFF", "RGB"), ("TIFF", "I;16"), ("TIFF", "F"), ("MPO", "RGB")]
KINDS += [("WEBP", "RGB")] * features.check("webp") + [("JPEG2000", "RGB")] * features.check("jpg_2000")
KINDS += [("AVIF", "RGB")] * features.check("avif")


def _write_images(folder: Path) -> None:
    for kind, mode in KINDS:
        options: dict[str, Any] = {"exif": Image.Exif()} if kind in ("JPEG", "PNG") else {}
        if options:
            options["exif"][274] = 6
        if kind == "TIFF" and mode == "RGB":
            options["compression"] = "tiff_lzw"
        buffer = io.BytesIO()
        _picture(mode).save(buffer, kind, **options)
        (folder / f"{kind}-{mode.replace(';', '')}.img").write_bytes(buffer.getvalue())


def _read_image(folder: Path, changed: list[str]) -> None:
    path = folder / changed[0]
    for channels, depth in ((3, 8), (1, 16), *[(4, 8)] * ("RGBA" in path.name)):
        decode_image(path.read_bytes(), str(path), channels, depth, LIMITS)


# Lists and shards.
def _write_pictures(folder: Path) -> list[str]:
    names = [f"{label}/{index}.png" for index, label in enumerate("aabb")]
    for index, name in enumerate(names):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(encoded(index))
    return names


def _list_target(suffix: str) -> Target:
    def make(folder: Path) -> None:
        names = _write_pictures(folder)
        rows = [f"{name} {name[0]}" if suffix == ".txt" else f"{name},{name[0]}" for name in names]
        text = "\n".join(["path,label", *rows] if suffix != ".txt" else rows) + "\n"
        (folder / f"list{suffix}").write_text(text.replace(",", "\t") if suffix == ".tsv" else text)
        if suffix == ".parquet":
            import pyarrow
            from pyarrow import parquet

            table = pyarrow.table({"path": names, "label": [name[0] for name in names]})
            parquet.write_table(table, folder / "list.parquet")
        if suffix == ".json":
            images = [{"id": index, "file_name": name} for index, name in enumerate(names)]
            (folder / "list.json").write_text(json.dumps({"images": images, "annotations": [], "categories": []}))

    return Target(make, lambda folder, _: _read_source(folder / f"list{suffix}"), (), (".png",), suffix != ".json")


def _read_source(path: Path | str) -> None:
    source = open_source(path, "data.train", limits=LIMITS)
    for index in range(min(len(source), 5)):
        source.name(index)
        decode_image(source.read(index), source.name(index), limits=LIMITS)
    source.labels() if source.classes else None


def _write_shards(folder: Path, index: bool = True) -> None:
    members = {}
    for number in range(3):
        members |= {f"{number}.png": encoded(number), f"{number}.cls": b"1", f"{number}.json": b'{"label": "x"}'}
    content = tar_bytes(members)
    (folder / "s.tar").write_bytes(content)
    if index:
        starts = [content.index(encoded(number)) for number in range(3)]
        lists = {"names": [f"{n}.png" for n in range(3)], "offsets": starts, "labels": [0, None, 0]}
        entry = {"file": "s.tar", "bytes": len(content), "sha256": "", "sizes": [len(encoded(n)) for n in range(3)]}
        about = {"format": "crossmae-shards-1", "settings": {}, "classes": ["x"], "shards": [entry | lists]}
        (folder / "index.json").write_text(json.dumps(about))


# Settings.
CONFIGS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "pretrain": (PretrainConfig, {"model": {"name": "crossmae_vit_tiny_patch16"}}),
    "finetune": (FinetuneConfig, {"model": {"name": "vit_tiny_patch16"}}),
    "probe": (ProbeRunConfig, {"weights": None, "model": {"name": "crossmae_vit_tiny_patch16"}}),
}


def _config_target(name: str, words: bool) -> Target:
    schema, values = CONFIGS[name]

    def make(folder: Path) -> None:
        content = {"output_dir": "OUT", "data": {"train": "images", "val": "images"}, **values}
        content |= {"runtime": {"seed": 3, "device": "cpu"}}
        (folder / "c.yaml").write_text(yaml.safe_dump(content))

    def read(folder: Path, given: list[str]) -> None:
        load_typed_config(schema, str(folder / "c.yaml"), given if words else ())

    return Target(make, read, tuple(_keys_of(schema)) if words else ())


# Weights.
SMALL = {"embed_dim": 24, "depth": 2, "num_heads": 2, "decoder_embed_dim": 8, "decoder_depth": 1}
SMALL |= {"decoder_num_heads": 1, "img_size": 32, "patch_size": 8}


def _tensors() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return dict(create_model("crossmae_vit_tiny_patch16", **SMALL).state_dict())


def _write_ours(folder: Path) -> None:
    metadata = {FORMAT: "crossmae", "model": json.dumps(SMALL), PIXEL_MEAN: "[0.5, 0.5, 0.5]", CLASSES: '["a"]'}
    save_weights(folder / "w.safetensors", _tensors(), metadata)


def _write_unsigned(folder: Path) -> None:
    """A file without a digest, whose header can be changed."""
    metadata = {FORMAT: "crossmae", "model": json.dumps(SMALL), PIXEL_MEAN: "[0.5, 0.5, 0.5]", PIXEL_STD: "[1, 1, 1]"}
    metadata |= {"norm_eps": "1e-06", "assumed": "[]", CLASSES: '["a"]', "bit_depth": "8"}
    save_file(_tensors(), folder / "w.safetensors", metadata)


def _write_pth(folder: Path, legacy: bool = False) -> None:
    content = {"model": _tensors(), "epoch": 3, "args": {"model": "mae_vit_base_patch16", "norm_pix_loss": True}}
    torch.save(content, folder / "w.pth", _use_new_zipfile_serialization=not legacy)


def _write_pkl(folder: Path) -> None:
    tensors = {f"backbone.net.{name}": tensor for name, tensor in _tensors().items() if "decoder" not in name}
    about = {PICKLED_METADATA: {DIGEST: digest(tensors, {})}} if len(tensors) < 3 else {}
    content = {"model": {name: tensor.numpy() for name, tensor in tensors.items()}, **about}
    (folder / "w.pkl").write_bytes(pickle.dumps(content, 4))


def _write_hf(folder: Path) -> None:
    from crossmae.checkpoints.conversion.convert import convert

    _write_ours(folder)
    convert(folder / "w.safetensors", folder / "hf", "hf-vitmae", force=True)
    (folder / "w.safetensors").unlink()


def _read_path(name: str, whole: bool = True, **given: Any) -> Callable[[Path, list[str]], None]:
    """Inspect and read weights, and build a model of them: a whole one, or the encoder."""

    def read(folder: Path, _: list[str]) -> None:
        path = folder / name
        inspect(path)
        weights = read_weights(path)
        assert all(tensor.isfinite().all() for tensor in weights.tensors.values() if tensor.is_floating_point())
        if whole:
            load_pretrained(path, given)
        else:
            architecture_of(weights, **given)

    return read


def _write_header(folder: Path) -> None:
    """The header of a safetensors file as JSON, so that it can be changed as a tree."""
    _write_unsigned(folder)
    data = (folder / "w.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    (folder / "model.json").write_text(header["__metadata__"].pop("model"))
    (folder / "header.json").write_text(json.dumps(header))
    (folder / "body.bin").write_bytes(data[8 + length :])
    (folder / "w.safetensors").unlink()


def _read_header(folder: Path, _: list[str]) -> None:
    header = (folder / "header.json").read_bytes()
    with suppress(ValueError, TypeError, KeyError):  # with the recorded arguments, unless the header is no header
        content = json.loads(header)
        content["__metadata__"]["model"] = (folder / "model.json").read_text(errors="replace")
        header = json.dumps(content).encode()
    body = (folder / "body.bin").read_bytes()
    (folder / "w.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + body)
    try:
        _read_path("w.safetensors")(folder, [])
    finally:
        (folder / "w.safetensors").unlink()


# Run folders, reports and rows.
def _write_evaluation(folder: Path) -> None:
    classes = [{"name": name, "samples": 2, "recall": 0.5, "precision": None, "f1": 0.5} for name in "ab"]
    confused = [{"true": "a", "predicted": "b", "count": 1, "share": 0.5}]
    numbers = {"top1": 0.5, "loss": 1.0, "balanced_accuracy": 0.5, "ece": None}
    about = {
        "weights": "model_best.safetensors",
        "data": "/v",
        "versions": {"torch": "9.8.7"},
        "epoch": 1.0,
        "step": 10,
    }
    found = {"samples": 4, "numbers": numbers, "top1_interval": [0.1, 0.9], "classes": classes, "about": about}
    (folder / "evaluation/hardest").mkdir(parents=True)
    (folder / "evaluation/evaluation.json").write_text(json.dumps(found | {"most_confused": confused}))
    hard = {"name": "x.png", "picture": "1.png", "true": [["a", 0.1]], "predicted": [["b", 0.9]]}
    _picture("RGB").save(folder / "evaluation/hardest/1.png")
    (folder / "evaluation/hardest/hardest.json").write_text(json.dumps({"wrong": 1, "images": [hard]}))


def _write_run(folder: Path) -> None:
    _write_evaluation(folder)
    config = {"output_dir": str(folder), "data": {"train": "/t", "val": "/v"}, "model": {"name": "vit_tiny_patch16"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config | {"schedule": {"epochs": 2}}))
    rows = [{"step": 5, "epoch": 0.5, "loss": 3.0, "lr": 0.1, "images_per_second": 50.0}]
    rows += [{"step": 10, "epoch": 1.0, "top1": 0.5, "val_loss": 0.5}]
    (folder / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "broken.jsonl").write_text(json.dumps({"name": "a.png", "reason": "cut off"}) + "\n")
    data = {"train": {"name": "t", "images": 4}}
    training = {"data": data, "recipe": {"optim.lr": 0.1}, "figures": {"top1": 0.5}, "step": 10}
    (folder / "training.json").write_text(json.dumps(training))
    checkpoint = folder / "checkpoints/step-00000010"
    checkpoint.mkdir(parents=True)
    record = {"plan": {"images": 4, "images_per_step": 2}, "versions": {"timm": "1"}, "fingerprint": {"images": "4"}}
    (checkpoint / "run.json").write_text(json.dumps(record))
    torch.save({"step": 10, "rng": torch.get_rng_state()}, checkpoint / "state.pt")
    save_file({"a": torch.zeros(3)}, checkpoint / "model.safetensors")
    names = ("model.safetensors", "state.pt", "run.json")
    files = {name: {"bytes": (checkpoint / name).stat().st_size, "sha256": sha256(checkpoint / name)} for name in names}
    (checkpoint / "manifest.json").write_text(json.dumps({"step": 10, "files": files}))


def _continue_run(folder: Path, _: list[str]) -> None:
    start = find_start(folder, resume=True, kind="pretraining")
    is_complete(start, 100, {"images": "4"})
    if start:
        read_state(start)
    truncate_log(folder / "log.jsonl", 5)
    read_log(folder / "log.jsonl", "epoch")
    read_json_lines(folder / "broken.jsonl", name=str)


def _describe_run(folder: Path, _: list[str]) -> None:
    """Write the record of a run into a file's metadata, and a model card from it."""
    record = read_run(folder, 10).metadata()
    model_card("a", "finetuned", {}, record)
    record[TRAINING] = (folder / "training.json").read_text(errors="replace")
    model_card("a", "finetuned", {}, record)


def _read_state(folder: Path, _: list[str]) -> None:
    """Without the manifest's digest, which finds every change."""
    read_state(folder / "checkpoints/step-00000010")


def _write_rows(folder: Path) -> None:
    for row in sample_rows(arms=("own",), shares={10: 40}, seeds=(0,)):
        append_row(folder / "rows.jsonl", row)


READ_PTH = _read_path("w.pth", num_heads=2, decoder_num_heads=1)
TARGETS: dict[str, Target] = {
    "images": Target(_write_images, _read_image),
    **{f"list {suffix}": _list_target(suffix) for suffix in (".txt", ".csv", ".tsv", ".parquet", ".json")},
    "shards": Target(lambda folder: _write_shards(folder, index=False), lambda folder, _: _read_source(folder)),
    "index of shards": Target(_write_shards, lambda folder, _: _read_source(folder), kept=(".tar",)),
    **{f"{name} file": _config_target(name, False) for name in CONFIGS},
    **{f"{name} words": _config_target(name, True) for name in CONFIGS},
    "ours safetensors": Target(_write_ours, _read_path("w.safetensors")),
    "plain safetensors": Target(_write_unsigned, _read_path("w.safetensors")),
    "header of safetensors": Target(_write_header, _read_header, kept=(".bin",)),
    "pth": Target(_write_pth, _read_path("w.pth", num_heads=2, decoder_num_heads=1)),
    "legacy pth": Target(
        lambda folder: _write_pth(folder, legacy=True), _read_path("w.pth", num_heads=2, decoder_num_heads=1)
    ),
    "pkl": Target(_write_pkl, _read_path("w.pkl", whole=False, num_heads=2)),
    "transformers folder": Target(_write_hf, _read_path("hf", whole=False), kept=(".safetensors",)),
    "classifier": Target(
        lambda folder: write_classifier(folder, ["a", "b"]), lambda folder, _: load_classifier(folder)
    ),
    "run folder": Target(_write_run, _continue_run, kept=(".png",)),
    "record of a run": Target(_write_run, _describe_run, kept=(".png", ".safetensors")),
    "state of a run": Target(_write_run, _read_state, kept=(".png", ".json", ".jsonl", ".yaml", ".safetensors")),
    "report of a classifier": Target(_write_run, lambda folder, _: build_report(folder), kept=(".png", ".safetensors")),
    "rows of results": Target(_write_rows, lambda folder, _: read_rows(folder / "rows.jsonl")),
}
