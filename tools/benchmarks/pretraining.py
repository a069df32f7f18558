"""Suites of pretraining: counted arithmetic, whole steps, fusion of maps, masking and decoders."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from crossmae.data.pixels import Normalize
from crossmae.experiments.study.decoder_cost import MASK_RATIO, count_products, decoder_passes
from crossmae.models.crossmae import CrossMAE
from crossmae.models.masking import gather_tokens, split_patches
from crossmae.models.sizes import model_arguments
from crossmae.pretraining.images import Batch
from crossmae.pretraining.train import parameter_groups, reconstruction_loss
from crossmae.training.devices import choose_compilation, choose_precision, open_autocast
from crossmae.training.loop import steps_unread
from crossmae.training.optimizers import make_optimizer
from crossmae.training.processes import Ranks
from crossmae.training.state import TrainingState
from tools.benchmarks.measuring import Comparison, Gate, Row, exact_convolutions, largest_difference
from tools.benchmarks.published import PublishedCrossMAE, select_targets, split_tokens

Build = Callable[[], Comparison | Row]
PREDICT = 0.25
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
LR, WEIGHT_DECAY, BETAS = 1.5e-4, 0.05, (0.9, 0.95)
# Ratio of decoder arithmetic, MAE of 8 blocks / CrossMAE: the paper's claim, with the products of attention counted.
PAPER = {("base_patch16", 12, 0.25): 2.60, ("base_patch16", 8, 0.25): 3.88}
COUNTED = ("small_patch16", "base_patch16", "large_patch16", "huge_patch14")
# The model, images per batch and goals (published port; transformers; transformers in the precision of `auto`).
STEPS = {
    "cpu": (("small_patch16", 8, 1.15, 1.8, 2.0), ("base_patch16", 8, 1.15, 1.5, 2.0)),
    "cuda": (
        ("base_patch16", 1024, 1.8, None, None),
        ("large_patch16", 256, 1.5, None, None),
        ("huge_patch14", 128, 1.5, None, None),
    ),
}


def flops(
    sizes: Sequence[str] = COUNTED, depths: Sequence[int] = (12, 8), ratios: Sequence[float] = (0.25, 0.75)
) -> list[Build]:
    """List counts of decoder arithmetic, MAE with 8 blocks against CrossMAE."""
    return [partial(count_decoder, size, depth, ratio) for size in sizes for ratio in ratios for depth in depths]


def count_decoder(size: str, depth: int, predict_ratio: float) -> Row:
    """Count the arithmetic of one decoder by fvcore, attention included."""
    own = CrossMAE(**model_arguments(f"crossmae_vit_{size}") | {"decoder_depth": depth})
    ours, other = count_products(own, predict_ratio), count_mae(size)
    ratio, goal = other["decoder"] / ours["decoder"], PAPER.get((size, depth, predict_ratio))
    whole = sum(other.values()) / sum(ours.values())
    return Row(
        suite="flops",
        what=f"decoder of ViT-{size[0].upper()}, {predict_ratio:.0%} predicted, depth {depth}",
        against="MAE's decoder, depth 8",
        goal=goal,
        ratio=round(ratio, 2) if goal else ratio,
        gate=Gate(abs(ratio - goal), 0.005) if goal else None,
        void=f"{ratio:.3f} is not the paper's {goal}" if goal and abs(ratio - goal) > 0.005 else "",
        note=f"{ours['decoder'] / 1e9:.2f} GFLOP, encoder and decoder together {whole:.2f}x",
    )


@cache
def count_mae(size: str) -> dict[str, float]:
    """Count the arithmetic of MAE with its decoder of 8 blocks."""
    return count_products(CrossMAE(**model_arguments(f"mae_vit_{size}")), MASK_RATIO)


def pretrain(
    device: torch.device,
    steps: Sequence[tuple[str, int, float | None, float | None, float | None]] | None = None,
    overrides: Mapping[str, Any] | None = None,
    curve: int | None = None,
) -> list[Build]:
    """List whole training steps against the published design, transformers and another precision.

    Args:
        steps: sizes, images per batch, and goals, as in STEPS.
        overrides: arguments of `CrossMAE` that replace those of the named sizes.
        curve: steps of the loss curves that are compared. None: 200 on a GPU, none elsewhere.
    """
    found: list[Build] = []
    kind, changes = device.type, dict(overrides or {})
    for size, images, port_goal, goal, auto_goal in steps or STEPS[kind]:
        arguments = model_arguments(f"crossmae_vit_{size}") | changes
        name = f"step of ViT-{size[0].upper()}, batch {images}, {PREDICT:.0%}, depth {arguments['decoder_depth']}"
        precisions = ("fp32", "auto") if kind == "cpu" else ("auto",)
        for precision in precisions:
            chosen = choose_precision(precision, device, width=arguments["embed_dim"])
            if precision == "auto":
                goals = (None if kind == "cpu" else port_goal, auto_goal)
            else:
                goals = (port_goal, goal)
            label = f"{name}, {chosen}" + " (auto)" * (precision == "auto")
            found.append(partial(against_port, label, arguments, images, device, chosen, goals[0]))
            found.append(partial(against_transformers, label, arguments, images, device, chosen, goals[1]))
    length = curve if curve is not None else 200 if kind == "cuda" else 0
    if length:
        size, images = (steps or STEPS[kind])[0][:2]
        arguments = model_arguments(f"crossmae_vit_{size}") | changes
        for precision, limit in (("fp32", 1e-3), ("bf16", 1e-2)):
            found.append(partial(loss_curve, arguments, min(images, 64), device, precision, length, limit))
    for size, images, *_ in (steps or STEPS[kind])[-1:] if kind == "cpu" else (steps or STEPS[kind])[:1]:
        found.append(partial(decoder_seconds, size, images, device, changes))
    return found


def make_batch(arguments: Mapping[str, Any], images: int, device: torch.device) -> Batch:
    """Draw a batch of random uint8 images with mask noise."""
    side, patches = arguments.get("img_size", 224), arguments["patch_size"]
    draw = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (images, 3, side, side), dtype=torch.uint8, generator=draw)
    noise = torch.rand(images, (side // patches) ** 2, generator=draw)
    return Batch(pixels.to(device), noise.to(device), torch.arange(images))


def open_state(model: nn.Module, optimizer: torch.optim.Optimizer, precision: str) -> TrainingState:
    """Open the state as our trainer does by default.

    On a GPU, blocks are compiled, and the host does not check the gradients of every step.
    """
    device = next(model.parameters()).device
    compiled, _ = choose_compilation("auto", device)
    unread = steps_unread(device)
    return TrainingState(model, optimizer, Ranks(), precision, None, None, compiled, None, check_every=unread)


def our_step(model: CrossMAE, batch: Batch, precision: str) -> Callable[[], Tensor]:
    """Return a step as our trainer makes it, with its loss."""
    device = batch.images.device
    groups = parameter_groups(model, WEIGHT_DECAY)
    optimizer = make_optimizer("adamw", model, groups, LR, BETAS)
    state = open_state(model, optimizer, precision)
    loss = partial(reconstruction_loss, Normalize(MEAN, STD, device), MASK_RATIO, PREDICT)

    def step() -> Tensor:
        losses = state.forward_backward(loss, batch, 0, 1, True)
        state.update(LR)
        return losses["loss"]

    return step


def other_step(
    model: nn.Module,
    loss: Callable[[], Tensor],
    precision: str,
    device: torch.device,
    groups: Sequence[Mapping[str, Any]] | None = None,
    clip: float | None = None,
    fused: bool | None = None,
) -> Callable[[], Tensor]:
    """Return a step as a plain script makes it, with its loss.

    Args:
        clip: largest norm of the gradients. None: the norm is computed tensor by tensor, and not used.
        fused: as in `torch.optim.AdamW`; None is torch's default.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = groups or [{"params": parameters, "weight_decay": WEIGHT_DECAY}]
    optimizer = torch.optim.AdamW([dict(group) for group in groups], lr=LR, betas=BETAS, fused=fused)
    scaler = torch.amp.GradScaler(device.type, enabled=precision == "fp16")
    autocast = open_autocast(precision, device)

    def step() -> Tensor:
        optimizer.zero_grad()
        with autocast:
            value = loss()
        scaler.scale(value).backward()
        scaler.unscale_(optimizer)
        if clip is None:
            norms = [p.grad.norm() for p in parameters if p.grad is not None]
            torch.stack(norms).norm()
        else:
            nn.utils.clip_grad_norm_(parameters, clip)
        scaler.step(optimizer)
        scaler.update()
        return value.detach()

    return step


def make_pair(arguments: Mapping[str, Any], device: torch.device) -> tuple[CrossMAE, PublishedCrossMAE]:
    """Build our model and the published port with the same weights."""
    torch.manual_seed(0)
    with device:  # random weights of a ViT-H take long on a CPU
        ours = CrossMAE(**arguments)
        other = PublishedCrossMAE(**{key: value for key, value in arguments.items() if key != "decoder"})
    other.load_state_dict(ours.state_dict(), strict=True)
    return ours, other


def port_loss(model: PublishedCrossMAE, batch: Batch) -> Callable[[], Tensor]:
    """Return the loss of the published port on normalised images."""
    images = Normalize(MEAN, STD, batch.images.device)(batch.images)
    return lambda: model(images, MASK_RATIO, PREDICT, batch.noise)


def against_port(
    label: str,
    arguments: Mapping[str, Any],
    images: int,
    device: torch.device,
    precision: str,
    goal: float | None,
) -> Comparison:
    """Compare a step with the published design.

    The other side has torch's default AdamW, and on a GPU fp16 with a scaler.
    """
    ours, other = make_pair(arguments, device)
    batch = make_batch(arguments, images, device)
    loss = port_loss(other, batch)
    theirs = "fp16" if device.type == "cuda" else "fp32"

    def gate() -> Gate:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            own = reconstruction_loss(Normalize(MEAN, STD, device), MASK_RATIO, PREDICT, ours, batch, 0)["loss"]
            return Gate(largest_difference([own], [loss()]), 1e-5)

    return Comparison(
        what=label,
        against=f"a port of the published design, {theirs}",
        ours=our_step(ours, batch, precision),
        other=other_step(other, loss, theirs, device, parameter_groups(other, WEIGHT_DECAY)),
        goals={} if goal is None else {device.type: goal},
        gate=gate,
    )


def against_transformers(
    label: str,
    arguments: Mapping[str, Any],
    images: int,
    device: torch.device,
    precision: str,
    goal: float | None,
) -> Comparison:
    """Compare a step with ViTMAE of transformers in fp32.

    The other side has a decoder of 8 blocks for all patches, and the optimizer of transformers' trainer.
    """
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    torch.manual_seed(0)
    with device:
        ours = CrossMAE(**arguments)
    batch = make_batch(arguments, images, device)
    width = arguments["embed_dim"]
    config = ViTMAEConfig(
        hidden_size=width,
        num_hidden_layers=arguments["depth"],
        num_attention_heads=arguments["num_heads"],
        intermediate_size=4 * width,
        image_size=arguments.get("img_size", 224),
        patch_size=arguments["patch_size"],
        decoder_hidden_size=arguments["decoder_embed_dim"],
        decoder_num_attention_heads=arguments["decoder_num_heads"],
        decoder_intermediate_size=4 * arguments["decoder_embed_dim"],
        decoder_num_hidden_layers=8,
        norm_pix_loss=True,
        mask_ratio=MASK_RATIO,
    )
    other: Any = ViTMAEForPreTraining(config)
    other.to(device).train()
    pixels = Normalize(MEAN, STD, device)(batch.images)
    return Comparison(
        what=label,
        against="transformers' ViTMAE, fp32",
        ours=our_step(ours, batch, precision),
        other=other_step(other, lambda: other(pixels, noise=batch.noise).loss, "fp32", device, clip=1.0, fused=True),
        goals={} if goal is None else {device.type: goal},
        note="another model, so no gate",
    )


def loss_curve(
    arguments: Mapping[str, Any], images: int, device: torch.device, precision: str, steps: int, limit: float
) -> Row:
    """Compare losses with the losses of the published port in fp32."""
    ours, other = make_pair(arguments, device)
    batch = make_batch(arguments, images, device)
    ours_step = our_step(ours, batch, precision)
    their_step = other_step(other, port_loss(other, batch), "fp32", device, parameter_groups(other, WEIGHT_DECAY))
    with exact_convolutions():
        pairs = [(float(ours_step()), float(their_step())) for _ in range(steps)]
    gate = Gate(max(abs(one - two) / two for one, two in pairs), limit)
    void = "" if gate.holds else f"the losses differ by {gate.difference:.2%}"
    what = f"losses of {steps} steps, {precision}"
    against = "a port of the published design, fp32"
    return Row("pretrain", what, against, device.type, gate=gate, void=void, note=f"last loss {pairs[-1][0]:.4f}")


def decoder_seconds(size: str, images: int, device: torch.device, changes: Mapping[str, Any]) -> Comparison:
    """Compare both passes of our decoder and of our MAE decoder."""
    torch.manual_seed(0)
    sides = []
    for family, ratio in (("crossmae_vit", PREDICT), ("mae_vit", MASK_RATIO)):
        own = {key: value for key, value in changes.items() if key != "decoder_depth"}
        model = CrossMAE(**model_arguments(f"{family}_{size}") | own).to(device)
        sides.append(decoder_passes(model, ratio, images, choose_precision("auto", device, width=model.embed_dim)))
    return Comparison(
        what=f"decoder of ViT-{size[0].upper()}, batch {images}, both passes, depth 12",
        against="our MAE decoder, depth 8",
        ours=sides[0],
        other=sides[1],
        goals={"cpu": 2.0, "cuda": 2.2},
        note="another model, so no gate",
    )


def fusion(
    device: torch.device,
    size: str = "base_patch16",
    images: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> list[Build]:
    """List fusion and masking, against the published design."""
    arguments = model_arguments(f"crossmae_vit_{size}") | dict(overrides or {})
    count = images or (256 if device.type == "cuda" else 8)
    found: list[Build] = [
        partial(fuse_maps, arguments, count, device),
        partial(choose_patches, arguments, count, device),
    ]
    if device.type == "cuda":
        found.append(partial(count_waits, arguments, count, device))
    return found


def fuse_maps(arguments: Mapping[str, Any], images: int, device: torch.device) -> Comparison:
    """Compare both passes of fusion and of the norms after it."""
    ours, other = make_pair(arguments, device)
    tokens = int(ours.num_patches * (1 - MASK_RATIO)) + 1
    shape = (images, tokens, arguments["embed_dim"])
    maps = [torch.randn(shape, device=device) for _ in range(arguments["depth"] + 1)]
    weights = [torch.randn(shape, device=device) / len(ours.decoder_blocks) for _ in ours.decoder_blocks]

    def passes(mix: Callable[[list[Tensor]], list[Tensor]], norms: nn.ModuleList) -> list[Tensor]:
        leaves = [one.detach().requires_grad_() for one in maps]
        outputs = [norm(one) for norm, one in zip(norms, mix(leaves), strict=True)]
        torch.autograd.backward(outputs, weights)
        gradients = [leaf.grad for leaf in leaves]
        return [*outputs, *(gradient for gradient in gradients if gradient is not None)]

    def own() -> list[Tensor]:
        return passes(lambda leaves: list(ours.wfm(leaves)), ours.dec_norms)

    def published() -> list[Tensor]:
        return passes(lambda leaves: list(other.wfm(leaves).unbind(-1)), other.dec_norms)

    return Comparison(
        what=f"{len(maps)} maps mixed and normalised for {len(weights)} blocks, both passes",
        against="a port of the published design",
        ours=own,
        other=published,
        goals={"cpu": 2.5, "cuda": 8.0},
        gate=lambda: Gate(largest_difference(own(), published()), 1e-5),
    )


def choose_patches(arguments: Mapping[str, Any], images: int, device: torch.device) -> Comparison:
    """Compare the selection of visible tokens, predicted positions and targets."""
    ours, _ = make_pair(arguments, device)
    batch = make_batch(arguments, images, device)
    pixels = Normalize(MEAN, STD, device)(batch.images)
    counts = ours.patch_counts(MASK_RATIO, PREDICT)
    tokens = torch.randn(images, ours.num_patches, arguments["embed_dim"], device=device)
    table = torch.randn(1, ours.num_patches, arguments["decoder_embed_dim"], device=device)

    def own() -> list[Tensor]:
        visible, predicted = split_patches(batch.noise, counts)
        positions = gather_tokens(table.expand(images, -1, -1), predicted)
        return [gather_tokens(tokens, visible), positions, ours.targets(pixels, predicted)]

    def published() -> list[Tensor]:
        kept, mask = split_tokens(tokens, batch.noise, MASK_RATIO, PREDICT)
        positions = table.expand(images, -1, -1)[mask.bool()].reshape(images, -1, table.shape[-1])
        return [kept, positions, select_targets(pixels, mask, arguments["patch_size"])]

    return Comparison(
        what="masking and selection of targets",
        against="a port of the published design",
        ours=own,
        other=published,
        goals={"cuda": 5.0},
        gate=lambda: Gate(largest_difference(own(), published()), 1e-5),
    )


def count_waits(arguments: Mapping[str, Any], images: int, device: torch.device) -> Row:
    """Count how often a whole step waits for the GPU."""
    ours, other = make_pair(arguments, device)
    batch = make_batch(arguments, images, device)
    theirs = other_step(other, port_loss(other, batch), "fp16", device, parameter_groups(other, WEIGHT_DECAY))
    found = []
    for step in (our_step(ours, batch, "bf16"), theirs):
        step()  # the first call initialises libraries, and compiles
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                step()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        # The first use of the mode has a warning of its own.
        found.append(sum("called a synchronizing" in str(one.message) for one in caught))
    return Row(
        suite="fusion",
        what="waits for the GPU in a step",
        against="a port of the published design",
        device=device.type,
        gate=Gate(found[0], 0),
        void="" if found[0] == 0 else f"{found[0]} waits",
        note=f"{found[0]} against {found[1]}",
    )
