"""Proves that a conversion accounts for every tensor, resamples what was asked for, carries its provenance, keeps
nothing that its proof refutes, and leaves everything else on disk alone."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from crossmae.checkpoints import Sizes, convert, load
from crossmae.checkpoints.conversion import convert as conversion_module
from crossmae.checkpoints.conversion.targets import MODEL_DEFAULTS, TARGETS, plan
from crossmae.checkpoints.loading import load as load_weights
from crossmae.checkpoints.metadata import FORMAT, MODEL_ARGUMENTS, PIXEL_MEAN, PIXEL_STD, PUBLISHED_ARGUMENTS, VERSION
from crossmae.checkpoints.provenance import LICENCE, NON_COMMERCIAL, UNSTATED
from crossmae.checkpoints.weights import Weights, detect_format, encoder_tensors, read_weights, save_weights
from crossmae.classification.classifier import load_classifier
from crossmae.errors import UserError
from crossmae.models.crossmae import CrossMAE
from crossmae.models.encoder import ViTEncoder
from crossmae.models.sizes import OFF_BY_DEFAULT

SHARED = Path(__file__).parents[5] / "shared/golden"
ENCODER: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}
DECODER: dict[str, Any] = {"decoder_embed_dim": 16, "decoder_depth": 2, "decoder_num_heads": 2}
GIVEN = {"num_heads": 3, "decoder_num_heads": 2}
RECORD = {"decoder": "cross", "norm_pix_loss": True}
HEADS = {"num_heads": 3}  # all that an encoder needs
MEAN, STD = json.dumps([0.5, 0.4, 0.3]), json.dumps([0.2, 0.2, 0.2])


def randomised(model: nn.Module) -> nn.Module:
    """Values with which every tensor counts."""
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if not name.endswith("pos_embed"):
                tensor.copy_(0.2 * torch.randn_like(tensor) + ("norm" in name and name.endswith("weight")))
    return model


def own(path: Path, metadata: dict[str, str] | None = None, **overrides: Any) -> Path:
    """A file of ours."""
    arguments = ENCODER | DECODER | overrides
    record = {FORMAT: "crossmae", MODEL_ARGUMENTS: json.dumps(arguments), VERSION: "0.1.0"} | (metadata or {})
    save_weights(path, randomised(CrossMAE(**arguments)).state_dict(), record)
    return path


def published(path: Path, **overrides: Any) -> Path:
    """A file as the published scripts write it, as far as it matters here."""
    torch.save({"model": randomised(CrossMAE(**ENCODER | DECODER | overrides)).state_dict()}, path)
    return path


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in actual.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


# What is written


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("decoder", ["cross", "cross_self", "self"])
def test_whole_models_stay_whole(tmp_path: Path, suffix: str, decoder: str) -> None:
    to = "mae" if decoder == "self" else "crossmae"
    source = read_weights(own(tmp_path / "a.safetensors", decoder=decoder, fuse_blocks=[0, -1]))
    done = convert(source.path, tmp_path / f"b{suffix}", to)
    converted = read_weights(done.destination)
    assert_same(converted.tensors, source.tensors)
    arguments = json.loads(converted.metadata[MODEL_ARGUMENTS])
    recorded = {key: value for key, value in MODEL_DEFAULTS.items() if key not in OFF_BY_DEFAULT}
    assert arguments == recorded | ENCODER | DECODER | {"decoder": decoder, "fuse_blocks": [0, -1]}
    model = CrossMAE(**arguments)
    load(model, converted)
    images, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    first = CrossMAE(**arguments)
    load_weights(first, source)
    assert torch.equal(model(images, noise=noise).pred, first(images, noise=noise).pred)


def test_encoder_only(tmp_path: Path) -> None:
    own(tmp_path / "a.safetensors", decoder="self")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "mae", encoder_only=True)
    converted = read_weights(tmp_path / "b.safetensors")
    assert converted.format == "encoder"
    assert {name for name in converted.tensors if not name.startswith(("blocks.", "patch_embed."))} == {
        "cls_token", "pos_embed", "norm.weight", "norm.bias"
    }  # fmt: skip
    assert json.loads(converted.metadata[MODEL_ARGUMENTS]).keys() == ENCODER.keys() | {"in_chans", "mlp_ratio"}


def test_bfloat16_becomes_float32_where_numpy_has_none(tmp_path: Path) -> None:
    tensors = {name: tensor.bfloat16() for name, tensor in ViTEncoder(**ENCODER).state_dict().items()}
    save_weights(tmp_path / "a.safetensors", tensors, {MODEL_ARGUMENTS: json.dumps(ENCODER)})
    done = convert(tmp_path / "a.safetensors", tmp_path / "b.pkl", "detectron2")
    assert {entry.reason for entry in done.report.entries if entry.status == "used"} == {"bfloat16 to float32"}
    convert(tmp_path / "a.safetensors", tmp_path / "c", "timm")
    filters = tensors["patch_embed.proj.weight"]
    found = read_weights(tmp_path / "b.pkl").tensors["backbone.net.patch_embed.proj.weight"]
    assert torch.equal(found, filters.float())
    assert torch.equal(read_weights(tmp_path / "c").tensors["patch_embed.proj.weight"], filters)


@pytest.mark.parametrize("name", ["crossmae", "mae"])
def test_official_files_become_everything(tmp_path: Path, name: str) -> None:
    path = SHARED / f"{name}_official_layout.pth"
    if not path.is_file():
        pytest.skip(f"{path.name} is not here")
    weights = read_weights(path)
    assert {"optimizer", "epoch", "args"} <= set(weights.beside)
    with pytest.raises(UserError, match=r"does not show .*num_heads=16"):
        convert(path, tmp_path / "a.safetensors", name)
    for to, target in TARGETS.items():
        if to.startswith("hf-"):
            pytest.importorskip("transformers")
        whole = to == name or (name, to) == ("mae", "hf-vitmae")
        given = GIVEN if whole else {"num_heads": 3}
        done = convert(path, tmp_path / f"{to}{target.suffixes[0]}", to, given=given)
        assert done.proof.equal, done.proof.sentence()
        assert len(done.report.entries) >= len(weights.tensors)
        assert done.metadata[LICENCE] == NON_COMMERCIAL
        kept = read_weights(done.destination)
        for key, tensor in encoder_tensors(kept).items():
            assert torch.equal(tensor, weights.tensors[key]), key
        if to == name:
            assert_same(kept.tensors, weights.tensors)
            assert PUBLISHED_ARGUMENTS in kept.metadata


MANIFESTS = json.loads((SHARED / "state_dict_manifests.json").read_text()) if SHARED.is_dir() else {"absent": {}}


@pytest.mark.parametrize("name", MANIFESTS)
def test_manifests_of_the_released_sizes_convert(tmp_path: Path, name: str) -> None:
    if name == "absent":
        pytest.skip("state_dict_manifests.json is not here")
    shapes = MANIFESTS[name]
    tensors = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    weights = Weights(tmp_path / "a.pth", detect_format(tensors), tensors, {})
    for to in TARGETS:
        planned = plan(weights, to)
        assert planned.refused == ()
        assert len([entry for entry in planned.report.entries if entry.status != "new"]) == len(shapes)
        encoder = {key for key in shapes if key.startswith(("pos_embed", "patch_embed.", "blocks."))}
        assert encoder <= planned.tensors.keys()
        assert planned.whole == (to in (weights.format, "hf-vitmae" if weights.format == "mae" else ""))
    if name != "crossmae_small":
        return
    torch.save({"model": {key: torch.randn(shape) for key, shape in shapes.items()}}, tmp_path / "a.pth")
    done = convert(tmp_path / "a.pth", tmp_path / "b.safetensors", "crossmae")
    assert done.report.summary() == "347 used"
    assert done.proof.equal
    assert done.assumed  # how many heads, and whether patches are standardised


# Other sizes


def test_sizes_are_resampled_and_recorded(tmp_path: Path) -> None:
    own(tmp_path / "a.safetensors")
    sizes = Sizes(img_size=(32, 64), patch_size=16, in_chans=1)
    done = convert(tmp_path / "a.safetensors", tmp_path / "b", "timm", sizes=sizes)
    converted = read_weights(tmp_path / "b")
    assert converted.tensors["pos_embed"].shape == (1, 1 + 2 * 4, 24)
    assert converted.tensors["patch_embed.proj.weight"].shape == (24, 1, 16, 16)
    recorded = json.loads(converted.metadata[MODEL_ARGUMENTS])
    assert (recorded["img_size"], recorded["patch_size"], recorded["in_chans"]) == ([32, 64], 16, 1)
    assert set(done.report.names("resampled")) == {"pos_embed", "patch_embed.proj.weight"}
    reasons = {entry.name: entry.reason for entry in done.report.entries}
    assert "8 x 8 to 16 x 16" in reasons["patch_embed.proj.weight"]
    assert "4 x 4 to 2 x 4" in reasons["pos_embed"]
    assert "after resampling" in done.proof.sentence()
    assert done.proof.equal


def test_fixed_positions_are_computed_again(tmp_path: Path) -> None:
    own(tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", tmp_path / "b.safetensors", "crossmae", sizes=Sizes(img_size=48))
    model = CrossMAE(**ENCODER | DECODER | {"img_size": 48})
    fixed = {name: tensor.clone() for name, tensor in model.state_dict().items() if name.endswith("pos_embed")}
    load(model, tmp_path / "b.safetensors")
    for name, tensor in fixed.items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


# Detectors


def detector(path: Path, window: int = 2) -> dict[str, Tensor]:
    """A detector's file: detectron2's own ViT with relative positions, and something around it."""
    vit = pytest.importorskip("detectron2.modeling.backbone.vit")
    model = vit.ViT(
        img_size=64, patch_size=8, embed_dim=24, depth=3, num_heads=3, window_size=window, window_block_indexes=[0, 2],
        norm_layer=partial(nn.LayerNorm, eps=1e-6), pretrain_img_size=32, use_rel_pos=True,
    )  # fmt: skip
    tensors = {f"backbone.net.{name}": tensor for name, tensor in randomised(model).state_dict().items()}
    torch.save({"model": tensors | {"roi_heads.box_head.fc1.weight": torch.randn(4, 4)}}, path)
    return tensors


def test_the_encoder_of_a_detector(tmp_path: Path) -> None:
    tensors = detector(tmp_path / "a.pth")
    done = convert(tmp_path / "a.pth", tmp_path / "b.pkl", "detectron2", given={"num_heads": 3})
    assert_same(read_weights(tmp_path / "b.pkl").tensors, tensors)
    assert next(entry for entry in done.report.entries if entry.status == "dropped").reason == "outside the encoder"
    assert done.proof.equal
    assert "detectron2's ViT (source)" in done.proof.sentence()


def test_windows_are_resampled(tmp_path: Path) -> None:
    tensors = detector(tmp_path / "a.pth")
    sizes = Sizes(window=4)
    done = convert(tmp_path / "a.pth", tmp_path / "b.pth", "detectron2", sizes=sizes, given={"num_heads": 3})
    kept = read_weights(tmp_path / "b.pth").tensors
    assert kept["backbone.net.blocks.0.attn.rel_pos_h"].shape == (7, 8)
    whole = "backbone.net.blocks.1.attn.rel_pos_w"  # of the global block
    assert torch.equal(kept[whole], tensors[whole])
    assert done.proof.equal


def test_relative_positions_are_not_lost_by_accident(tmp_path: Path) -> None:
    detector(tmp_path / "a.pth")
    before = set(tmp_path.iterdir())
    with pytest.raises(UserError) as error:
        convert(tmp_path / "a.pth", tmp_path / "b", "timm", given={"num_heads": 3})
    assert "the encoder computes something else" in str(error.value)
    assert "--drop" not in str(error.value)
    assert set(tmp_path.iterdir()) == before
    done = convert(
        tmp_path / "a.pth", tmp_path / "b", "timm", given={"num_heads": 3}, drop=(r"blocks\.\d+\.attn\.rel_pos",)
    )
    assert "without blocks.0.attn.rel_pos_h, blocks.0.attn.rel_pos_w, " in done.proof.sentence()
    assert done.proof.equal


# The table, the proof and the report


def test_every_tensor_is_in_the_report_with_its_names(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    source = read_weights(own(tmp_path / "a.safetensors"))
    convert(source.path, tmp_path / "b", "hf-vit")
    record = json.loads((tmp_path / "b.conversion.json").read_text())
    entries = {entry["name"]: entry for entry in record["tensors"]}
    assert entries.keys() == source.tensors.keys() | {"norm.weight", "norm.bias"}
    assert entries["norm.weight"]["status"] == "new"
    assert entries["wfm.linear.weight"]["status"] == "dropped"
    assert [name.split(".")[-2] for name in entries["blocks.0.attn.qkv.weight"]["targets"]] == ["query", "key", "value"]
    back = convert(tmp_path / "b", tmp_path / "c.safetensors", "crossmae")
    joined = next(entry for entry in back.report.entries if entry.name == "blocks.0.attn.qkv.weight")
    assert joined.sources == tuple(entries["blocks.0.attn.qkv.weight"]["targets"])
    assert record["proof"]["equal"] is True
    assert record["metadata"]["source_sha256"] == hashlib.sha256(source.path.read_bytes()).hexdigest()


def test_what_computes_something_else_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(tmp_path / "a.safetensors")
    before = set(tmp_path.iterdir())
    write = TARGETS["timm"].write

    def swapped(path: Path, content: Any) -> Any:
        first, second = "blocks.0.norm1.weight", "blocks.0.norm2.weight"
        content.tensors[first], content.tensors[second] = content.tensors[second], content.tensors[first]
        return write(path, content)

    target = conversion_module.replace(TARGETS["timm"], write=swapped)
    monkeypatch.setitem(TARGETS, "timm", target)
    with pytest.raises(UserError, match=r"computes something else\. The file was deleted"):
        convert(tmp_path / "a.safetensors", tmp_path / "b", "timm")
    assert set(tmp_path.iterdir()) == before


def test_a_missing_library_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(tmp_path / "a.safetensors")
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    done = convert(tmp_path / "a.safetensors", tmp_path / "b", "hf-vit")
    assert not done.proof.ran
    assert "transformers is not installed" in done.proof.sentence()
    assert (tmp_path / "b/model.safetensors").is_file()


# Provenance


def test_provenance_of_the_published_layout(tmp_path: Path) -> None:
    path = published(tmp_path / "a.pth")
    metadata = convert(path, tmp_path / "b.pth", "detectron2", given=HEADS).metadata
    assert metadata == read_weights(tmp_path / "b.pth").metadata | {}
    assert metadata[FORMAT] == "detectron2"
    assert metadata["source_file"] == "a.pth"
    assert metadata["source_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert metadata["source_format"] == "crossmae"
    assert metadata[PIXEL_MEAN] == metadata[PIXEL_STD] == "unknown"
    assert metadata[LICENCE] == NON_COMMERCIAL
    assert "CC BY-NC 4.0" in NON_COMMERCIAL


def test_the_first_source_stays_on_record(tmp_path: Path) -> None:
    first = convert(published(tmp_path / "a.pth"), tmp_path / "b.pkl", "detectron2", given=HEADS)
    second = convert(tmp_path / "b.pkl", tmp_path / "c.safetensors", "detectron2")
    for key in ("file", "sha256", "format"):
        assert second.metadata[f"origin_{key}"] == first.metadata[f"source_{key}"]
    assert second.metadata["source_sha256"] == hashlib.sha256((tmp_path / "b.pkl").read_bytes()).hexdigest()
    assert second.metadata[LICENCE] == first.metadata[LICENCE]
    third = convert(tmp_path / "c.safetensors", tmp_path / "d.pth", "detectron2")
    assert third.metadata["origin_file"] == "a.pth"


def test_licence_of_a_model_card(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    own(tmp_path / "a.safetensors", decoder="self")
    convert(tmp_path / "a.safetensors", tmp_path / "b", "hf-vit")
    weights = read_weights(tmp_path / "b")
    save_weights(tmp_path / "b/model.safetensors", *_names_of(tmp_path / "b/model.safetensors"), force=True)
    assert convert(tmp_path / "b", tmp_path / "c.pth", "mae").metadata[LICENCE] == UNSTATED
    (tmp_path / "b/README.md").write_text("---\nlicense: apache-2.0\ntags: []\n---\nWords.")
    assert "The source says: apache-2.0" in convert(tmp_path / "b", tmp_path / "d.pth", "mae").metadata[LICENCE]
    assert weights.layout == "hf-vit"


def _names_of(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A file's tensors as somebody else would have written them: without our record."""
    from safetensors.torch import load_file

    return load_file(path), {"format": "pt"}


# What is refused


@pytest.mark.parametrize(
    ("destination", "to", "told"),
    [
        ("b.bin", "detectron2", r"b\.bin: .* this suffix. Use \.pth or \.pkl or \.safetensors"),
        ("b.pth", "hf-vit", r"b\.pth: .* this suffix. Use a folder, without a suffix"),
        ("a.pth", "detectron2", "is the source, or a folder that contains it"),
        ("old.pth", "detectron2", "exists already"),
        ("folder", "hf-vit", "exists already"),
        ("b.pth", "onnx", "unknown format. Use one of crossmae, mae, timm"),
    ],
)
def test_refusals_touch_nothing(tmp_path: Path, destination: str, to: str, told: str) -> None:
    published(tmp_path / "a.pth")
    (tmp_path / "old.pth").write_bytes(b"old")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/notes.txt").write_text("mine")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=told):
        convert(tmp_path / "a.pth", tmp_path / destination, to, given=GIVEN)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_force(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    path = published(tmp_path / "a.pth")
    with pytest.raises(UserError, match="is the source, or a folder that contains it"):
        convert(path, path, "crossmae", given=GIVEN, force=True)
    for _ in range(2):
        convert(path, tmp_path / "b", "hf-vit", given=HEADS, force=True)
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == ["config.json", "model.safetensors"]
    (tmp_path / "b/notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"has notes\.txt, which --force would delete"):
        convert(path, tmp_path / "b", "hf-vit", given=HEADS, force=True)
    assert {entry.name for entry in tmp_path.iterdir()} == {"a.pth", "b", "b.conversion.json"}


def test_an_existing_report_is_not_overwritten(tmp_path: Path) -> None:
    path = published(tmp_path / "a.pth")
    (tmp_path / "b.pth.conversion.json").write_text("old")
    with pytest.raises(UserError, match="exists already"):
        convert(path, tmp_path / "b.pth", "crossmae", given=GIVEN)
    assert not (tmp_path / "b.pth").exists()
    convert(path, tmp_path / "b.pth", "crossmae", given=GIVEN, report=tmp_path / "r.json")
    assert (tmp_path / "r.json").is_file()


def test_every_way_to_the_source_is_seen(tmp_path: Path) -> None:
    """Through a link, as a folder that holds it, as a file of the folder that was named, as the report."""
    (tmp_path / "run").mkdir()
    source = own(tmp_path / "run/model.safetensors")
    (tmp_path / "link").symlink_to(tmp_path / "run")
    (tmp_path / "nowhere.pth").symlink_to(tmp_path / "gone")
    before = source.read_bytes()
    for named, destination, to, report in (
        (tmp_path / "run", source, "crossmae", None),
        (tmp_path / "link/model.safetensors", tmp_path / "run", "timm", None),
        (source, tmp_path / "link", "timm", None),
        (source, tmp_path / "b", "timm", source),
        (source, tmp_path / "b", "timm", tmp_path / "b"),
        (source, tmp_path / "b", "timm", tmp_path / "b/config.json"),
        (source, tmp_path / "nowhere.pth", "crossmae", None),
        (source, tmp_path / ("x" * 230), "timm", None),
    ):
        with pytest.raises(UserError, match=r"contains it|--report|a link to a file that does|not a name"):
            convert(named, destination, to, report=report, force=True)
    assert source.read_bytes() == before
    assert {entry.name for entry in tmp_path.iterdir()} == {"run", "link", "nowhere.pth"}


def test_a_failure_between_the_renames_brings_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = own(tmp_path / "a.safetensors")
    convert(source, tmp_path / "b", "timm")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    def interrupted(*_: Path) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(conversion_module, "put_in_place", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, tmp_path / "b", "timm", force=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("destination", ["b.safetensors", "b.pth", "new/folder/b.pth"])
def test_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, destination: str) -> None:
    source = own(tmp_path / "a.safetensors")

    def full(*_: Any, **__: Any) -> None:
        if "safe" in destination:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534")

    monkeypatch.setattr("crossmae.checkpoints.weights.save_file", full)
    monkeypatch.setattr("crossmae.checkpoints.conversion.targets.torch.save", full)
    reason = "No space left on device" if "safe" in destination else ".* unexpected pos 576 vs 534"
    with pytest.raises(UserError, match=rf"^{tmp_path / destination}: cannot be written: {reason} \(.* GB free in "):
        convert(source, tmp_path / destination, "crossmae")
    assert list(tmp_path.iterdir()) == [source]


def test_new_folders_are_made_and_files_can_be_read_by_others(tmp_path: Path) -> None:
    source = own(tmp_path / "a.safetensors")
    done = convert(source, tmp_path / "new/folder/b", "timm", report=tmp_path / "other/r.json")
    assert (tmp_path / "other/r.json").is_file()
    mask = conversion_module.os.umask(0)
    conversion_module.os.umask(mask)
    for file in done.destination.iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~mask


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"drop": ("nonsense",)}, "--drop nonsense: matches no tensor"),
        ({"drop": (r"blocks\.2\.",)}, r"--drop blocks.*matches only tensors that the target has a place for"),
        ({"drop": ("(",)}, "not a regular expression"),
        ({"sizes": Sizes(channels="mean")}, "--channels mean: has no effect"),
        ({"sizes": Sizes(channels="mean", in_chans=3)}, "--channels mean: has no effect"),
        ({"sizes": Sizes(window=4)}, "relative"),
        ({"given": {"norm_pix_loss": False}}, "--set norm_pix_loss: has no effect"),
        ({"given": {"colour": 1}}, "--set colour: unknown model argument"),
    ],
)
def test_no_option_is_ignored(tmp_path: Path, options: dict[str, Any], told: str) -> None:
    source = own(tmp_path / "a.safetensors")
    with pytest.raises(UserError, match=told):
        convert(source, tmp_path / "b", "timm", **options)
    assert list(tmp_path.iterdir()) == [source]


@pytest.mark.parametrize(
    "given",
    [{"num_heads": 6}, {"decoder_num_heads": 4}, {"decoder_depth": 5}, {"decoder": "self"}, {"norm_pix_loss": False}],
)
def test_a_record_is_believed_and_not_what_contradicts_it(tmp_path: Path, given: dict[str, Any]) -> None:
    source = own(tmp_path / "a.safetensors", {MODEL_ARGUMENTS: json.dumps(ENCODER | DECODER | RECORD)})
    with pytest.raises(UserError, match=r"--set .* shows .*Set only what the file lacks"):
        convert(source, tmp_path / "b.pth", "crossmae", given=given)


def test_arguments_that_are_not_those_of_the_tensors(tmp_path: Path) -> None:
    source = own(tmp_path / "a.safetensors", {MODEL_ARGUMENTS: json.dumps(ENCODER | DECODER | {"decoder_depth": 5})})
    with pytest.raises(UserError, match=r"'model' has decoder_depth 5, which its tensors contradict"):
        convert(source, tmp_path / "b.pth", "crossmae")
    convert(source, tmp_path / "b.pth", "crossmae", encoder_only=True)


def test_a_grid_that_looks_square_and_is_not(tmp_path: Path) -> None:
    """4 x 6 patches and a class token have as many rows as 5 x 5 patches without."""
    size = ENCODER | {"img_size": (32, 48)}
    torch.save(ViTEncoder(**size).state_dict(), tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"num_heads"):
        convert(tmp_path / "a.pth", tmp_path / "b", "timm")
    given = {"num_heads": 3, "img_size": [32, 48]}
    convert(tmp_path / "a.pth", tmp_path / "b", "timm", given=given)
    assert read_weights(tmp_path / "b").tensors["pos_embed"].shape == (1, 25, 24)
    with pytest.raises(UserError, match=r"takes square images only.*--img-size"):
        convert(tmp_path / "a.pth", tmp_path / "c.pth", "detectron2", given=given)
    done = convert(tmp_path / "a.pth", tmp_path / "c.pth", "detectron2", given=given, sizes=Sizes(img_size=32))
    assert done.proof.equal
    assert convert(tmp_path / "a.pth", tmp_path / "d", "timm", given=HEADS).report.table().count("row of zeros") == 1


def test_a_converted_classifier_opens(tmp_path: Path) -> None:
    """Also where the source records no pixel statistics."""
    timm = pytest.importorskip("timm")
    model = timm.create_model("vit_small_patch16_224", num_classes=5, **ENCODER).eval()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    convert(tmp_path / "a.pth", tmp_path / "b.safetensors", "crossmae", given=HEADS)
    opened = load_classifier(tmp_path / "b.safetensors")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(opened.model(images), model(images))


def test_registers_are_refused_by_name(tmp_path: Path) -> None:
    tensors = ViTEncoder(**ENCODER).state_dict() | {"reg_token": torch.zeros(1, 4, 24)}
    save_weights(tmp_path / "a.safetensors", tensors, {MODEL_ARGUMENTS: json.dumps(ENCODER)})
    with pytest.raises(
        UserError, match=r"without reg_token \(register tokens, not in a plain ViT\)\. Use weights of a plain ViT"
    ) as error:
        convert(tmp_path / "a.safetensors", tmp_path / "b", "timm")
    assert "--drop" not in str(error.value)
    done = convert(tmp_path / "a.safetensors", tmp_path / "b", "timm", drop=("reg_token",))
    assert "without reg_token" in done.proof.sentence()
