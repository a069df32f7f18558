"""Layer decay and weight decay per parameter; the learning rate rule and epochs in steps."""

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler

from det.config import load_det_config
from det.training.optimizer import build_optimizer, parameter_groups, resolve_schedule


def test_layer_decay_gives_each_parameter_its_rate_once():
    cfg = load_det_config("coco_mask_rcnn.yaml", ["MODEL.DEVICE=cpu", "SOLVER.BASE_LR=1e-4"])
    model = build_model(cfg)
    groups = parameter_groups(cfg, model)
    found = {id(p): (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(found) == len(trainable)
    expected = {
        "backbone.net.pos_embed": (1e-4 * 0.7**13, 0.0),
        "backbone.net.patch_embed.proj.weight": (1e-4 * 0.7**13, 0.1),
        "backbone.net.blocks.0.attn.qkv.weight": (1e-4 * 0.7**12, 0.1),
        "backbone.net.blocks.0.attn.rel_pos_h": (1e-4 * 0.7**12, 0.0),
        "backbone.net.blocks.0.norm1.weight": (1e-4 * 0.7**12, 0.0),
        "backbone.net.blocks.11.mlp.fc2.bias": (1e-4 * 0.7, 0.1),
        "backbone.simfp_2.0.weight": (1e-4, 0.1),
        "backbone.simfp_2.1.weight": (1e-4, 0.0),
        "proposal_generator.rpn_head.conv.conv0.weight": (1e-4, 0.1),
        "roi_heads.box_head.conv1.norm.bias": (1e-4, 0.0),
        "roi_heads.box_predictor.cls_score.weight": (1e-4, 0.1),
    }
    for name, values in expected.items():
        assert found[id(trainable[name])] == pytest.approx(values), name
    for name, parameter in trainable.items():
        if ".norm" in name or name.endswith("pos_embed"):
            assert found[id(parameter)][1] == 0, name


def test_positions_decay_only_if_asked_to():
    words = ["MODEL.DEVICE=cpu", "SOLVER.WEIGHT_DECAY_POS=0.3", "MODEL.VIT.POS_EMBED=absolute_win", "MODEL.VIT.DEPTH=1"]
    cfg = load_det_config("coco_mask_rcnn.yaml", [*words, "MODEL.VIT.GLOBAL_BLOCKS=[0]"])
    model = build_model(cfg)
    decays = {id(p): group["weight_decay"] for group in parameter_groups(cfg, model) for p in group["params"]}
    found = {name for name, p in model.named_parameters() if decays[id(p)] == 0.3}
    assert {name.rpartition(".")[2] for name in found} == {"pos_embed", "pos_embed_global", "rel_pos_h", "rel_pos_w"}


@pytest.fixture
def cfg(tmp_path):
    def load(**solver):
        (tmp_path / "c.yaml").write_text("MODEL: {DEVICE: cpu}")
        return load_det_config(str(tmp_path / "c.yaml"), [f"SOLVER.{key}={value}" for key, value in solver.items()])

    return load


@pytest.mark.parametrize(
    ("batch", "expected"),
    [(64, 1e-4), (16, 2.5e-5), (4, 6.25e-6), (128, 2e-4)],
)
def test_the_learning_rate_follows_the_batch_linearly(cfg, caplog, batch, expected):
    caplog.set_level("INFO")
    given = cfg(IMS_PER_BATCH=batch, BASE_LR=1e-4, REFERENCE_BATCH=64, ACCUMULATE=2)
    resolved = resolve_schedule(given, 1000)
    assert pytest.approx(expected) == resolved.SOLVER.BASE_LR
    assert given.SOLVER.BASE_LR == 1e-4
    assert f"learning rate {expected:.3g} (= 0.0001 x {batch} / 64)" in caplog.text
    assert resolve_schedule(resolved, 1000).SOLVER.BASE_LR == resolved.SOLVER.BASE_LR
    assert resolve_schedule(cfg(IMS_PER_BATCH=batch, BASE_LR=1e-4), 1000).SOLVER.BASE_LR == 1e-4


def test_epochs_and_shares_become_steps(cfg, caplog):
    """The published run: 100 epochs of the 118,000 images that its authors count with, in batches of 64."""
    caplog.set_level("INFO")
    given = cfg(IMS_PER_BATCH=64, EPOCHS=100, DECAY_AT="(0.88889,0.96296)", WARMUP_ITERS=250, LAYER_DECAY=0.7)
    solver = resolve_schedule(given, 118_000).SOLVER
    assert (solver.MAX_ITER, solver.WARMUP_ITERS) == (184_375, 250)
    assert pytest.approx((163_889, 177_546), abs=2) == solver.STEPS
    assert "184,375 steps of 64 images: 100 epochs of 118,000 images" in caplog.text
    assert "x 0.1 after step 163,8" in caplog.text
    given.TEST.EVAL_EPOCHS = 5.0
    resolved = resolve_schedule(given, 118_000)
    assert round(5 * 118_000 / 64) == resolved.TEST.EVAL_PERIOD
    assert resolved.SOLVER.CHECKPOINT_PERIOD == given.SOLVER.CHECKPOINT_PERIOD == 5000  # which is more often
    given.TEST.EVAL_EPOCHS = 1.0
    assert round(118_000 / 64) == resolve_schedule(given, 118_000).SOLVER.CHECKPOINT_PERIOD


def test_warm_up_ends_before_the_rate_falls(cfg):
    """Else detectron2 would warm up to the rate that is due then, and never reach BASE_LR."""
    resolved = resolve_schedule(cfg(MAX_ITER=100, DECAY_AT="(0.88,0.96)", WARMUP_ITERS=250, BASE_LR=0.1), 100)
    optimizer = build_optimizer(resolved, torch.nn.Linear(1, 1))
    scheduler = build_lr_scheduler(resolved, optimizer)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert max(rates) == pytest.approx(0.1)


def test_a_short_run_warms_up_for_a_tenth_of_it_and_drops_steps_beyond_its_end(cfg):
    solver = resolve_schedule(cfg(IMS_PER_BATCH=4, EPOCHS=2, WARMUP_ITERS=250, STEPS="(10,600)"), 100).SOLVER
    assert (solver.MAX_ITER, solver.WARMUP_ITERS, solver.STEPS) == (50, 5, (10,))
    assert resolve_schedule(cfg(IMS_PER_BATCH=16, EPOCHS=0.001), 100).SOLVER.MAX_ITER == 1
    assert resolve_schedule(cfg(MAX_ITER=4, DECAY_AT="(0.5,0.55)"), 100).SOLVER.STEPS == (2,)


def test_the_rate_of_every_step_is_the_rules(cfg):
    """Linear warm-up, then BASE_LR, then times GAMMA after each share of the run."""
    words = {"IMS_PER_BATCH": 8, "REFERENCE_BATCH": 16, "BASE_LR": 0.4, "EPOCHS": 10, "DECAY_AT": "(0.5,0.9)"}
    resolved = resolve_schedule(cfg(**words, WARMUP_ITERS=10, WARMUP_FACTOR=0.1), 80)
    model = torch.nn.Linear(1, 1)
    optimizer = build_optimizer(resolved, model)
    scheduler = build_lr_scheduler(resolved, optimizer)
    rates = []
    for _ in range(resolved.SOLVER.MAX_ITER):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    expected = [0.2 * (0.1 + 0.9 * step / 10 if step < 10 else 1) for step in range(100)]
    expected = [rate * 0.1 ** ((step >= 50) + (step >= 90)) for step, rate in enumerate(expected)]
    assert rates == pytest.approx(expected)
