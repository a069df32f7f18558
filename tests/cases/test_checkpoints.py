"""Proves that every weight file of ../shared/cases is read as the encoder that it holds, or refused in one line."""

from __future__ import annotations

import logging
import re
from pathlib import Path

import pytest
import timm
import torch

from crossmae.checkpoints.conversion.proof import plain_encoder
from crossmae.checkpoints.loading import load
from crossmae.checkpoints.weights import encoder_arguments, encoder_tensors, read_weights
from crossmae.classification.probe.features import open_encoder
from crossmae.classification.train.config import ClassifierConfig, LabelledDataConfig
from crossmae.classification.train.train import build_model
from crossmae.errors import UserError
from crossmae.models.encoder import ViTEncoder
from tests.cases.conftest import Tool, Written
from tools import convert_checkpoint, inspect_checkpoint

# Files with the same encoder as plain.pth, and other content of the file that is listed.
SAME: dict[str, str] = {
    "plain.pth": "",
    "compiled_block.pth": "",
    "lightly.ckpt": "decoder (3 tensors)",
    "pl_backbone.ckpt": "classifier (2 tensors)",
    "pl_net.ckpt": "classifier (2 tensors)",
    "pl_student.ckpt": "classifier (2 tensors)",
    "pl_model_encoder.ckpt": "classifier (2 tensors)",
    "lt_teacher.ckpt": "classifier (2 tensors)",
    "solo_omegaconf.ckpt": "hyper_parameters",
    "ibot.pth": "",
    "dino_full.pth": "student",
    "net_key.pth": "acc",
    "params_key.pth": "",
    "nested.pth": "args",
    "backbone_key.pth": "head",
}
# Files that are refused, and what their one line says after the file.
REFUSED: dict[str, str] = {
    "fsdp_flat.pth": r"parameters that FSDP made flat.*full_state_dict=True",
    "mp_rank_00_model_states.pt": r"30 of 30 tensors are empty.*ZeRO-3.*python zero_to_fp32\.py",
    "global_step5": r"30 of 30 tensors are empty.*ZeRO-3",
    "latest": r"the name of a checkpoint, not weights\. Name the folder ",
    "dcp": r"a distributed checkpoint of torch \(DCP\).*format_utils dcp_to_torch \S+/dcp weights\.pth",
    "dcp/__0_0.distcp": r"a distributed checkpoint of torch \(DCP\).*dcp_to_torch \S+/dcp weights\.pth",
    "dcp/.metadata": r"the index of a distributed checkpoint \(DCP\)\. Name its folder",
    "sam.pth": r"positions as a map of shape \(1, 4, 4, 48\), as in SAM",
    "sam_encoder.pth": r"positions as a map .* as in SAM",
    "sam_timm.pth": r"positions as a map .* as in SAM",
    "satmae_group.pth": r"patches of groups of channels .* SatMAE",
    "prithvi.pt": r"a video, multi-date or volume model, with patches of 1 x 8 x 8",
    "videomae.pth": r"a video, multi-date or volume model, with patches of 2 x 8 x 8",
    "peft.pth": r"a model with an adapter \(LoRA\) that is not merged.*merge_and_unload",
    "pruned.pth": r"pruned weights.*torch\.nn\.utils\.prune\.remove",
    "openclip.pt": r"the image tower of CLIP",
    "beit.pth": r"not a plain ViT, it has BEiT's attention",
    "eva02.pth": r"not a plain ViT, it has .*BEiT's attention.*a layer without bias",
    "optimizer_only.pth": r"has no weights, only the state of a training run \(optimizer\)",
    "ViT-T.npz": r"a NumPy \.npz archive.*timm\.create_model\(NAME, checkpoint_path=FILE\)",
}
# Folders of transformers and timm that are read, with the class of transformers that computes the same.
SAME_AS_TIMM = {"siglip2_gap": "vit_base_patch16_siglip_gap_224.v2_webli", "timm_deit3": "deit3_small_patch16_224"}
SAME_AS_TRANSFORMERS = {"dinov2": "Dinov2Model", "ijepa": "IJepaModel", "vitmsn": "ViTMSNModel", "vit_pool": "ViTModel"}
REFUSED_FOLDERS: dict[str, str] = {
    "dinov2reg": r'model_type is "dinov2_with_registers", DINOv2 with register tokens',
    "dinov3": r'model_type is "dinov3_vit", DINOv3, which has register tokens and rotary positions',
    "deit": r'model_type is "deit", DeiT, which has a distillation token',
    "clipv": r'model_type is "clip_vision_model", CLIP',
    "siglipv": r'model_type is "siglip_vision_model", SigLIP',
    "videomae": r'model_type is "videomae", a video model',
    "beit": r'model_type is "beit", BEiT',
    "samv": r'model_type is "sam_vision_model", SAM',
    "vitdet": r'model_type is "vitdet", ViTDet',
    "vit_relu": r'hidden_act is "relu"\. hidden_act must be gelu',
    "vit_quick": r'hidden_act is "quick_gelu"',
    "vit_noqkvb": r"qkv_bias is false",
    "timm_dinov3": r"vit_small_patch16_dinov3 has other blocks or another activation",
    "timm_qgelu": r"vit_base_patch32_clip_quickgelu_224 has other blocks or another activation",
    "timm_intern": r"model_args has act_layer=relu, which a plain ViT does not have",
}
SIZES = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2}


@pytest.fixture
def files(written: Written) -> Path:
    return written("pretraining/checkpoints.py")


@pytest.fixture
def folders(written: Written) -> Path:
    pytest.importorskip("transformers")
    return written("pretraining/transformers_folders.py") / "h"


@pytest.mark.parametrize("name", SAME)
def test_the_one_encoder_is_read_to_the_bit(files: Path, name: str) -> None:
    expected = encoder_tensors(read_weights(files / "plain.pth"))
    weights = read_weights(files / name)
    found = encoder_tensors(weights)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert not SAME[name] or SAME[name] in weights.beside
    model = ViTEncoder(**SIZES, num_heads=2)
    load(model, weights, part="encoder")
    assert torch.equal(model.blocks[0].attn.qkv.weight, expected["blocks.0.attn.qkv.weight"])


def refusal(path: Path) -> str:
    """Try to load an encoder, and return the error."""
    with pytest.raises(UserError) as caught:
        load(ViTEncoder(**SIZES, num_heads=2), path, part="encoder")
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED)
def test_other_files_are_named_in_one_line(files: Path, name: str) -> None:
    message = refusal(files / name)
    assert re.match(rf"{re.escape(str(files / name))}[^:\n]*: {REFUSED[name]}[^\n]*\.$", message), message
    assert "--drop" not in message


@pytest.mark.parametrize("name", SAME_AS_TRANSFORMERS)
def test_folders_compute_what_transformers_computes(folders: Path, name: str) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = getattr(transformers, SAME_AS_TRANSFORMERS[name]).from_pretrained(folders / name).eval()
    weights = read_weights(folders / name)
    tensors, eps = encoder_tensors(weights), float(weights.metadata["norm_eps"])
    encoder = plain_encoder(tensors, encoder_arguments(tensors, weights.metadata), norm_eps=eps)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens, expected = encoder.tokens(encoder.model, images), theirs(images).last_hidden_state
    norm = (weights.tensors["norm.weight"], weights.tensors["norm.bias"])
    tokens = torch.nn.functional.layer_norm(tokens, (48,), *norm, eps)
    torch.testing.assert_close(tokens[:, -expected.shape[1] :], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", SAME_AS_TIMM)
def test_folders_compute_what_timm_computes(folders: Path, name: str) -> None:
    sizes = {"depth": 2, "embed_dim": 48, "num_heads": 4, "img_size": 32}
    theirs = timm.create_model(SAME_AS_TIMM[name], pretrained=False, **sizes).eval()
    theirs.load_state_dict(torch.load(folders / name / "pytorch_model.bin", weights_only=True))
    weights = read_weights(folders / name)
    tensors = encoder_tensors(weights)
    encoder = plain_encoder(tensors, encoder_arguments(tensors, weights.metadata))
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens, expected = encoder.tokens(encoder.model, images), theirs.forward_features(images)
    norm = (weights.tensors["norm.weight"], weights.tensors["norm.bias"])
    tokens = torch.nn.functional.layer_norm(tokens, (48,), *norm, 1e-6)
    torch.testing.assert_close(tokens[:, -expected.shape[1] :], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", REFUSED_FOLDERS)
def test_other_folders_are_named_in_one_line(folders: Path, name: str) -> None:
    message = refusal(folders / name)
    where = re.escape(str(folders / name / "config.json"))
    assert re.match(rf"{where}: {REFUSED_FOLDERS[name]}[^\n]*\.$", message), message


# The file, the exit code of inspect_checkpoint, and a pattern that its output contains.
FACTS: dict[str, tuple[int, str]] = {
    "moco_vits.pth.tar": (0, r"heads +by the name vit_small of its trainer's model, as in moco-v3"),
    "int8.pth": (2, r"int8\.pth: quantized weights: .* \(int8\).* dequantize it there"),
    "fp8.pth": (2, r"fp8\.pth: quantized weights: .* \(float8_e4m3fn\).* dequantize it there"),
    "plain.pth": (0, r"heads +unknown.*--set num_heads=N(.|\n)*assumed +img_size: 32 is assumed for a square of 4 x 4"),
    "no_cls.pth": (0, r"assumed +norm_eps: 1e-06 is assumed(.|\n)*assumed +activation: gelu is assumed"),
}


@pytest.mark.parametrize("case", FACTS)
def test_what_a_file_does_not_tell(case: str, written: Written, tool: Tool) -> None:
    code, pattern = FACTS[case]
    found, output = tool(inspect_checkpoint.main, written("pretraining/checkpoints.py") / case)
    assert found == code, output
    assert re.search(pattern, output), output
    if code:
        assert len(output.strip().splitlines()) == 1


def test_moco_v3_keeps_its_heads_everywhere(written: Written, tool: Tool, tmp_path: Path) -> None:
    source = written("pretraining/checkpoints.py") / "moco_vits.pth.tar"
    code, output = tool(convert_checkpoint.main, source, tmp_path / "a.pth", "--to", "detectron2", "--drop", "head")
    assert code == 2, output  # nothing was to drop
    code, output = tool(convert_checkpoint.main, source, tmp_path / "a.pth", "--to", "detectron2")
    assert (code, "num_heads" in output) == (0, False), output
    assert '"num_heads": 12' in read_weights(tmp_path / "a.pth").metadata["model"]
    assert open_encoder(read_weights(source), "avg", None).architecture.num_heads == 12
    with pytest.raises(UserError, match=r"moco_vits\.pth\.tar: its encoder has num_heads 12, not 6"):
        open_encoder(read_weights(source), "avg", None, num_heads=6)


def test_heads_that_nothing_tells_are_said_and_stay_assumed(
    written: Written, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    content = torch.load(written("pretraining/checkpoints.py") / "moco_vits.pth.tar", weights_only=True)
    prefix = "module.base_encoder."
    alone = {name.removeprefix(prefix): t for name, t in content["state_dict"].items() if name.startswith(prefix)}
    torch.save(alone, tmp_path / "alone.pth")
    line = "num_heads: 6 is assumed from the width 384, the file does not tell. Set model.num_heads=12 if it differs"
    assert line in open_encoder(read_weights(tmp_path / "alone.pth"), "avg", None).notes
    with caplog.at_level(logging.INFO):
        _, _, kept = build_model(
            ClassifierConfig(init=tmp_path / "alone.pth"), LabelledDataConfig(train="x"), 0, ("a", "b"), None
        )
    assert f"model.init: {line}" in caplog.messages
    assert "num_heads" in kept["assumed"]
    given = ClassifierConfig(init=tmp_path / "alone.pth", num_heads=12)
    architecture, _, kept = build_model(given, LabelledDataConfig(train="x"), 0, ("a", "b"), None)
    assert (architecture.num_heads, "num_heads" in kept["assumed"]) == (12, False)
