"""Proves that inspecting says what a file is, for every layout, without reading values where that is asked for, and
that what it promises about conversions is what conversions do."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file
from timm.models.vision_transformer import VisionTransformer

from crossmae.checkpoints import convert, inspect
from crossmae.checkpoints.conversion.targets import TARGETS
from crossmae.checkpoints.metadata import MODEL_ARGUMENTS, PIXEL_MEAN, PIXEL_STD, STEP, VERSION
from crossmae.checkpoints.weights import save_weights
from crossmae.errors import UserError
from crossmae.models.crossmae import CrossMAE

ENCODER: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}
DECODER: dict[str, Any] = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}


def own(path: Path, **overrides: Any) -> Path:
    arguments = ENCODER | DECODER | overrides
    metadata = {MODEL_ARGUMENTS: json.dumps(arguments), VERSION: "0.1.0", STEP: "70"}
    metadata |= {PIXEL_MEAN: "[0.5, 0.4, 0.3]", PIXEL_STD: "[0.2, 0.2, 0.2]"}
    save_weights(path, CrossMAE(**arguments).state_dict(), metadata)
    return path


def test_a_file_of_ours(tmp_path: Path) -> None:
    found = inspect(own(tmp_path / "a.safetensors"))
    model = CrossMAE(**ENCODER, **DECODER)
    assert (found.layout, found.content) == ("plain", "crossmae")
    assert (found.tensors, found.values) == (len(model.state_dict()), sum(p.numel() for p in model.parameters()))
    assert found.dtypes == {"float32": found.values}
    assert found.encoder == ENCODER | {"in_chans": 3, "mlp_ratio": 4.0}
    assert found.non_finite == ()
    assert found.facts["positions"] == "sine-cosine, 4 x 4 patches"
    assert found.facts["fusion"] == "3 maps of the encoder for each of 1 decoder blocks"
    assert found.facts["decoder"].startswith(
        "decoder cross, decoder_embed_dim 16, decoder_depth 1, decoder_num_heads 2"
    )
    assert found.facts["pixels"] == "mean [0.5, 0.4, 0.3], std [0.2, 0.2, 0.2]"
    assert found.facts["written by"] == "crossmae 0.1.0 step 70"
    assert json.loads(json.dumps(found.record()))["becomes"]["mae"]["possible"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_values_are_looked_at_unless_told_otherwise(tmp_path: Path, suffix: str) -> None:
    tensors = dict(CrossMAE(**ENCODER, **DECODER).state_dict())
    tensors["blocks.1.mlp.fc1.bias"][3] = float("nan")
    tensors["decoder_pred.weight"][0, 0] = float("inf")
    if suffix == ".pth":
        torch.save({"model": tensors, "epoch": 3, "optimizer": {}}, tmp_path / "a.pth")
    else:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "a.safetensors")
    found = inspect(tmp_path / f"a{suffix}")
    assert set(found.non_finite or ()) == {"blocks.1.mlp.fc1.bias", "decoder_pred.weight"}
    assert any(line.startswith("finite") and "NO: NaN or infinity in 2 tensors" in line for line in found.lines())
    assert found.beside == (("epoch", "optimizer") if suffix == ".pth" else ())
    assert found.facts["heads"].endswith("Conversions need --set num_heads=N")
    quick = inspect(tmp_path / f"a{suffix}", values=False)
    assert quick.non_finite is None
    assert quick.encoder == found.encoder


def test_only_the_header_is_read(tmp_path: Path) -> None:
    """A tensor of 400 MB, a hole in the file, adds little to the memory."""
    content = save(CrossMAE(**ENCODER, **DECODER).state_dict())
    length = int.from_bytes(content[:8], "little")
    header, values = json.loads(content[8 : 8 + length]), content[8 + length :]
    hole = 400 << 20
    header["wide"] = {"dtype": "F32", "shape": [hole // 4], "data_offsets": [len(values), len(values) + hole]}
    text = json.dumps(header).encode()
    with open(tmp_path / "a.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text + values)
        file.truncate(file.tell() + hole)
    clear = Path("/proc/self/clear_refs")
    if not clear.exists():
        pytest.skip("needs /proc to measure the peak of the memory")
    clear.write_text("5")
    before = peak_kilobytes()
    assert inspect(tmp_path / "a.safetensors", values=False).values > 100_000_000
    assert peak_kilobytes() - before < 50 << 10


def peak_kilobytes() -> int:
    return int(re.search(r"VmHWM:\s*(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]


def test_a_changed_value_is_found(tmp_path: Path) -> None:
    path = own(tmp_path / "a.safetensors")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="changed or damaged"):
        inspect(path)
    assert inspect(path, values=False).content == "crossmae"


@pytest.mark.parametrize("decoder", ["cross", "self"])
def test_what_it_says_of_conversions_is_what_they_do(tmp_path: Path, decoder: str) -> None:
    path = own(tmp_path / "a.safetensors", decoder=decoder)
    for source in [path, convert(path, tmp_path / "d.pth", "detectron2").destination]:
        becomes = inspect(source).becomes
        assert becomes.keys() == TARGETS.keys()
        for to, outcome in becomes.items():
            destination = tmp_path / f"{source.stem}-{to}{TARGETS[to].suffixes[0]}"
            if not outcome.possible:
                with pytest.raises(UserError, match=r"has no class token"):
                    convert(source, destination, to)
                continue
            report = convert(source, destination, to).report
            assert all(entry.reason in outcome.text for entry in report.entries if entry.status == "dropped")
            assert bool(report.names("new")) == ("with a new norm.weight" in outcome.text)
            assert ("without" in outcome.text) == bool(report.names("dropped"))


def test_a_learned_table_and_a_head(tmp_path: Path) -> None:
    model = VisionTransformer(**ENCODER, num_classes=5, global_pool="avg")
    save_file(model.state_dict(), tmp_path / "a.safetensors", {"format": "pt", "classes": json.dumps(list("abcdef"))})
    found = inspect(tmp_path / "a.safetensors")
    assert found.content == "finetuned"
    assert found.facts["positions"] == "learned, 4 x 4 patches"
    assert (found.facts["head"], found.facts["final norm"]) == ("5 classes", "fc_norm")
    assert found.facts["classes"] == "a, b, c, d, e and 1 more"


def test_registers_and_relative_positions_are_named(tmp_path: Path) -> None:
    tensors = dict(VisionTransformer(**ENCODER, num_classes=0, reg_tokens=4).state_dict())
    torch.save(tensors, tmp_path / "a.pth")
    found = inspect(tmp_path / "a.pth")
    assert any("register tokens" in sentence for sentence in found.not_plain)
    assert any(line.startswith("NOT PLAIN") for line in found.lines())
    assert not any(outcome.possible for outcome in found.becomes.values())
    del tensors["reg_token"]
    tensors |= {f"blocks.{i}.attn.rel_pos_{side}": torch.zeros(3 + 4 * i, 8) for i in range(2) for side in "hw"}
    torch.save({f"backbone.net.{name}": tensor for name, tensor in tensors.items()}, tmp_path / "b.pth")
    found = inspect(tmp_path / "b.pth")
    assert found.facts["relative"] == "tables for sides of [2, 4]"
    assert found.becomes["detectron2"].possible
    assert "relative positions have no place in a plain ViT" in found.becomes["timm"].text


def test_no_encoder(tmp_path: Path) -> None:
    torch.save({"conv1.weight": torch.zeros(2, 2)}, tmp_path / "a.pth")
    found = inspect(tmp_path / "a.pth")
    assert (found.content, found.encoder) == ("unknown", {})
    assert all("no ViT encoder" in outcome.text for outcome in found.becomes.values())
    assert "no kind of model that is known" in "\n".join(found.lines())


def test_types_that_torch_does_not_have(tmp_path: Path) -> None:
    path = own(tmp_path / "a.safetensors")
    length = int(np.frombuffer(path.read_bytes()[:8], "<u8")[0])
    content = path.read_bytes()
    header = content[8 : 8 + length].replace(b'"F32"', b'"U64"')
    path.write_bytes(content[:8] + header + content[8 + length :])
    with pytest.raises(UserError, match=r"a\.safetensors: "):
        inspect(path, values=False)
