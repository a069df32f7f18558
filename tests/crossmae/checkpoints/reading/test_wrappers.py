"""Proves that the tensors are found in every wrapper that trainers write, by a stated rule where there are several sets
of weights, and that whatever else is in the file is listed."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from crossmae.checkpoints.weights import read_weights
from crossmae.errors import UserError

NAMES = ("patch_embed.proj.weight", "cls_token", "blocks.0.norm1.weight")


def weights(value: float, prefix: str = "") -> OrderedDict[str, Tensor]:
    return OrderedDict((prefix + name, torch.full((2, 3, 4, 4), value)) for name in NAMES)


def value_of(path: Path, **options: Any) -> float:
    """The one value of all tensors that were taken."""
    found = read_weights(path, **options).tensors
    assert {name.removeprefix("backbone.") for name in found} == set(NAMES)
    (value,) = {tensor.unique().item() for tensor in found.values()}
    return value


@pytest.mark.parametrize("wrap", ["bare", "model", "state_dict", "ddp", "compiled", "trainer", "nested", "legacy"])
def test_wrappers(tmp_path: Path, wrap: str) -> None:
    prefixes = {"ddp": "module.", "compiled": "_orig_mod.module.", "trainer": "model."}
    content: Any = weights(1, prefixes.get(wrap, ""))
    keys = {"model": ["model"], "state_dict": ["state_dict"], "nested": ["module", "model", "model_state_dict"]}
    for key in keys.get(wrap, []):
        content = {key: content, "epoch": 3}
    torch.save(content, tmp_path / "a.pt", _use_new_zipfile_serialization=wrap != "legacy")
    assert value_of(tmp_path / "a.pt") == 1
    assert read_weights(tmp_path / "a.pt").beside == ("epoch",) * len(keys.get(wrap, []))


SEVERAL: dict[str, tuple[dict[str, Any], float, float, tuple[str, ...]]] = {
    # layout: content, value of the plain weights, of the EMA weights, what is listed beside the plain ones
    "timm": ({"state_dict": weights(1), "state_dict_ema": weights(2), "epoch": 9}, 1, 2, ("state_dict_ema", "epoch")),
    "deit": ({"model": weights(1), "model_ema": weights(2), "args": None}, 1, 2, ("model_ema", "args")),
    "dino": ({"student": weights(1, "module."), "teacher": weights(2)}, 2, 2, ("student",)),
    "dino beside plain": ({"teacher": weights(2), "model": weights(1)}, 1, 2, ("teacher",)),
    "dinov2": (
        {"model": weights(1, "student.backbone.") | weights(2, "teacher.backbone."), "iteration": 3},
        2,
        2,
        ("iteration", "student (3 tensors)"),
    ),
    "moco v3": (
        {
            "arch": "vit_base",
            "state_dict": weights(1, "module.base_encoder.")
            | weights(2, "module.momentum_encoder.")
            | {"module.predictor.0.weight": torch.zeros(1)},
        },
        1,
        2,
        ("arch", "momentum_encoder (3 tensors)", "predictor (1 tensor)"),
    ),
    "mmengine": (
        {"state_dict": weights(1), "ema_state_dict": weights(2, "module.") | {"steps": torch.tensor(9)}, "meta": {}},
        1,
        2,
        ("ema_state_dict", "meta"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("layout", SEVERAL)
def test_of_several_weights_the_plain_ones_are_taken_and_the_others_listed(tmp_path: Path, layout: str) -> None:
    content, plain, averaged, beside = SEVERAL[layout]
    torch.save(content, tmp_path / "a.pth")
    assert value_of(tmp_path / "a.pth") == plain
    assert value_of(tmp_path / "a.pth", ema=True) == averaged
    assert read_weights(tmp_path / "a.pth").beside == beside


def test_averaged_models_count_their_steps_beside_the_weights(tmp_path: Path) -> None:
    model = nn.Linear(2, 1)
    torch.save({"model": {"weight": torch.zeros(1)}, "ema": AveragedModel(model).state_dict()}, tmp_path / "a.pth")
    found = read_weights(tmp_path / "a.pth", ema=True)
    assert found.tensors.keys() == {"weight", "bias"}
    assert torch.equal(found.tensors["weight"], model.weight)
    assert found.beside == ("model", "n_averaged")


def test_ema_weights_that_are_not_there_are_an_error(tmp_path: Path) -> None:
    torch.save({"model": weights(1)}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"a\.pth: has no EMA weights, no dict model_ema, "):
        read_weights(tmp_path / "a.pth", ema=True)


def test_ema_weights_alone_need_not_be_asked_for(tmp_path: Path) -> None:
    torch.save({"model_ema": weights(2)}, tmp_path / "a.pth")
    assert value_of(tmp_path / "a.pth") == 2


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ([1, 2], "not a state dict of named tensors, but a list"),
        ({}, "not a state dict of named tensors, but an empty dict"),
        ({"model": {}}, "not a state dict of named tensors, but an empty dict"),
        ({"epoch": 3, "lr": 0.1}, "keys 'epoch', 'lr', 'epoch' is of type int"),
        ({"model": {"a": np.float64(1)}}, "'a' is of type float64, not a tensor"),
        ({"names": np.array(["x", "y"])}, "names is not a plain array of numbers"),
        ({1: np.ones(1)}, "1 is not the name of a tensor"),
        ({"a\x1b[2J": np.ones(1)}, r"'a\\x1b\[2J' is not the name of a tensor"),
        ({"a" * 2000: np.ones(1)}, "is not the name of a tensor"),
        ({"model": {"a": np.ones(1)}, "crossmae_metadata": {"version": 1}}, "crossmae_metadata is damaged"),
        ({"model": {"a": np.ones(1)}, "crossmae_metadatb": {"digest": "x"}}, "crossmae_metadata is damaged"),
    ],
)
def test_what_is_no_state_dict(tmp_path: Path, content: Any, told: str) -> None:
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=told) as caught:
        read_weights(tmp_path / "a.pkl")
    assert len(str(caught.value)) < 500


def test_a_state_dict_that_holds_itself(tmp_path: Path) -> None:
    content: dict[str, Any] = {}
    content["model"] = content
    (tmp_path / "a.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match="not a state dict"):
        read_weights(tmp_path / "a.pkl")


def test_of_two_dicts_the_one_with_tensors_is_taken(tmp_path: Path) -> None:
    torch.save({"model": {"name": "vit"}, "state_dict": {"a": torch.ones(2)}}, tmp_path / "a.pth")
    assert torch.equal(read_weights(tmp_path / "a.pth").tensors["a"], torch.ones(2))


def test_encoders_of_their_own(tmp_path: Path) -> None:
    """I-JEPA's files: two encoders, one of them an average."""
    torch.save({"encoder": {"a": torch.ones(2)}, "target_encoder": {"a": torch.zeros(2)}}, tmp_path / "a.pth")
    found = read_weights(tmp_path / "a.pth")
    assert (found.tensors["a"].tolist(), found.beside) == ([1, 1], ("target_encoder",))
    assert read_weights(tmp_path / "a.pth", ema=True).tensors["a"].tolist() == [0, 0]


def test_only_what_shares_memory_is_copied(tmp_path: Path) -> None:
    """Views of one storage come back as tensors of their own; nothing else is held twice in memory."""
    whole = torch.arange(6.0)
    torch.save({"a": whole, "b": whole[2:4], "c": whole.view(2, 3).T, "d": whole}, tmp_path / "a.pth")
    tensors = read_weights(tmp_path / "a.pth").tensors
    pointers = {tensor.untyped_storage().data_ptr() for tensor in tensors.values()}
    assert len(pointers) == 4
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    assert torch.equal(tensors["c"], whole.view(2, 3).T)
    tensors["a"] += 1
    assert torch.equal(tensors["d"], whole)


def test_how_many_entries_are_no_tensors_is_said(tmp_path: Path) -> None:
    torch.save({"state_dict": {"a": torch.ones(2), "extra": 3, "more": "x"}}, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"'extra' is of type int, not a tensor \(2 of 3 entries are not\)"):
        read_weights(tmp_path / "a.pth")
