"""Proves that files and folders without weights are called what they are, whatever a tool was given."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from crossmae.checkpoints.reading.files import find_file
from crossmae.checkpoints.weights import read_weights
from crossmae.errors import UserError
from tests.crossmae.checkpoints.reading.test_candidates import encoder

PNG = b"\x89PNG\r\n\x1a\n" + bytes(20)
FILES: dict[str, tuple[bytes, str]] = {
    "config.yaml": (b"model: {depth: 2}", "a YAML file, such as the config of a run, not weights"),
    "log.txt": (b"step 1", "a file of text, not weights"),
    "metrics.json": (b'{"loss": 1}\n{"loss": 2}\n', "a log of JSON lines, not weights"),
    "coco.json": (json.dumps({"images": [], "annotations": []}).encode(), "a COCO file of annotations, JSON"),
    "config.json": (b'{"model_type": "vit"}', "the config of a model, JSON"),
    "photo.pth": (PNG, "an image, not weights"),
    "photo.jpg": (b"\xff\xd8\xff\xe0" + bytes(20), "an image, not weights"),
    "clip.mp4": (bytes(4) + b"ftypisom" + bytes(20), "a video or an image, not weights"),
    "last_checkpoint": (b"model_final.pth", r"the name of a checkpoint, not weights\. Name the folder "),
    "events.out.tfevents.1.host": (b"\x18" + bytes(30), "a log of TensorBoard, not weights"),
    "model.ckpt.index": (b"\x00\x00\x08abc" + bytes(20), r"a TensorFlow model\. Use the PyTorch"),
    "model.ckpt.data-00000-of-00001": (b"abcdefghijkl", r"a TensorFlow model\. "),
    "saved_model.pb": (b"\x08\x01\x12\x02ab", r"a TensorFlow model\. "),
    "model.tflite": (b"\x1c\x00\x00\x00TFL3" + bytes(9), r"a TensorFlow model\. "),
    "vit.engine": (b"ftrt" + bytes(20), "a model compiled for one device"),
    "vit.pth.part": (b"abcdefghijkl", r"a download that is not complete\. Download it again"),
    "__1_0.distcp": (b"PK\x03\x04" + bytes(20), r"a distributed checkpoint of torch \(DCP\)"),
    "adapter_model.bin": (b"abcdefghijkl", r"an adapter of peft \(LoRA\) without its model"),
}


@pytest.mark.parametrize("name", FILES)
def test_files(tmp_path: Path, name: str) -> None:
    content, told = FILES[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"{name}: {told}.*\.$") as caught:
        read_weights(tmp_path / name)
    assert "\n" not in str(caught.value)


def folder_of(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).touch()
    return path


FOLDERS: dict[str, tuple[tuple[str, ...], str]] = {
    "images": (("a/1.jpg", "a/2.PNG", "b/3.tif"), r"a folder of data \(3 images\), not weights"),
    "shards": (("x-0.tar", "x-1.tar"), r"a folder of data \(2 tar files\), not weights"),
    "DCP": ((".metadata", "__0_0.distcp"), r"a distributed checkpoint of torch \(DCP\).*dcp_to_torch \S+ weights\.pth"),
    "TensorFlow": (("saved_model.pb", "variables/variables.index"), r"a TensorFlow model\. "),
    "TensorFlow 1": (("m.index", "m.data-00000-of-00001"), r"a TensorFlow model\. "),
    "peft": (("adapter_config.json", "adapter_model.safetensors"), r"an adapter of peft \(LoRA\) without its model"),
    "ZeRO": (
        tuple(f"global_step5/zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(2)),
        r"a DeepSpeed checkpoint in several parts\. Run `python zero_to_fp32\.py",
    ),
}


@pytest.mark.parametrize("kind", FOLDERS)
def test_folders(tmp_path: Path, kind: str) -> None:
    names, told = FOLDERS[kind]
    folder = folder_of(tmp_path / "given", *names)
    if kind == "ZeRO":
        (folder / "latest").write_text("global_step5")
    with pytest.raises(UserError, match=rf"given: {told}") as caught:
        find_file(folder)
    assert "\n" not in str(caught.value)


def test_the_model_of_deepspeed_is_found_where_it_is_whole(tmp_path: Path) -> None:
    (tmp_path / "global_step9").mkdir()
    (tmp_path / "latest").write_text("global_step9\n")
    path = tmp_path / "global_step9/mp_rank_00_model_states.pt"
    torch.save({"module": encoder(), "ds_config": {}, "optimizer": None}, path)
    assert find_file(tmp_path) == find_file(tmp_path / "global_step9") == path
    assert read_weights(tmp_path).format == "encoder"


def test_the_folder_of_a_detector_and_of_checkpoints(tmp_path: Path) -> None:
    folder_of(tmp_path, "model_0000009.pth", "model_final.pth")
    assert find_file(tmp_path) == tmp_path / "model_final.pth"
    (tmp_path / "last_checkpoint").write_text("model_0000009.pth")
    assert find_file(tmp_path) == tmp_path / "model_0000009.pth"
    folder_of(tmp_path, "model_best.pth")
    assert find_file(tmp_path) == tmp_path / "model_best.pth"


def test_an_archive_of_torch_that_was_cut(tmp_path: Path) -> None:
    torch.save(encoder(), tmp_path / "a.pth")
    content = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match=r"a\.pth: truncated or damaged"):
        read_weights(tmp_path / "a.pth")


def test_other_archives(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "model.keras", "w") as archive:
        archive.writestr("model.weights.h5", b"x")
    with pytest.raises(UserError, match=r"a zip archive of other files .*model\.weights\.h5"):
        read_weights(tmp_path / "model.keras")


def test_real_images_are_named(tmp_path: Path) -> None:
    for suffix in ("png", "jpg", "tif", "bmp", "webp", "gif"):
        path = tmp_path / f"a.{suffix}"
        Image.new("RGB", (8, 8)).save(path)
        with pytest.raises(UserError, match="an image, not weights"):
            read_weights(path)
