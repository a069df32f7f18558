"""Weights load strictly: every tensor of file and model is used, or on a short list, or the load fails with a table."""

import json

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.modeling import build_model
from safetensors.torch import save_file

from crossmae import CrossMAE
from crossmae.checkpoints import convert
from crossmae.checkpoints.provenance import inherited
from crossmae.checkpoints.reading.files import find_file
from crossmae.checkpoints.weights import read_weights
from crossmae.errors import UserError
from det.backbone.weights import build_detector, check_detector, find_detector, load_weights, open_weights
from det.inference.arguments import read_config
from det.training.checkpoint import write_detector
from tools import evaluate

ENCODER = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
DECODER = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
METADATA = {
    "pixel_mean": json.dumps([0.485, 0.456, 0.406]),
    "pixel_std": json.dumps([0.229, 0.224, 0.225]),
    "model": json.dumps(ENCODER),
}


def random_model(**arguments):
    torch.manual_seed(3)
    model = CrossMAE(**ENCODER | DECODER | arguments)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def write(path, tensors, metadata=METADATA):
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata)
    return str(path)


def encoder_of(model):
    keep = ("pos_embed", "patch_embed.", "blocks.")
    return {key: tensor for key, tensor in model.state_dict().items() if key.startswith(keep)}


def assert_loaded(detector, encoder):
    state = detector.backbone.net.state_dict()
    for name, tensor in state.items():
        if name in encoder:
            assert torch.equal(tensor, encoder[name]), name
        else:
            assert name.endswith(("rel_pos_h", "rel_pos_w"))
            assert not tensor.any()


def test_a_detector_of_another_number_of_classes_starts_a_training_but_is_not_evaluated(tmp_path, cfg, caplog):
    torch.manual_seed(0)
    trained = build_model(cfg)
    (tmp_path / "run").mkdir()
    torch.save({"model": trained.state_dict()}, tmp_path / "run/model_best.pth")
    cfg.MODEL.WEIGHTS, cfg.MODEL.ROI_HEADS.NUM_CLASSES = str(tmp_path / "run"), 7
    torch.manual_seed(1)
    detector = build_model(cfg)
    with pytest.raises(UserError, match=r"model_best\.pth: has 3 classes, not MODEL\.ROI_HEADS\.NUM_CLASSES 7\. Set"):
        load_weights(detector, cfg, detector_only=True)
    report = load_weights(detector, cfg)
    assert "is for 3 classes: the last layers of the heads start from random weights" in caplog.text
    assert {name.rpartition(".")[0] for name in report.names("new")} == {
        "roi_heads.box_predictor.cls_score", "roi_heads.box_predictor.bbox_pred", "roi_heads.mask_head.predictor",
    }  # fmt: skip
    for name, tensor in trained.state_dict().items():
        if name not in report.names("new"):
            assert torch.equal(detector.state_dict()[name], tensor), name


def test_a_detector_with_other_settings_than_its_own_config_is_warned_of(tmp_path, cfg, caplog):
    torch.save({"model": build_model(cfg).state_dict()}, tmp_path / "model_final.pth")
    (tmp_path / "config.yaml").write_text(cfg.dump())
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    load_weights(build_model(cfg), cfg, detector_only=True)
    assert not [one for one in caplog.records if one.levelname == "WARNING"]
    cfg.INPUT.FORMAT, cfg.MODEL.VIT.POS_EMBED = "BGR", "tiled"
    load_weights(build_model(cfg), cfg, detector_only=True)
    assert "INPUT.FORMAT is BGR, but the detector was trained with RGB" in caplog.text
    assert "MODEL.VIT.POS_EMBED is tiled, but the detector was trained with resize" in caplog.text


def test_the_folder_of_a_run_means_its_best_then_its_last_weights(tmp_path):
    """A final file that is not the last is of before the run was prolonged."""
    assert find_detector(tmp_path) == tmp_path
    (tmp_path / "model_final.pth").touch()
    assert find_detector(tmp_path) == tmp_path / "model_final.pth"
    (tmp_path / "model_0000003.pth").touch()
    (tmp_path / "last_checkpoint").write_text("model_0000003.pth")
    assert find_detector(tmp_path) == tmp_path / "model_0000003.pth"
    (tmp_path / "model_best.pth").touch()
    assert find_detector(tmp_path) == tmp_path / "model_best.pth"
    (tmp_path / "model_final.safetensors").touch()  # an earlier version's run that was prolonged
    assert find_detector(tmp_path) == tmp_path / "model_best.pth"
    (tmp_path / "model_best.safetensors").touch()
    assert find_detector(tmp_path) == tmp_path / "model_best.safetensors"


def write_pipeline(folder, *names):
    """Write the folder of tools/run.py after some stages, with a tiny encoder and empty detectors."""
    (folder / "data").mkdir(parents=True)
    (folder / "pipeline.json").write_text("{}")
    for name in names:
        (folder / name).mkdir()
        if name == "pretrain":
            write(folder / name / "model.safetensors", random_model().state_dict())
        else:
            (folder / name / "model_best.safetensors").touch()


def test_a_folder_of_the_pipeline_means_its_detector_or_its_pretraining(tmp_path):
    run = tmp_path / "run"
    write_pipeline(run, "pretrain", "detect-own")
    assert find_detector(run) == run / "detect-own/model_best.safetensors"
    weights = open_weights(str(run), detector_only=False)  # for training
    assert weights.path == run / "pretrain/model.safetensors"
    assert find_file(run) == run / "pretrain/model.safetensors"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((), r"run: a folder of tools/run\.py without a detector yet, with data\. Repeat its command, which continues"),
        (("pretrain",), r"without a detector yet, with data and pretrain\. Repeat"),
        (("pretrain", "detect-random"), r"run: a folder of tools/run\.py --compare, with detect-random\. Name one"),
        (("detect-own", "detect-random"), r"with detect-own and detect-random\. Name one, such as .*run/detect-own\."),
    ],
    ids=["nothing", "pretrained", "first of two", "two"],
)
def test_a_pipeline_without_exactly_one_detector_tells_what_is_there(tmp_path, names, message):
    write_pipeline(tmp_path / "run", *names)
    for call in (find_detector, check_detector):
        with pytest.raises(UserError, match=message):
            call(tmp_path / "run")
    with pytest.raises(UserError, match=f"^--weights: .*{message}"):
        read_config(None, tmp_path / "run", key="--weights")
    with pytest.raises(UserError, match=f"^RUN: .*{message}"):
        evaluate.main([str(tmp_path / "run"), "labels.json", "--images", "images"])


def test_a_pipeline_without_weights_tells_what_is_there(tmp_path):
    write_pipeline(tmp_path / "run", "detect-own")
    message = r"without pretrained weights yet, with data and detect-own\. Repeat its command, which continues"
    with pytest.raises(UserError, match=message):
        find_file(tmp_path / "run")
    with pytest.raises(UserError, match=f"MODEL.WEIGHTS: .*{message}"):
        open_weights(str(tmp_path / "run"), detector_only=False)


def test_a_detector_that_can_not_be_built_names_the_section(cfg):
    cfg.MODEL.ROI_HEADS.NAME = "NoHeads"
    with pytest.raises(UserError, match=r"MODEL: the detector cannot be built. .*NoHeads"):
        build_detector(cfg)


def test_a_pretraining_checkpoint_loads_directly(tmp_path, cfg):
    pretrained = random_model()
    cfg.MODEL.WEIGHTS = write(tmp_path / "model.safetensors", pretrained.state_dict())
    detector = build_model(cfg)
    report = load_weights(detector, cfg)
    assert_loaded(detector, encoder_of(pretrained))
    assert report.count("used") == len(encoder_of(pretrained)) == 3 + 2 * 12
    assert sorted(report.names("new")) == sorted(f"blocks.{i}.attn.rel_pos_{axis}" for i in (0, 1) for axis in "hw")
    assert "cls_token" in report.names("dropped")


def test_a_file_of_the_published_layout_loads_directly(tmp_path, cfg):
    pretrained = random_model(decoder="self")
    cfg.MODEL.WEIGHTS = str(tmp_path / "published.pth")
    torch.save({"model": pretrained.state_dict(), "epoch": 799}, cfg.MODEL.WEIGHTS)
    detector = build_model(cfg)
    load_weights(detector, cfg)
    assert_loaded(detector, encoder_of(pretrained))


def test_a_converted_file_of_the_published_layout_loads_though_its_pixel_statistics_are_unknown(tmp_path, cfg):
    pretrained = random_model(decoder="self")
    torch.save({"model": pretrained.state_dict()}, tmp_path / "published.pth")
    converted = tmp_path / "converted.pth"
    given = {"num_heads": pretrained.blocks[0].attn.num_heads}
    convert(tmp_path / "published.pth", converted, "detectron2", given=given)
    assert read_weights(converted).metadata["pixel_mean"] == "unknown"
    cfg.MODEL.WEIGHTS = str(converted)
    detector = build_model(cfg)
    load_weights(detector, cfg)
    assert_loaded(detector, encoder_of(pretrained))


def test_a_detector_loads_whole(tmp_path, cfg):
    torch.manual_seed(5)
    trained = build_model(cfg)
    cfg.MODEL.WEIGHTS = str(tmp_path / "model_final.pth")
    torch.save({"model": trained.state_dict(), "iteration": 3}, cfg.MODEL.WEIGHTS)
    torch.manual_seed(6)
    detector = build_model(cfg)
    load_weights(detector, cfg, detector_only=True)
    for name, tensor in trained.state_dict().items():
        assert torch.equal(detector.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"embed_dim": 32}, "MODEL.VIT.EMBED_DIM 24 does not fit .* Set MODEL.VIT.EMBED_DIM=32"),
        ({"depth": 3}, "MODEL.VIT.DEPTH 2 does not fit .* Set MODEL.VIT.DEPTH=3"),
        ({"patch_size": 4}, "MODEL.VIT.PATCH_SIZE 8 does not fit .* Set MODEL.VIT.PATCH_SIZE=4"),
        ({"img_size": 64}, "MODEL.VIT.PRETRAIN_IMG_SIZE 32 does not fit .* Set MODEL.VIT.PRETRAIN_IMG_SIZE=64"),
        ({"mlp_ratio": 2.0}, "MODEL.VIT.MLP_RATIO 4.0 does not fit .* Set MODEL.VIT.MLP_RATIO=2.0"),
        ({"num_heads": 4}, "MODEL.VIT.NUM_HEADS 2 does not fit .* Set MODEL.VIT.NUM_HEADS=4"),
    ],
)
def test_another_architecture_names_the_key_and_its_value(tmp_path, cfg, arguments, message):
    metadata = METADATA | {"model": json.dumps(ENCODER | arguments)}
    cfg.MODEL.WEIGHTS = write(tmp_path / "model.safetensors", random_model(**arguments).state_dict(), metadata)
    with pytest.raises(UserError, match=message) as error:
        load_weights(build_model(cfg), cfg)
    assert "MODEL.WEIGHTS" in str(error.value)
    assert cfg.MODEL.WEIGHTS in str(error.value)


@pytest.mark.parametrize(
    ("change", "row"),
    [
        (lambda tensors: tensors.pop("blocks.1.mlp.fc2.weight"), r"! new +blocks\.1"),
        (lambda tensors: tensors.update({"blocks.0.q_norm.weight": torch.ones(24)}), r"! dropped +blocks\.0"),
        (lambda tensors: tensors.update({"blocks.0.norm1.bias": torch.ones(23)}), r"! mismatched +blocks\.0"),
    ],
    ids=["missing", "left over", "another shape"],
)
def test_a_load_that_matches_less_than_it_should_is_an_error_with_a_table(tmp_path, cfg, change, row):
    tensors = random_model().state_dict()
    change(tensors)
    cfg.MODEL.WEIGHTS = write(tmp_path / "model.safetensors", tensors)
    detector = build_model(cfg)
    before = {name: tensor.clone() for name, tensor in detector.state_dict().items()}
    with pytest.raises(UserError, match=row):
        load_weights(detector, cfg)
    assert all(torch.equal(tensor, before[name]) for name, tensor in detector.state_dict().items())


def test_evaluation_needs_a_whole_detector(tmp_path, cfg):
    detector = build_model(cfg)
    with pytest.raises(UserError, match=r"MODEL.WEIGHTS is empty. Name a trained detector"):
        load_weights(detector, cfg, detector_only=True)
    cfg.MODEL.WEIGHTS = write(tmp_path / "model.safetensors", random_model().state_dict())
    with pytest.raises(UserError, match=r"a CrossMAE pretraining model, encoder and decoder, not a detector"):
        load_weights(detector, cfg, detector_only=True)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("MODEL", "PIXEL_MEAN", [103.53, 116.28, 123.675]), r"Set MODEL.PIXEL_MEAN=\[123.675, 116.28, 103.53\]"),
        (("MODEL", "PIXEL_STD", [1.0, 1.0, 1.0]), r"Set MODEL.PIXEL_STD=\[58.395, 57.12, 57.375\]"),
        (("INPUT", "FORMAT", "BGR"), "RGB, not BGR. Set INPUT.FORMAT=RGB"),
    ],
)
def test_other_pixels_than_in_pretraining_are_refused(tmp_path, cfg, override, message):
    section, key, value = override
    cfg[section][key] = value
    cfg.MODEL.WEIGHTS = write(tmp_path / "model.safetensors", random_model().state_dict())
    with pytest.raises(UserError, match=message):
        load_weights(build_model(cfg), cfg)


@pytest.mark.parametrize(
    ("path", "message"),
    [("nowhere.pth", "MODEL.WEIGHTS: .*nowhere.pth"), ("https://example.org/x.pth", "is a URL. Download the file")],
)
def test_files_that_are_not_there_are_named(cfg, path, message):
    cfg.MODEL.WEIGHTS = path
    with pytest.raises(UserError, match=message):
        load_weights(build_model(cfg), cfg)


def test_what_the_file_does_not_tell_is_logged_with_its_key_and_stays_with_the_detector(tmp_path, cfg, caplog):
    torch.save({"model": encoder_of(random_model())}, tmp_path / "bare.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "bare.pth")
    detector = build_model(cfg)
    report = load_weights(detector, cfg)
    assert set(report.assumed) == {"num_heads", "img_size", "norm_eps", "activation"}
    heads = "num_heads: 2 is assumed from the model's settings, the file does not tell. Set MODEL.VIT.NUM_HEADS="
    assert f"MODEL.WEIGHTS: {heads}" in caplog.text
    assert "pixel_mean: [123.675, 116.28, 103.53] is assumed from the config" in caplog.text
    (tmp_path / "run").mkdir()
    metadata = inherited(None, report.assumed)
    write_detector(tmp_path / "run/model_final.safetensors", detector.state_dict(), metadata, 1)
    caplog.clear()
    cfg.MODEL.WEIGHTS = str(tmp_path / "run/model_final.safetensors")
    again = load_weights(build_model(cfg), cfg, detector_only=True)
    assert set(again.assumed) == set(report.assumed)
    assert (
        "num_heads: 2 is assumed since pretraining, the file does not tell. Train it again with MODEL.VIT"
        in caplog.text
    )


def test_several_class_tokens_are_dropped_like_one(tmp_path, cfg):
    pretrained = random_model(class_tokens=4)
    metadata = METADATA | {"model": json.dumps(ENCODER | {"class_tokens": 4})}
    cfg.MODEL.WEIGHTS = write(tmp_path / "model.safetensors", pretrained.state_dict(), metadata)
    detector = build_model(cfg)
    report = load_weights(detector, cfg)
    assert_loaded(detector, encoder_of(pretrained))
    assert "cls_token" in report.names("dropped")
