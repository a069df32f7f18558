"""Proves that every folder and list of ../shared/cases is read right, or ends in one line that names it."""

from __future__ import annotations

import json
import logging
import os
import re
import resource
from pathlib import Path

import pytest

from crossmae.checkpoints.metadata import MODEL_ARGUMENTS, PIXEL_MEAN, PIXEL_STD
from crossmae.checkpoints.weights import save_weights
from crossmae.classification.data import find_classes
from crossmae.data.sources import open_source
from crossmae.errors import UserError, printable
from crossmae.models.crossmae import CrossMAE
from tests.cases.conftest import Tool, Written
from tools import reconstruct

# The data set, its classes or the pattern of the error, and the pattern of a warning.
LABELLED: dict[str, tuple[tuple[str, ...] | str, str]] = {
    "clean_val": (("cat", "dog"), ""),
    "loose": (r"12 would be left", r"there is none for 1 sample, the first is .*/classes\.png"),
    "parent": (r"the folders train, val are splits, not classes\. Name one of them", "labels are not used"),
    "deep": (r"all are in .*deep/images\. Name that folder if its folders cat, dog", ""),
    "shards_mac": (("0", "1"), ""),
    "shards_dots": (("0", "1"), ""),
    "shards_preview": (("0", "1"), r"not the images next to them: preview\.png"),
    "lists/nan.parquet": (
        r"none for 1 sample, the first is .*/cat/5\.png\. Label them.* 11 would be",
        "not used",
    ),
    "lists/nan.csv": (r"there is none for 1 sample, the first is .*/cat/5\.png", "not used"),
    "lists/space.csv": (("cat", "dog"), "'cat' .* and 'cat ' .* are one class, 'cat'"),
    "lists/case.csv": (("cat", "dog"), "'Cat' .* and 'cat' .* are one class, 'cat'"),
    "lists/semi.csv": (("cat", "dog"), ""),
    "lists/latin.csv": (
        r"latin\.csv: line 2 is not UTF-8: 'caf\xe9' in WINDOWS-1252.*Convert it: iconv -f WINDOWS-1252",
        "",
    ),
    "lists/utf16.csv": (r"utf16\.csv: is UTF-16 text, not UTF-8\. Convert it: iconv -f UTF-16", ""),
    "lists/twice.csv": (r"cat/0\.png is listed as 'cat' and 'dog'\. Keep one", "not used"),
    "lists/back.csv": (("cat", "dog"), r"12 of 12 are there as cat/0\.png: separators of Windows"),
    "lists/caps.csv": (("cat", "dog"), ""),
    "lists/yesno.csv": (("NA", "None"), ""),
    "lists/txt.txt": (tuple(map(str, range(12))), ""),
}


@pytest.mark.parametrize("case", LABELLED)
def test_labels_of_a_data_set(
    case: str,
    written: Written,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    expected, warning = LABELLED[case]
    path = written("pretraining/folders.py") / case
    if isinstance(expected, str):
        with pytest.raises(UserError, match=r"data\.train: .*" + expected) as raised:
            find_classes(open_source(path, "data.train"), "data.train")
        assert "\n" not in str(raised.value)
    else:
        source = open_source(path, "data.train")
        assert find_classes(source, "data.train") == expected
        assert len(set(map(source.read, range(len(source))))) == len(source)
    warnings = "\n".join(record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING)
    assert re.search(warning, warnings) if warning else not warnings


def test_odd_names_reach_every_output(written: Written, tool: Tool, tmp_path: Path) -> None:
    folder = written("pretraining/names.py") / "a"
    sizes = {"patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "fuse_blocks": [0]}
    sizes |= {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2, "img_size": [16, 16]}
    model = CrossMAE(**sizes | {"img_size": (16, 16), "fuse_blocks": (0,)})  # type: ignore[arg-type]
    metadata = {MODEL_ARGUMENTS: json.dumps(sizes), PIXEL_MEAN: "[0.5, 0.5, 0.5]", PIXEL_STD: "[0.25, 0.25, 0.25]"}
    run = tmp_path / "run\n é $x$"
    run.mkdir()
    save_weights(run / "model.safetensors", model.state_dict(), metadata)
    code, output = tool(reconstruct.main, run, folder, "--output", tmp_path / "found", "--no-gif")
    assert code == 0, output
    assert [line.split("/")[-1].split("  ")[0] for line in output.splitlines() if line.startswith(str(folder))] == [
        "caf\\udce9.png",
        "new\\nline.png",
        'q"uote,comma.png',
        "日本.png",
    ]
    assert len(json.loads((tmp_path / "found/psnr.json").read_text("utf-8"))["images"]) == 4


def test_odd_names_are_predicted(written: Written, tool: Tool, tmp_path: Path) -> None:
    pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")
    from tests.det.detectors import write_run
    from tools import predict

    write_run(tmp_path / "run")
    target = tmp_path / os.fsdecode(b"found\n\xe9")
    code, output = tool(
        predict.main, "--weights", tmp_path / "run", written("pretraining/names.py"), "--output", target
    )
    assert code == 0, output
    assert f"objects in 8 images: {printable(target)}/predictions.json\n" in output
    entries = json.loads((target / "predictions.json").read_text("utf-8"))["images"]
    assert {entry["file_name"] for entry in entries} == {
        f"{folder}/{name}" for folder in "ab" for name in os.listdir(written("pretraining/names.py") / folder)
    }


def test_many_shards_need_few_open_files(written: Written, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = written("pretraining/folders.py") / "shards_many"
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, hard))
    try:
        source = open_source(folder, "data.train")
        assert all(source.read(index) for index in range(240))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
