"""Layer decay and weight decay per parameter; the learning rate rule and epochs in steps."""

import pytest
import torch

pytest.importorskip("detectron2", reason="detectron2 is not installed: python tools/install_detectron2.py")

from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.solver import build_lr_scheduler

from det.config import load_det_config, read_keys
from det.training.optimizer import describe_schedule, parameter_groups, resolve_schedule


def test_layer_decay_gives_each_parameter_its_rate_once():
    cfg = load_det_config("coco_mask_rcnn.yaml", ["MODEL.DEVICE=cpu", "SOLVER.BASE_LR=1e-4"])
    model = build_model(cfg)
    groups = parameter_groups(model, read_keys(cfg).SOLVER, 12)
    found = {id(p): (1e-4 * group["lr_scale"], group["weight_decay"]) for group in groups for p in group["params"]}
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
    groups = parameter_groups(model, read_keys(cfg).SOLVER, 1)
    decays = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    found = {name for name, p in model.named_parameters() if decays[id(p)] == 0.3}
    assert {name.rpartition(".")[2] for name in found} == {"pos_embed", "pos_embed_global", "rel_pos_h", "rel_pos_w"}


@pytest.fixture
def keys(tmp_path):
    def load(eval_epochs=0, **solver):
        (tmp_path / "c.yaml").write_text("MODEL: {DEVICE: cpu}")
        words = [f"SOLVER.{key}={value}" for key, value in solver.items()]
        return read_keys(load_det_config(str(tmp_path / "c.yaml"), [*words, f"TEST.EVAL_EPOCHS={eval_epochs}"]))

    return load


def resolve(keys, num_images):
    return resolve_schedule(keys.SOLVER, keys.TEST, num_images)


@pytest.mark.parametrize(
    ("batch", "expected"),
    [(64, 1e-4), (16, 2.5e-5), (4, 6.25e-6), (128, 2e-4)],
)
def test_the_learning_rate_follows_the_batch_linearly(keys, batch, expected):
    given = keys(IMS_PER_BATCH=batch, BASE_LR=1e-4, REFERENCE_BATCH=64, ACCUMULATE=2)
    schedule = resolve(given, 1000)
    assert schedule.peak_lr == pytest.approx(expected)
    text = describe_schedule(schedule, given.SOLVER, 1000, 12)
    assert f"learning rate {expected:.3g} (= 0.0001 x {batch} / 64)" in text
    assert resolve(keys(IMS_PER_BATCH=batch, BASE_LR=1e-4), 1000).peak_lr == 1e-4


def test_epochs_and_shares_become_steps(keys):
    """The published run: 100 epochs of the 118,000 images that its authors count with, in batches of 64."""
    words = {"IMS_PER_BATCH": 64, "EPOCHS": 100, "DECAY_AT": "(0.88889,0.96296)", "WARMUP_ITERS": 250}
    given = keys(eval_epochs=5, **words)
    schedule = resolve(given, 118_000)
    assert (schedule.last_step, schedule.warmup_steps) == (184_375, 250)
    assert pytest.approx((163_889, 177_546), abs=2) == schedule.milestones
    text = describe_schedule(schedule, given.SOLVER, 118_000, 12)
    assert "184,375 steps of 64 images: 100 epochs of 118,000 images" in text
    assert "x 0.1 after step 163,8" in text
    assert schedule.eval_period == round(5 * 118_000 / 64)
    assert schedule.checkpoint_period == given.SOLVER.CHECKPOINT_PERIOD == 5000  # which is more often
    assert resolve(keys(eval_epochs=1, **words), 118_000).checkpoint_period == round(118_000 / 64)


def rates(keys, num_images):
    """The learning rate of every step."""
    schedule = resolve(keys, num_images)
    return [schedule.lr_at(step) for step in range(schedule.last_step)]


def test_warm_up_ends_before_the_rate_falls(keys):
    """Else detectron2 would warm up to the rate that is due then, and never reach BASE_LR."""
    given = keys(MAX_ITER=100, DECAY_AT="(0.88,0.96)", WARMUP_ITERS=250, BASE_LR=0.1)
    assert max(rates(given, 100)) == pytest.approx(0.1)


def test_a_short_run_warms_up_for_a_tenth_of_it_and_drops_steps_beyond_its_end(keys):
    schedule = resolve(keys(IMS_PER_BATCH=4, EPOCHS=2, WARMUP_ITERS=250, STEPS="(10,600)"), 100)
    assert (schedule.last_step, schedule.warmup_steps, schedule.milestones) == (50, 5, (10,))
    assert resolve(keys(IMS_PER_BATCH=16, EPOCHS=0.001), 100).last_step == 1
    assert resolve(keys(MAX_ITER=4, DECAY_AT="(0.5,0.55)"), 100).milestones == (2,)


def test_the_rate_of_every_step_is_the_rules(keys):
    """Linear warm-up, then BASE_LR, then times GAMMA after each share of the run."""
    words = {"IMS_PER_BATCH": 8, "REFERENCE_BATCH": 16, "BASE_LR": 0.4, "EPOCHS": 10, "DECAY_AT": "(0.5,0.9)"}
    expected = [0.2 * (0.1 + 0.9 * step / 10 if step < 10 else 1) for step in range(100)]
    expected = [rate * 0.1 ** ((step >= 50) + (step >= 90)) for step, rate in enumerate(expected)]
    assert rates(keys(**words, WARMUP_ITERS=10, WARMUP_FACTOR=0.1), 80) == pytest.approx(expected)


def test_a_cosine_ends_at_the_share_of_the_base_rate(keys):
    """detectron2's own scheduler of the same config gives the same rates."""
    words = {"BASE_LR": 0.4, "BASE_LR_END": 0.1, "MAX_ITER": 40, "WARMUP_ITERS": 4}
    given = keys(**words, LR_SCHEDULER_NAME="WarmupCosineLR")
    cfg = get_cfg()
    cfg.SOLVER.update(words | {"LR_SCHEDULER_NAME": "WarmupCosineLR"})
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.4)
    scheduler = build_lr_scheduler(cfg, optimizer)
    for rate in rates(given, 1):
        assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        optimizer.step()
        scheduler.step()
