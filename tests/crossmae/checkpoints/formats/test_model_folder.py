"""A saved folder loads the same bits again, and its model card says what the run's own files say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard

import crossmae
from crossmae.checkpoints.formats.model_folder import save_folder
from crossmae.checkpoints.formats.training_record import logged_figures, recorded_training
from crossmae.checkpoints.metadata import MODEL_ARGUMENTS, STARTED_FROM, TRAINING
from crossmae.checkpoints.provenance import LICENCE, NON_COMMERCIAL, licence_tag
from crossmae.checkpoints.weights import read_weights, save_weights
from crossmae.errors import UserError
from crossmae.models.crossmae import MAE
from crossmae.pretraining.train import pretrain
from tests.crossmae.classification.classifiers import write_classifier
from tests.crossmae.pretraining.runs import make_config

SMALL: dict[str, Any] = {"img_size": (16, 32), "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
SMALL |= {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}
ROW = re.compile(r"^\| `(.*?)` \| `(.*?)` \|$", re.MULTILINE)


def rows(card: str, title: str) -> dict[str, str]:
    """The rows of a table of the card."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    assert section is not None
    return dict(ROW.findall(section[1]))


def same_bits(one: torch.nn.Module, other: torch.nn.Module) -> bool:
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(value, theirs[name]) for name, value in mine.items())


@pytest.fixture(scope="module")
def run(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of pretraining with a held-out loss, which started from a file with a licence."""
    folder = tmp_path_factory.mktemp("runs")
    start = {**SMALL, "img_size": 32, "embed_dim": 16, "num_heads": 2}
    torch.save({"model": crossmae.CrossMAE(**start).state_dict(), "epoch": 1}, folder / "mae_pretrain_vit_tiny.pth")
    model = {"init": str(folder / "mae_pretrain_vit_tiny.pth")}
    config = make_config(images, folder / "run", model=model, data={"val": str(images)}, validation={"every_epochs": 2})
    pretrain(config)
    return folder / "run"


def test_the_card_has_the_numbers_of_the_log_and_the_lineage(run: Path, tmp_path: Path) -> None:
    folder = crossmae.CrossMAE.from_pretrained(run).save_pretrained(tmp_path / "mine")
    text = (folder / "README.md").read_text("utf-8")
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    last = lines[-1]["step"]
    logged = {key: value for line in lines if line["step"] == last for key, value in line.items()}
    figures = {key: json.loads(value) for key, value in rows(text, "Figures").items()}
    assert figures == {key: logged[key] for key in ("loss", "val_loss")}
    assert f"after {last} steps" in text
    recipe = rows(text, "Recipe")
    assert (recipe["optim.base_lr"], recipe["schedule.epochs"], recipe["model.mask_ratio"]) == ("0.1", "4", "0.75")
    assert re.search(r"^\| train \| `images\d*` \| 13 \|$", text, re.MULTILINE)
    assert not re.search(r"(?<!\w)/[\w.-]+/", text.replace("</", "").split("---")[2])  # no path of this machine
    card = ModelCard(text).data  # read by the hub's own library
    assert (card.license, card.library_name, card.base_model) == ("cc-by-nc-4.0", "crossmae", None)
    assert card.tags == ["crossmae", "masked-autoencoder", "vit"]
    assert "The training started from `mae_pretrain_vit_tiny.pth`." in text
    assert NON_COMMERCIAL in text.replace("\\", "")
    assert read_weights(run).metadata[STARTED_FROM] == "mae_pretrain_vit_tiny.pth"


def test_pretraining_models_load_the_same_bits_again(run: Path, tmp_path: Path) -> None:
    first = crossmae.CrossMAE.from_pretrained(run)
    again = crossmae.CrossMAE.from_pretrained(first.save_pretrained(tmp_path / "a"))
    third = crossmae.CrossMAE.from_pretrained(again.save_pretrained(tmp_path / "b") / "model.safetensors")
    assert same_bits(first, again)
    assert same_bits(first, third)
    assert again.metadata == third.metadata
    assert {key: value for key, value in again.metadata.items() if first.metadata[key] != value}.keys() == {"model"}
    assert json.dumps(first.arguments) == json.dumps(third.arguments)
    assert (tmp_path / "a/README.md").read_text()[:80] == (tmp_path / "b/README.md").read_text()[:80]
    noise, pixels = torch.rand(2, first.num_patches), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(first(pixels, noise=noise).loss, third(pixels, noise=noise).loss)
    checkpoint = sorted((run / "checkpoints").iterdir())[-1]
    assert same_bits(first, crossmae.CrossMAE.from_pretrained(checkpoint))


@pytest.mark.parametrize(
    "changes",
    [{}, {"decoder": "self"}, {"decoder": "cross_self", "fuse_blocks": (1,), "class_tokens": 3}, {"fuse_blocks": ()}],
    ids=["crossmae", "mae", "ablation", "no-fusion"],
)
def test_a_model_of_your_own_loop_is_saved_with_its_arguments(tmp_path: Path, changes: dict[str, Any]) -> None:
    model = crossmae.CrossMAE(**SMALL | changes).eval()
    folder = model.save_pretrained(tmp_path / "x", licence="apache-2.0", base_model="someone/model-1.0")
    again = crossmae.CrossMAE.from_pretrained(folder)
    assert isinstance(again, MAE) == (changes.get("decoder") == "self")
    assert json.dumps(again.arguments) == json.dumps(model.arguments)
    assert same_bits(model, again)
    card = ModelCard.load(folder / "README.md").data
    assert (card.license, card.base_model) == ("apache-2.0", "someone/model-1.0")
    assert licence_tag(again.metadata[LICENCE]) == "apache-2.0"
    second = again.save_pretrained(tmp_path / "y")
    assert ModelCard.load(second / "README.md").data.license == "apache-2.0"


def test_classifiers_load_the_same_bits_again(tmp_path: Path) -> None:
    write_classifier(tmp_path / "run", ["a|b", "*c*", "<d>"])
    (tmp_path / "run/config.yaml").write_text("data: {train: /home/me/set}\noptim: {base_lr: 0.25}\n")
    (tmp_path / "run/log.jsonl").write_text('{"step": 7, "top1": 0.123456}\n{"step": 8, "top1": 0.5}\n')
    first = crossmae.Classifier.from_pretrained(tmp_path / "run")
    folder = first.save_pretrained(tmp_path / "x", licence="mit")
    again = crossmae.Classifier.from_pretrained(folder)
    assert same_bits(first.model, again.model)
    assert (again.classes, again.mean, again.crop_pct) == (first.classes, first.mean, first.crop_pct)
    third = crossmae.Classifier.from_pretrained(again.save_pretrained(tmp_path / "y"))
    assert same_bits(first.model, third.model)
    assert third.metadata == again.metadata
    text = (tmp_path / "y/README.md").read_text()
    assert rows(text, "Figures") == {"top1": "0.123456"}
    assert rows(text, "Recipe") == {"optim.base_lr": "0.25"}
    assert "| train | `set` | unknown |" in text
    assert r"3 classes: a\|b, \*c\*, \<d\>." in text
    assert ModelCard(text).data.license == "mit"
    fewer = first.only(["<d>"]).save_pretrained(tmp_path / "z")
    assert crossmae.Classifier.from_pretrained(fewer).classes == ("<d>",)


def test_published_files_keep_their_licence_and_name(tmp_path: Path) -> None:
    arguments = SMALL | {"decoder": "self", "img_size": 32, "embed_dim": 384, "num_heads": 6, "decoder_embed_dim": 512}
    model = crossmae.CrossMAE(**arguments | {"decoder_num_heads": 16}).eval()
    torch.save({"model": model.state_dict()}, tmp_path / "mae_pretrain_vit_small_full.pth")
    folder = crossmae.CrossMAE.from_pretrained(tmp_path / "mae_pretrain_vit_small_full.pth").save_pretrained(
        tmp_path / "x", base_model="facebook/vit-mae-base"
    )
    text = (folder / "README.md").read_text()
    assert ModelCard(text).data.license == "cc-by-nc-4.0"
    assert "Converted from `mae_pretrain_vit_small_full.pth`. Base model: facebook/vit-mae-base." in text
    assert "num_heads" in read_weights(folder).metadata["assumed"]  # stays assumed
    assert same_bits(model, crossmae.CrossMAE.from_pretrained(folder))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"licence": "my own words"}, "is no tag of a licence"),
        ({"base_model": "mae_pretrain.pth"}, r"is no name on a hub. Write OWNER/NAME"),
        ({"metadata": {LICENCE: NON_COMMERCIAL}, "licence": "mit"}, r"inherit cc-by-nc-4\.0, not mit"),
        ({"metadata": {TRAINING: '{"figures": {"AP": "x"}}'}}, r"training.*figures\.AP"),
        ({"folder": "held"}, r"held has files \(a\.txt\). Name another folder, or set force=True"),
        ({"folder": "run", "force": True}, "run holds a run, which must stay"),
    ],
    ids=["licence", "base", "inherited", "record", "files", "run"],
)
def test_wrong_requests_write_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("held/a.txt", "run/log.jsonl"):
        Path(name).parent.mkdir()
        Path(name).touch()
    before = sorted(tmp_path.rglob("*"))
    words = {"folder": "new", "metadata": {}} | options
    with pytest.raises(UserError, match=message):
        save_folder(tensors={"a": torch.zeros(2)}, **words)
    assert sorted(tmp_path.rglob("*")) == before


def test_force_replaces_the_two_files_only(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("old")
    (tmp_path / "notes.txt").write_text("mine")
    save_folder(tmp_path, {"a": torch.zeros(2)}, {}, force=True)
    assert (tmp_path / "README.md").read_text().startswith("---\nlicense: unknown\n")
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_figures_are_metrics_and_no_state_of_the_machine(tmp_path: Path) -> None:
    row = {"step": 4, "epoch": 1.0, "loss": 2.0, "lr": 0.1, "images_per_second": 9.0, "memory_gb": 1.0}
    row |= {"loss_cls": 1.0, "fast_rcnn/cls_accuracy": 0.5, "data_wait_share": 0.1}
    found = {"step": 4, "bbox/AP": 12.3456, "segm/AP50": 0.0, "bbox/AP-cat/dog": 7.0, "bbox/AP75": None}
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(one) + "\n" for one in (row, found, {"step": 5, "x": 1})))
    assert logged_figures(tmp_path, 4) == {"loss": 2.0, "bbox/AP": 12.3456, "segm/AP50": 0.0}
    assert logged_figures(tmp_path, 3) == {}


def test_a_hub_name_is_explained_and_nothing_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for load in (crossmae.CrossMAE.from_pretrained, crossmae.Classifier.from_pretrained):
        with pytest.raises(UserError, match=r"no such .*`hf download longlian/CrossMAE --local-dir C"):
            load("longlian/CrossMAE")
    (tmp_path / "outputs").mkdir()
    with pytest.raises(UserError, match="nearest folder that exists") as caught:
        crossmae.CrossMAE.from_pretrained("outputs/nothing")
    assert "hf download" not in str(caught.value)


def test_a_file_of_another_kind_names_its_tool(tmp_path: Path) -> None:
    encoder = crossmae.ViTEncoder(32, 8, 3, 24, 2, 3)
    save_weights(tmp_path / "e.safetensors", encoder.state_dict(), {MODEL_ARGUMENTS: '{"num_heads": 3}'})
    with pytest.raises(UserError, match=r"an encoder.*not a whole pretraining model"):
        crossmae.CrossMAE.from_pretrained(tmp_path / "e.safetensors")
    assert recorded_training({}).figures == {}
