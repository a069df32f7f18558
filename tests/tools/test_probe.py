"""Proves the probe's command line: what it writes and prints, the cache, the same bits again, errors in one line."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from crossmae.checkpoints.metadata import MODEL_ARGUMENTS, PIXEL_MEAN, PIXEL_STD
from crossmae.checkpoints.weights import save_weights
from crossmae.classification.probe import probe as module
from crossmae.classification.probe.config import ProbeRunConfig
from crossmae.errors import USER_ERROR_EXIT_CODE, UserError
from crossmae.models.crossmae import CrossMAE
from crossmae.training.config import load_typed_config
from tests.crossmae.classification.labelled import CLASSES, write_classes
from tests.tools.command_line import exit_code
from tools.probe import main

TINY: dict[str, Any] = {"img_size": [16, 24], "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
TINY |= {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
RANDOM = ["weights=null", "model.name=crossmae_vit_tiny_patch16", "model.img_size=16", "model.patch_size=8"]
RANDOM += ["model.embed_dim=24", "model.depth=2", "model.num_heads=2"]
QUICK = ["data.workers=0", "runtime.device=cpu", "linear.epochs=2", "linear.warmup_epochs=1", "few_shot.seeds=[0,1]"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory: labelled images in TRAIN and VAL, and a pretraining file."""
    monkeypatch.chdir(tmp_path)
    write_classes(Path("TRAIN"), per_class=12, seed=0)
    write_classes(Path("VAL"), per_class=5, seed=1)
    torch.manual_seed(0)
    model = CrossMAE(**TINY | {"img_size": (16, 24)})
    metadata = {MODEL_ARGUMENTS: json.dumps(TINY), PIXEL_MEAN: "[0.4, 0.5, 0.6]", PIXEL_STD: "[0.2, 0.3, 0.4]"}
    save_weights("model.safetensors", model.state_dict(), metadata)
    return tmp_path


def command(*words: str) -> list[str]:
    data = ["weights=model.safetensors", "data.train=TRAIN", "data.val=VAL", "output_dir=OUT"]
    return ["--config-file", "probe.yaml", *data, *QUICK, *words]


def results() -> dict[str, Any]:
    return json.loads(Path("OUT/results.json").read_text())


def test_what_is_written_and_printed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(command())
    out = capsys.readouterr().out.splitlines()
    found = results()
    chosen = found["methods"]["knn"]["chosen"]
    words = f"k {chosen['k']}, temperature {chosen['temperature']:g}, chosen on training images"
    assert any(words in line and f"{100 * chosen['val']['accuracy']:.2f}" in line for line in out)
    assert out[-1] == "numbers in OUT/results.json, page in OUT/report.html"
    assert list(found["methods"]) == ["knn", "linear", "logistic", "few_shot"]
    assert [one["per_class"] for one in found["methods"]["few_shot"]["shots"]] == [1, 5, 10]
    assert found["methods"]["logistic"]["val"]["accuracy"] == 1  # colours tell the classes apart
    assert found["features"]["views"]["mean"] == [0.4, 0.5, 0.6]
    assert found["features"]["views"]["crop_pct"] == 0.875
    assert found["features"]["notes"][1] == "final norm not applied: the file has none"
    assert found["data"]["classes"] == list(CLASSES)
    assert found["weights"]["random"] is False
    assert set(found["seconds"]) == {"start", "features", *found["methods"]}
    page = Path("OUT/report.html").read_text()
    assert words in page
    assert "Too few steps to be trusted" in page  # two epochs of the linear probe
    shapes = {path.name[:3]: load_file(path)["features"].shape for path in Path("OUT/features").iterdir()}
    assert shapes == {"tra": (36, 24), "val": (15, 24)}


def test_again_from_the_cache_with_the_same_bits(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    main(command())
    first = results()
    assert exit_code(main, *command()) == USER_ERROR_EXIT_CODE
    assert "output_dir: OUT has the results.json of an earlier call" in capsys.readouterr().err
    monkeypatch.setattr(module, "extract", None)  # would fail
    main([*command(), "--force"])
    assert results()["methods"] == first["methods"]
    monkeypatch.undo()
    monkeypatch.chdir(folder)
    shutil.rmtree("OUT")
    main(command())
    assert results()["methods"] == first["methods"]


def test_changed_weights_or_images_are_extracted_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    real = module.extract

    def counted(*arguments: Any) -> torch.Tensor:
        names.append(arguments[-1])
        return real(*arguments)

    monkeypatch.setattr(module, "extract", counted)
    words = [*command("methods=[knn]"), "--force"]
    main(words)
    write_classes(Path("VAL"), per_class=5, seed=2)
    main(words)
    assert names == ["data.train", "data.val", "data.val"]
    weights = load_file("model.safetensors")
    weights["blocks.0.mlp.fc1.bias"] += 1
    save_weights("model.safetensors", weights, {MODEL_ARGUMENTS: json.dumps(TINY)}, force=True)
    main(words)
    main([*words, "features.pool=cls"])
    assert names[3:] == ["data.train", "data.val"] * 2


def test_random_encoder(folder: Path) -> None:
    main(command(*RANDOM, "methods=[knn]"))
    found = results()
    assert found["weights"]["random"] is True
    assert found["weights"]["path"] is None
    assert any(note.startswith("pixel_mean: [0.485, 0.456, 0.406] is assumed") for note in found["features"]["notes"])
    main([*command(*RANDOM, "methods=[knn]", "runtime.seed=1"), "--force"])
    assert results()["weights"]["sha256"] != found["weights"]["sha256"]


def rename(folder: Path) -> None:
    (folder / "VAL/red").rename(folder / "VAL/rot")


def several_labels(folder: Path) -> None:
    (folder / "TRAIN/blue").rename(folder / "TRAIN/red;green")


def flatten(folder: Path) -> None:
    for path in (folder / "VAL").rglob("*.png"):
        path.rename(folder / "VAL" / f"{path.parent.name}-{path.name}")
    for name in CLASSES:
        (folder / "VAL" / name).rmdir()


def truncate(folder: Path) -> None:
    path = folder / "VAL/green/2.png"
    path.write_bytes(path.read_bytes()[:300])


def nothing(folder: Path) -> None:
    pass


@pytest.mark.parametrize(
    ("prepare", "words", "told"),
    [
        (rename, [], "no classes of the model: rot. Its 3 classes are blue, green, red, compared by name"),
        (several_labels, [], "data.train: the label 'red;green' names several classes"),
        (nothing, ["data.separator=;"], "expected none, because only tools/finetune.py takes several labels"),
        (flatten, [], "have no labels. Labels come from a folder with one subfolder per class"),
        (truncate, [], "VAL/green/2.png"),
        (nothing, ["few_shot.shots=[1,13]"], "few_shot.shots: 13 images per class are wanted"),
        (nothing, ["knn.k=[36]"], "knn.k: [36] need more than the 36 images of data.train"),
        (nothing, ["weights=absent.pth"], "error: weights: absent.pth: no such file or folder"),
        (nothing, ["weights=null"], "model.name: missing, with weights=null"),
        (nothing, ["model.embed_dim=32"], "embed_dim 24, not 32"),
        (nothing, ["model.in_chans=1"], "has not one value for each of the 1 channels"),
        (nothing, ["features.block=2"], "features.block: model.safetensors has no block 2. Choose from -2 to 1"),
        (nothing, ["linear.warmup_epochs=3"], "linear.warmup_epochs: 3 exceeds epochs 2"),
        (nothing, ["few_shot.seeds=[0,0]"], "few_shot.seeds: [0, 0] has doubled or negative numbers"),
        (nothing, ["knn.ks=[1]"], "unknown key 'knn.ks' (did you mean 'knn.k'?)"),
        (nothing, ["methods=[svm]"], "methods"),
        (nothing, ["data.val=nowhere"], "data.val: nowhere does not exist"),
        (nothing, ["output_dir=model.safetensors"], "output_dir: cannot write in model.safetensors"),
        (nothing, ["runtime.device=abacus"], "runtime.device: 'abacus' cannot be used"),
    ],
)
def test_errors_are_one_line_and_write_nothing(
    folder: Path,
    capsys: pytest.CaptureFixture[str],
    prepare: Callable[[Path], None],
    words: list[str],
    told: str,
) -> None:
    prepare(folder)
    before = sorted(folder.rglob("*"))
    assert exit_code(main, *command(*words)) == USER_ERROR_EXIT_CODE
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    assert told in lines[0]
    assert sorted(folder.rglob("*")) == before


def test_defaults_that_need_more_images_are_left_out(
    folder: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """With 8 images per class: the log, the results, the page and the terminal say it."""
    for path in Path("TRAIN").rglob("*.png"):
        if int(path.stem) >= 8:
            path.unlink()
    main(command("methods=[knn,few_shot]"))
    found = results()
    assert [one["per_class"] for one in found["methods"]["few_shot"]["shots"]] == [1, 5]
    assert {cell["k"] for cell in found["methods"]["knn"]["cells"]} == {1, 5, 10, 20}
    told = [
        "knn.k: [50, 100, 200] need more than the 24 images of data.train. They are left out",
        "few_shot.shots: [10] images per class are not there, a class of data.train has only 8. They are left out",
    ]
    assert found["left_out"] == told
    out = capsys.readouterr().out
    page = Path("OUT/report.html").read_text()
    for sentence in told:
        assert sentence in caplog.messages
        assert f"{sentence}.\n" in out
        assert f"{sentence}." in page


@pytest.mark.parametrize(
    ("counts", "given", "methods", "ks", "shots"),
    [
        ([12, 12], {"knn.k", "few_shot.shots", "methods"}, "knn linear logistic few_shot", (1, 20), (1, 10)),
        ([12, 3], set(), "knn linear logistic few_shot", (1,), (1,)),
        ([12, 3], {"methods"}, "knn linear logistic few_shot", (1,), (1,)),
        ([12, 3], {"knn.k"}, "knn.k: [20] need more than the 15 images of data.train. Lower knn.k.", (), ()),
        ([12, 3], {"few_shot.shots"}, "few_shot.shots: 10 images per class are wanted", (), ()),
        ([1, 1], set(), "knn linear few_shot", (1,), (1,)),
        ([1, 1], {"methods"}, "methods: logistic needs two images of a class in data.train. Leave it out.", (), ()),
        ([1, 0], set(), "linear", (), ()),
        ([1, 0], {"methods"}, "knn.k: [1, 20] need more than the 1 image of data.train. Leave knn out of", (), ()),
    ],
)
def test_given_values_are_never_left_out(
    counts: list[int], given: set[str], methods: str, ks: tuple[int, ...], shots: tuple[int, ...]
) -> None:
    labels = torch.repeat_interleave(torch.arange(2), torch.tensor(counts))
    wanted = (("knn", "linear", "logistic", "few_shot"), (1, 20), (1, 10), labels, ["cat", "dog"], given)
    if not ks and given:
        with pytest.raises(UserError, match=f"^{re.escape(methods)}"):
            module.choose_methods(*wanted)
        return
    choice = module.choose_methods(*wanted)
    assert (choice.methods, choice.ks, choice.shots) == (tuple(methods.split()), ks, shots)
    assert bool(choice.left_out) == (counts != [12, 12])


def test_the_recipe_is_the_default(folder: Path) -> None:
    """So that a config of one's own that leaves something out means the same."""
    words = ["weights=W", "data.train=T", "data.val=V", "output_dir=O"]
    config = load_typed_config(ProbeRunConfig, "probe.yaml", words)
    Path("own.yaml").write_text("{}")
    assert load_typed_config(ProbeRunConfig, "own.yaml", words) == config
