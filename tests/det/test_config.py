"""Configs are read safely, and whatever is wrong with one is an error that names the key."""

import pytest

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

import torch

from crossmae.errors import UserError
from det.config import DetectorKeys, check_config, load_det_config, lookup, split_overrides


@pytest.fixture
def write(tmp_path):
    def _write(text, name="config.yaml"):
        path = tmp_path / name
        path.write_text(text)
        return str(path)

    return _write


@pytest.mark.parametrize("name", ["coco_mask_rcnn.yaml", "coco_mask_rcnn", "demo_mask_rcnn.yaml"])
def test_bare_names_resolve_in_configs(name):
    cfg = load_det_config(name)
    assert cfg.MODEL.BACKBONE.NAME == "build_crossmae_vitdet_backbone"


def test_the_recipe_is_the_published_one():
    """Method specification, section 3.1."""
    cfg = load_det_config("coco_mask_rcnn.yaml")
    vit, solver = cfg.MODEL.VIT, cfg.SOLVER
    assert (vit.EMBED_DIM, vit.DEPTH, vit.NUM_HEADS) == (768, 12, 12)
    assert (vit.WINDOW_SIZE, vit.GLOBAL_BLOCKS) == (14, [2, 5, 8, 11])
    assert (vit.DROP_PATH, vit.SCALE_FACTORS, vit.OUT_CHANNELS, vit.NORM, vit.REL_POS) == (
        0.1, [4, 2, 1, 0.5], 256, "LN", True,
    )  # fmt: skip
    assert (solver.BASE_LR, solver.WEIGHT_DECAY, solver.BETAS, solver.LAYER_DECAY) == (1e-4, 0.1, (0.9, 0.999), 0.7)
    assert (solver.IMS_PER_BATCH, solver.REFERENCE_BATCH, solver.EPOCHS) == (64, 64, 100)
    assert [round(share * 184375) for share in solver.DECAY_AT] == [163889, 177546]
    assert (solver.WARMUP_ITERS, solver.WARMUP_FACTOR, solver.GAMMA) == (250, 0.001, 0.1)
    assert (cfg.INPUT.LSJ.SIZE, cfg.INPUT.LSJ.MIN_SCALE, cfg.INPUT.LSJ.MAX_SCALE) == (1024, 0.1, 2.0)
    assert (cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.INPUT.FORMAT) == (1024, 1024, "RGB")
    assert len(cfg.MODEL.RPN.CONV_DIMS) == 2
    assert (cfg.MODEL.ROI_BOX_HEAD.NUM_CONV, cfg.MODEL.ROI_BOX_HEAD.NUM_FC) == (4, 1)
    assert cfg.MODEL.ROI_BOX_HEAD.NORM == cfg.MODEL.ROI_MASK_HEAD.NORM == "LN"


def test_overrides_mix_both_forms(write):
    path = write("SOLVER: {MAX_ITER: 7}")
    words = ["SOLVER.BASE_LR", "1", "SOLVER.STEPS=(3, 5)", "MODEL.MASK_ON", "true"]
    words += ["OUTPUT_DIR=a=b", "MODEL.WEIGHTS", "1"]
    cfg = load_det_config(path, words)
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR, cfg.SOLVER.STEPS, cfg.MODEL.MASK_ON) == (7, 1.0, (3, 5), True)
    assert (cfg.OUTPUT_DIR, cfg.MODEL.WEIGHTS) == ("a=b", "1"), "text keys take their value as it is"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SOLVER.BASE_LR"], "SOLVER.BASE_LR has no value"),
        (["0.1"], "'0.1' is no setting. Write KEY VALUE or KEY=VALUE"),
        (["SOLVER.BASE_RL=1"], r"unknown key SOLVER.BASE_RL. Did you mean SOLVER.BASE_LR\?"),
        (["SOLVER.MAX_ITER=1.5"], "SOLVER.MAX_ITER cannot be '1.5'. Use a value of type int, such as 40000"),
        (["SOLVER.MAX_ITER=none"], "SOLVER.MAX_ITER cannot be 'none'. Use a value of type int"),
        (["SOLVER=1"], "SOLVER is a section, not a key"),
        (["SOLVER.BASE_LR.X=1"], "unknown key SOLVER.BASE_LR.X"),
        (["SOLVER.IMS_PER_BATCH=0"], "SOLVER.IMS_PER_BATCH: 0 is not allowed. It must be at least 1"),
        (["SOLVER.LAYER_DECAY=1.5"], "SOLVER.LAYER_DECAY: 1.5 is not allowed. It must be greater than 0 and at most 1"),
        (
            ["MODEL.VIT.GLOBAL_BLOCKS=[3,12]"],
            r"MODEL.VIT.GLOBAL_BLOCKS: there is no block \[12\]. The last block is 11",
        ),
        (["INPUT.LSJ.MIN_SCALE=3.0"], "INPUT.LSJ.MIN_SCALE: 3.0 is more than INPUT.LSJ.MAX_SCALE 2.0"),
        (["INPUT.LSJ.ENABLED=True", "INPUT.CROP.ENABLED=True"], "large-scale jitter crops already. Set INPUT.CROP"),
        (
            ["INPUT.RANDOM_FLIP=horizontl"],
            "INPUT.RANDOM_FLIP: 'horizontl' is not allowed. It must be none, horizontal or vertical",
        ),
        (["DATALOADER.ASPECT_RATIO_GROUPING=True"], "DATALOADER.ASPECT_RATIO_GROUPING: .* It must be False"),
        (["SEED=-1"], "SEED: .* It must be at least 0"),
        (["OUTPUT_DIR="], "OUTPUT_DIR: '' is not allowed. It must be a folder"),
        (["SOLVER.DECAY_AT=('a',)"], "SOLVER.DECAY_AT: .* It must be rising shares of 1"),
        (["SOLVER.STEPS=(5,3)"], "SOLVER.STEPS: .* It must be rising"),
        (["SOLVER.BETAS=(2.0,3.0)"], "SOLVER.BETAS: .* It must be two numbers from 0 to below 1"),
        (["TEST.MAX_DETS=99"], "TEST.MAX_DETS: 99 is not allowed. It must be at least 100"),
        (["TEST.PRECISION=fp16"], "TEST.PRECISION: 'fp16' is not allowed. It must be fp32, bf16 or tf32"),
        (["TEST.AUG.ENABLED=True"], "TEST.AUG.ENABLED: .* It must be False"),
        (["SOLVER.AMP.PRECISION=fp8"], "SOLVER.AMP.PRECISION: 'fp8' is not allowed. It must be bf16 or fp16"),
        (["SOLVER.BASE_LR=1e999"], "SOLVER.BASE_LR: inf is not allowed. It must be greater than 0"),
        (
            ["MODEL.PIXEL_STD=[1,1,0]"],
            r"MODEL.PIXEL_STD: \[1, 1, 0\] is not allowed. It must be three numbers greater than 0",
        ),
        (["DATASETS.TEST=('a','b')"], r"DATASETS.TEST: \('a', 'b'\) is not allowed. It must be at most one data set"),
        (["MODEL.VIT.SQUARE_PAD_TEST=1344", "INPUT.MIN_SIZE_TEST=0"], "INPUT.MIN_SIZE_TEST 0 resizes no image"),
        (["INPUT.MIN_SIZE_TRAIN=(0,)"], r"INPUT.MIN_SIZE_TRAIN: \(0,\) is not allowed. It must be pixels, at least 1"),
        (["MODEL.DEVICE=foo"], "MODEL.DEVICE: 'foo' is not allowed. It must be cpu, cuda, cuda:N or mps"),
        (["MODEL.VIT.SQUARE_PAD=1340"], "MODEL.VIT.SQUARE_PAD: 1340 does not fit the patches. Use a multiple of 16"),
        (["MODEL.VIT.SQUARE_PAD=1024"], "SQUARE_PAD: images of INPUT.MAX_SIZE_TRAIN 1333 do not fit into 1024"),
        (
            ["MODEL.VIT.SQUARE_PAD_TEST=1024"],
            "SQUARE_PAD_TEST: images of INPUT.MAX_SIZE_TEST 1333 do not fit into 1024",
        ),
        (["MODEL.VIT.SQUARE_PAD=512", "INPUT.LSJ.ENABLED=True"], "images of INPUT.LSJ.SIZE 1024 do not fit into 512"),
    ],
)
def test_bad_overrides_name_the_key(write, words, message):
    with pytest.raises(UserError, match=message):
        load_det_config(write("SOLVER: {MAX_ITER: 40000}"), words)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("SOLVER: {BASE_RL: 1}", r"config.yaml: unknown key SOLVER.BASE_RL. Did you mean SOLVER.BASE_LR\?"),
        ("SOLVER: {MAX_ITER: {A: 1}}", "config.yaml: unknown key SOLVER.MAX_ITER.A. Did you mean SOLVER.MAX_ITER"),
        ("SOLVER: [", "config.yaml: not valid YAML"),
        ("OUTPUT_DIR: !!python/object/apply:os.getcwd []", "config.yaml: not valid YAML"),
        ("_BASE_: https://example.org/x.yaml", "_BASE_ 'https://example.org/x.yaml' is no file"),
        ("_BASE_: config.yaml", "_BASE_ leads back to the file itself"),
    ],
)
def test_bad_files_are_refused_and_run_nothing(write, text, message):
    with pytest.raises(UserError, match=message):
        load_det_config(write(text))


def test_a_base_file_is_overlaid(write):
    write("SOLVER: {MAX_ITER: 5, BASE_LR: 1e-3}", "base.yaml")
    cfg = load_det_config(write("_BASE_: base.yaml\nSOLVER: {MAX_ITER: 6}"))
    assert (cfg.SOLVER.MAX_ITER, cfg.SOLVER.BASE_LR) == (6, 1e-3)


def test_steps_of_a_later_layer_count_before_epochs_of_an_earlier_one(write, caplog):
    caplog.set_level("INFO")
    base = write("SOLVER: {EPOCHS: 5, DECAY_AT: [0.5]}\nTEST: {EVAL_EPOCHS: 1}", "base.yaml")
    above = write("_BASE_: base.yaml\nSOLVER: {MAX_ITER: 7, STEPS: [3]}", "above.yaml")
    cfg = load_det_config(above)
    assert (cfg.SOLVER.EPOCHS, cfg.SOLVER.DECAY_AT, cfg.TEST.EVAL_EPOCHS) == (0, (), 1)
    cfg = load_det_config(base, ["SOLVER.MAX_ITER=7", "TEST.EVAL_PERIOD=2"])
    assert (cfg.SOLVER.EPOCHS, cfg.SOLVER.DECAY_AT, cfg.TEST.EVAL_EPOCHS) == (0, (0.5,), 0)
    assert "SOLVER.MAX_ITER on the command line replaces SOLVER.EPOCHS" in caplog.text
    with pytest.raises(UserError, match=r"command line: SOLVER.MAX_ITER and SOLVER.EPOCHS contradict each other"):
        load_det_config(base, ["SOLVER.MAX_ITER=7", "SOLVER.EPOCHS=2"])
    assert load_det_config(write("_BASE_: base.yaml\nSOLVER: {MAX_ITER: 7, EPOCHS: 3}")).SOLVER.EPOCHS == 3


def test_a_missing_file_lists_what_there_is():
    with pytest.raises(UserError, match=r"coco_mask_rcnn\.yaml"):
        load_det_config("coco_mask_rcn.yaml")


def test_without_a_gpu_the_default_device_falls_back_and_an_asked_one_is_an_error(write, monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    caplog.set_level("INFO")
    path = write("SOLVER: {AMP: {ENABLED: true}}")
    cfg = load_det_config(path)
    assert cfg.MODEL.DEVICE == "cpu"
    assert not cfg.SOLVER.AMP.ENABLED
    assert "no GPU found: MODEL.DEVICE is cpu" in caplog.text
    assert "SOLVER.AMP.ENABLED is False" in caplog.text
    with pytest.raises(UserError, match=r"MODEL.DEVICE: torch finds no GPU for cuda"):
        load_det_config(path, ["MODEL.DEVICE", "cuda"])


def test_apples_gpu_is_taken_where_torch_has_it(write, monkeypatch):
    """Not run on one."""
    path = write("SOLVER: {AMP: {ENABLED: true}}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^MODEL.DEVICE: torch has no mps here, .* Use MODEL.DEVICE=cpu"):
        load_det_config(path, ["MODEL.DEVICE=mps"])
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    cfg = load_det_config(path, ["MODEL.DEVICE=mps"])
    assert cfg.MODEL.DEVICE == "mps"
    assert not cfg.SOLVER.AMP.ENABLED


def test_a_gpu_of_a_higher_number_than_there_are_is_named(write, monkeypatch):
    path = write("SOLVER: {MAX_ITER: 1}")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert load_det_config(path, ["MODEL.DEVICE=cuda:1"]).MODEL.DEVICE == "cuda:1"
    with pytest.raises(UserError, match=r"MODEL.DEVICE: there is no cuda:9. The last GPU is cuda:1"):
        load_det_config(path, ["MODEL.DEVICE=cuda:9"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"MODEL.DEVICE: torch finds no GPU for cuda:9"):
        load_det_config(path, ["MODEL.DEVICE=cuda:9"])


def test_split_overrides_takes_values_that_look_like_keys():
    assert split_overrides(["A.B", "C=1", "D=E=F"]) == [("A.B", "C=1"), ("D", "E=F")]


def test_detections_that_the_detector_does_not_return_cannot_count(caplog):
    load_det_config("demo_mask_rcnn.yaml", ["TEST.MAX_DETS=150", "TEST.DETECTIONS_PER_IMAGE=150"])
    assert "TEST.MAX_DETS" not in caplog.text
    load_det_config("demo_mask_rcnn.yaml", ["TEST.MAX_DETS=150"])
    assert "TEST.DETECTIONS_PER_IMAGE 20 is less than TEST.MAX_DETS 150" in caplog.text


def numbers_of(keys, prefix=""):
    """(dotted key, annotation) of each key that holds numbers, sections included."""
    for name, field in keys.model_fields.items():
        if hasattr(field.annotation, "model_fields"):
            yield from numbers_of(field.annotation, f"{prefix}{name}.")
        elif any(word in str(field.annotation) for word in ("int", "float")):
            yield f"{prefix}{name}", field


@pytest.mark.parametrize("key", [key for key, _ in numbers_of(DetectorKeys)])
def test_every_number_has_a_range(key):
    """A number far below any range is refused, in lists as well."""
    cfg = load_det_config("demo_mask_rcnn.yaml")
    *sections, last = key.split(".")
    node = lookup(cfg, ".".join(sections)) if sections else cfg
    default = node[last]

    def low(value):
        return type(value)(map(low, value)) if isinstance(value, (list, tuple)) else -(10**9)

    node[last] = low(default) if not isinstance(default, (list, tuple)) or default else type(default)([-(10**9)])
    if key == "MODEL.PIXEL_MEAN":  # any finite number
        node[last] = [float("nan")] * 3
    with pytest.raises(UserError, match=rf"{key}: "):
        check_config(cfg)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["TEST.DETECTIONS_PER_IMAGE=-1"], "TEST.DETECTIONS_PER_IMAGE: -1 is not allowed. It must be at least 1"),
        (["INPUT.MIN_SIZE_TRAIN=()"], "INPUT.MIN_SIZE_TRAIN: .* It must be pixels, at least 1"),
        (["SOLVER.IMS_PER_BATCH=" + "(" * 100_000], "SOLVER.IMS_PER_BATCH cannot be"),
        (["SOLVER.IMS_PER_BATCH=" + "-" * 100_000 + "1"], "SOLVER.IMS_PER_BATCH cannot be"),
        (["SOLVER.IMS_PER_BATCH=" + "1+" * 100_000 + "1"], "SOLVER.IMS_PER_BATCH cannot be"),
        (["SOLVER.BASE_LR=" + "9" * 4000], "SOLVER.BASE_LR cannot be"),
        (["SEED=4294967296"], r"SEED: 4294967296 is not allowed. It must be at least 0 and less than 2\*\*32"),
        (["OUTPUT_DIR=${UNSET}/x"], r"OUTPUT_DIR: \$\{UNSET\}/x: the variable \$\{UNSET\} was not expanded"),
        (["OUTPUT_DIR=~nobody-here/x"], "OUTPUT_DIR: .* the home folder ~nobody-here is unknown"),
        (["MODEL.RPN.IOU_THRESHOLDS=[0.7]"], "MODEL.RPN.IOU_LABELS: .* Give 2 labels"),
        (["MODEL.VIT.NUM_HEADS=5"], "MODEL.VIT.NUM_HEADS: 5 does not divide MODEL.VIT.EMBED_DIM"),
        (["INPUT.MIN_SIZE_TRAIN_SAMPLING=range", "INPUT.MIN_SIZE_TRAIN=(1,2,3)"], "INPUT.MIN_SIZE_TRAIN: .* no range"),
        (["INPUT.CROP.SIZE=[300.0,300.0]"], "INPUT.CROP.SIZE: .* Give two of at most 1"),
    ],
)
def test_odd_values_end_in_a_short_line(words, message):
    with pytest.raises(UserError, match=message) as error:
        load_det_config("demo_mask_rcnn.yaml", words)
    assert len(str(error.value)) < 500
