"""The proof of a conversion: the same random image through the encoder of the source and that of the written file.

Each encoder is the code of the library whose users load the file, so that a proof covers names, layouts, numbers of
heads, epsilons and configuration files, none of which a comparison of tensors would. Shapes: B batch, L patches, E
width, N tokens: 1 + L with a class token, else L.
"""

from __future__ import annotations

import importlib
import math
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import create_model, load_state_dict
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from crossmae.checkpoints.formats.timm_folder import is_timm_folder, timm_model
from crossmae.checkpoints.reading.files import HUB_CONFIG, read_tensors
from crossmae.checkpoints.resample import window_of
from crossmae.checkpoints.weights import encoder_tensors, read_weights
from crossmae.errors import UserError
from crossmae.models.encoder import ViTEncoder, patch_grid

Encoder = Callable[[Tensor], Tensor]  # (B, C, H, W) images to (B, N, E) tokens of the last block, before any final norm

ARCHITECTURE = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")
TOLERANCE = 1e-5
REMEDIES = {
    "transformers": 'pip install -e ".[hf]"',
    "detectron2": 'pip install -e ".[det]", then python tools/install_detectron2.py',
    "timm": 'pip install "timm>=1.0.26"',
}
TIMM_FOLDERS = (1, 0, 26)  # the first version whose "local-dir:" reads safetensors
HF_MODELS = {"hf-vit": "ViTModel", "hf-vitmae": "ViTMAEModel"}
HF_OPTIONS: dict[str, dict[str, Any]] = {"hf-vit": {"add_pooling_layer": False}, "hf-vitmae": {"mask_ratio": 0.0}}
_NOT_ENCODER = ("norm.", "fc_norm.", "head.")
_RELATIVE = re.compile(r"blocks\.(\d+)\.attn\.rel_pos_h")


class Missing(UserError):
    """A library that a proof needs can not be imported; the message ends with what installs it."""

    def __init__(self, library: str, reason: str = "is not installed") -> None:
        super().__init__(f"{library} {reason} ({REMEDIES[library]})")
        self.library = library


@dataclass(frozen=True)
class Proof:
    """What comparing two encoders gave.

    Attributes:
        ran: false where a library is missing.
        source: the model that the source went through, for example "timm's VisionTransformer".
        target: the same of the written file.
        what: which outputs of which image.
        max_difference: the largest absolute difference of any number of any token; None where there is none.
        largest: the largest absolute output of the source.
        tolerance: what `max_difference` may be, over `largest` or 1, whichever is larger.
        reason: why it did not run, or what failed other than a difference; else "".
    """

    ran: bool
    source: str
    target: str
    what: str
    max_difference: float | None = None
    largest: float | None = None
    tolerance: float = TOLERANCE
    reason: str = ""

    @property
    def equal(self) -> bool:
        """Whether it ran, and the outputs are equal within the tolerance."""
        if not self.ran or self.reason or self.max_difference is None or self.largest is None:
            return False
        return self.max_difference <= self.tolerance * max(1.0, self.largest)

    def sentence(self) -> str:
        """One line for people."""
        if not self.ran:
            return f"proof        not run: {self.reason}"
        if self.max_difference is None or self.largest is None:
            return f"proof        FAILED: {self.reason}"
        if self.max_difference == 0:
            found = f"outputs bit-equal, values up to {self.largest:.2g},"
            verdict = ""
        else:
            found = f"max difference {self.max_difference:.2g} of values up to {self.largest:.2g}"
            tolerance = f"tolerance {self.tolerance:.2g} of the largest value (at least of 1)"
            verdict = f", {tolerance}: {'equal' if self.equal else 'NOT EQUAL'}"
        return f"proof        {found} between {self.source} (source) and {self.target} (file), {self.what}{verdict}"

    def record(self) -> dict[str, Any]:
        """The same for a JSON file."""
        return asdict(self) | {"equal": self.equal}


def prove(
    source: Callable[[], Encoder],
    target: Callable[[], Encoder],
    *,
    size: Sequence[tuple[int, int]],
    in_chans: int,
    what: str = "all tokens",
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Proof:
    """Compare two encoders on images of standard normal pixels, in float32 on the CPU.

    Every number of the encoders counts but the biases of the keys, which add the same to all scores of a query: softmax
    takes that away.

    Args:
        source: makes the encoder of the source. Only one of the two is in memory at a time.
        target: makes that of the written file, see `file_encoder`. It runs first: it is the one that may be missing.
        size: height and width in pixels of every image, see `image_size`.
        in_chans: channels of the images.
        what: which tokens the encoders give, for the sentence.
        tolerance: see `Proof.tolerance`.
        seed: of the images. The global random state stays as it is.

    Returns:
        A proof, `equal` or not. A file that its library does not load or run, other shapes, NaN and infinity fail; a
        library that is `Missing` leaves it not run.
    """
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(1, in_chans, *sides, generator=generator, dtype=torch.float32) for sides in size]
    given = " and ".join(f"one random image of {height} x {width}" for height, width in size)
    proof = Proof(True, "", "", f"{what} of {given}", tolerance=tolerance)
    with torch.random.fork_rng(devices=[]):
        try:
            target_name, found = _tokens(target, images, "file")
            source_name, expected = _tokens(source, images, "source")
        except Missing as error:
            return replace(proof, ran=False, reason=str(error))
        except UserError as error:
            return replace(proof, reason=str(error))
    proof = replace(proof, source=source_name, target=target_name)
    if found.shape != expected.shape:
        shapes = f"of shape {tuple(expected.shape)} and {tuple(found.shape)}"
        return replace(proof, reason=f"tokens {shapes} from {source_name} (source) and {target_name} (file)")
    for name, tokens in ((f"{source_name} (source)", expected), (f"{target_name} (file)", found)):
        if not bool(torch.isfinite(tokens).all()):
            return replace(proof, reason=f"NaN or infinity in the tokens of {name}")
    difference, largest = float((expected - found).abs().max()), float(expected.abs().max())
    return replace(proof, max_difference=difference, largest=largest)


def image_size(tensors: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Height and width in pixels of the images for a proof: every table counts, unresized or enlarged, in one of them.

    One image of the size of pretraining is enough. With relative positions, which are made for larger ones, there are
    two: as high as the tables of global blocks are made for, and as wide. A square of that size would need several
    gigabytes and minutes in detectron2, whose attention keeps a matrix of all pairs of patches.

    Args:
        tensors: an encoder's, under plain names.
        arguments: `img_size` and `patch_size` count.
    """
    size = arguments["img_size"]
    height, width = (size, size) if isinstance(size, int) else size
    sides = sorted(set(_relative_sides(tensors).values()))
    if not sides:
        return [(height, width)]
    *windows, whole = (side * arguments["patch_size"] for side in sides)
    narrow = max([height, *windows])
    return [(whole, narrow), (narrow, whole)] if narrow < whole else [(whole, whole)]


def plain_encoder(
    tensors: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    *,
    norm_eps: float = 1e-6,
    class_token: bool = True,
) -> Encoder:
    """timm's VisionTransformer around the tensors, which shares no code with our encoder.

    Args:
        tensors: an encoder's and nothing else, under plain names, of any floating type. They are not copied.
        arguments: what `ARCHITECTURE` lists; `img_size` is a number or (height, width).
        norm_eps: epsilon of the layer norms.
        class_token: false leaves it and its row of the position table out, as dense backbones do.

    Returns:
        The encoder, which computes in the type of the images.

    Raises:
        UserError: tensors missing, left over or of other shapes; an incomplete architecture.
    """
    known = _architecture(arguments)
    tensors = dict(tensors)
    if not class_token:
        tensors.pop("cls_token", None)
        table = tensors.get("pos_embed")
        if table is not None and table.shape[1] == 1 + math.prod(patch_grid(known["img_size"], known["patch_size"])):
            tensors["pos_embed"] = table[:, 1:]
    with _Unfilled():
        model = VisionTransformer(**known, num_classes=0, global_pool="", class_token=class_token, weight_init="skip")
    model.norm = nn.Identity()
    return _filled(model, tensors, "timm's VisionTransformer", norm_eps, _timm_tokens)


def detectron2_encoder(
    tensors: Mapping[str, Tensor], arguments: Mapping[str, Any], *, norm_eps: float = 1e-6
) -> Encoder:
    """detectron2's own ViT; its tokens come without class token.

    Blocks with smaller tables of relative positions than others attend within windows of that size; where all tables
    are of one size, or there are none, every block attends over the whole image.

    Args:
        tensors: an encoder's under plain names: no class token, but `pos_embed` with or without its row.
        arguments: see `plain_encoder`; the position table must be a square.
        norm_eps: that of ViTDet's configurations is 1e-6 (not the default of detectron2's class).

    Raises:
        Missing: detectron2 is not installed.
        UserError: as `plain_encoder`; a table that is not square; windows of two sizes.
    """
    vit = _library("detectron2", ".modeling.backbone.vit")
    known = _architecture(arguments)
    rows, columns = patch_grid(known["img_size"], known["patch_size"])
    if rows != columns:
        raise UserError(f"detectron2's ViT takes the position table of a square, not of {rows} x {columns} patches")
    sides = _relative_sides(tensors)
    smaller = sorted(set(sides.values()))[:-1]
    if len(smaller) > 1:
        raise UserError(f"detectron2's ViT has windows of one size; the relative positions are for {smaller}")
    known["pretrain_img_size"] = rows * known["patch_size"]
    known["img_size"] = known["patch_size"] * max(sides.values(), default=rows)
    with _Unfilled():
        model = vit.ViT(
            **known,
            use_rel_pos=bool(sides),
            window_size=smaller[0] if smaller else 0,
            window_block_indexes=[block for block, side in sides.items() if side in smaller],
            pretrain_use_cls_token="pos_embed" in tensors and tensors["pos_embed"].shape[1] == 1 + rows * columns,
        )
    return _filled(model, tensors, "detectron2's ViT", norm_eps, _detectron2_tokens)


def file_encoder(path: Path, to: str, arguments: Mapping[str, Any], *, norm_eps: float = 1e-6) -> Encoder:
    """A written file or folder as the users of its library load it.

    Args:
        path: what the converter wrote: a file, or for "timm", "hf-vit" and "hf-vitmae" a folder with config.json, which
            alone then tells the architecture.
        to: the target: "crossmae", "mae", "timm", "hf-vit", "hf-vitmae" or "detectron2".
        arguments: see `plain_encoder`.
        norm_eps: what users set in the layer norms where the file does not (everywhere but in transformers); timm, our
            models and ViTDet's configurations set 1e-6.

    Raises:
        Missing: the library is not installed, or too old.
        UserError: the library does not load it, or not all of it.
        ValueError: an unknown target.
    """
    if to in HF_MODELS:
        return _transformers_encoder(path, to)
    if to == "timm":
        return _timm_folder(path, norm_eps) if path.is_dir() else _timm_file(path, arguments, norm_eps)
    if to == "detectron2":
        _library("detectron2")  # before a large file is read
        return detectron2_encoder(encoder_tensors(read_weights(path)), arguments, norm_eps=norm_eps)
    if to not in ("crossmae", "mae"):
        raise ValueError(f"no library is known for files of {to!r}")
    with _Unfilled():
        model = ViTEncoder(**_architecture(arguments))
    return _filled(model, encoder_tensors(read_weights(path)), "our ViTEncoder", norm_eps, _our_tokens)


def source_encoder(
    path: Path,
    layout: str,
    tensors: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    *,
    norm_eps: float = 1e-6,
    class_token: bool = True,
) -> Encoder:
    """The source through its own library where that is installed and says more than the tensors, else through timm.

    That is transformers and timm for their folders, and detectron2 for relative positions, which timm does not have.

    Args:
        path: the source itself, a folder or its weight file.
        layout: see `Weights.layout`.
        tensors, arguments, norm_eps, class_token: see `plain_encoder`; as the source has them, not resampled.

    Raises:
        Missing: relative positions, and detectron2 is not installed.
        UserError: as `plain_encoder`.
    """
    if _relative_sides(tensors):
        tensors = {name: tensor for name, tensor in tensors.items() if name != "cls_token"}
        return detectron2_encoder(tensors, arguments, norm_eps=norm_eps)
    folder = path if path.is_dir() else path.parent
    whole = (folder / HUB_CONFIG).is_file() and any(folder.glob("*.safetensors"))
    if layout in HF_MODELS and class_token and whole:
        try:
            return _transformers_encoder(folder, layout)
        except Missing:
            pass
    if layout == "plain" and class_token and is_timm_folder(path):
        return _timm_source(path)
    return plain_encoder(tensors, arguments, norm_eps=norm_eps, class_token=class_token)


def _timm_source(path: Path) -> Encoder:
    """The model that a timm folder describes, around the tensors as they are in the file."""
    model = timm_model(path.parent)
    model.reset_classifier(0)
    model.norm = model.fc_norm = nn.Identity()
    tensors = {name: tensor for name, tensor in read_tensors(path).tensors.items() if not name.startswith(_NOT_ENCODER)}
    return _filled(model, tensors, f"timm's {type(model).__name__}", None, _timm_tokens)


@dataclass(frozen=True)
class _Named:
    """An encoder that knows whose code it is."""

    name: str
    model: nn.Module
    run: Callable[[Any, Tensor], Tensor]

    def __call__(self, imgs: Tensor) -> Tensor:
        with torch.no_grad():
            return self.run(self.model.eval().to(imgs.dtype), imgs)


class _Unfilled(TorchFunctionMode):
    """Modules built under it have weights without memory, to be filled by assignment.

    `torch.device("meta")` would do the same, but for constructors that compute numbers with tensors, as detectron2's
    does. Random weights of a ViT-L take five seconds and a gigabyte.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {}))


def _filled(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    name: str,
    norm_eps: float | None,
    run: Callable[[Any, Tensor], Tensor],
) -> Encoder:
    try:
        model.load_state_dict(dict(tensors), strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(f"{name} does not take these tensors: {_one_line(error)}") from None
    return _Named(name, _with_eps(model, norm_eps), run)


def _with_eps(model: nn.Module, norm_eps: float | None) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and norm_eps is not None:
            module.eps = norm_eps
    return model


def _timm_file(path: Path, arguments: Mapping[str, Any], norm_eps: float) -> Encoder:
    with _loading(path, "timm"):
        tensors = load_state_dict(str(path), weights_only=True)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_NOT_ENCODER)}
    return plain_encoder(tensors, arguments, norm_eps=norm_eps, class_token="cls_token" in tensors)


def _timm_folder(folder: Path, norm_eps: float) -> Encoder:
    if tuple(int(part) for part in re.findall(r"\d+", timm.__version__)[:3]) < TIMM_FOLDERS:
        raise Missing("timm", f"{timm.__version__} does not read folders of safetensors")
    if not (folder / "model.safetensors").is_file():
        raise UserError(f"{folder}: holds no model.safetensors")
    with _loading(folder, "timm"):
        model = create_model(f"local-dir:{folder}", pretrained=True)
    if not isinstance(model, VisionTransformer):
        raise UserError(f"{folder}: config.json names a {type(model).__name__}, which is not a plain ViT")
    model.norm = nn.Identity()
    return _Named("timm's VisionTransformer", _with_eps(model, norm_eps), _timm_tokens)


def _transformers_encoder(folder: Path, layout: str) -> Encoder:
    transformers = _library("transformers")
    if not folder.is_dir():
        raise UserError(f"{folder}: transformers loads folders, and this is none")
    with _loading(folder, "transformers"), _quiet(transformers):
        # Weights that the folder lacks would be new and random, with no more than a warning.
        model, info = getattr(transformers, HF_MODELS[layout]).from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True, **HF_OPTIONS[layout]
        )
    absent = sorted(name for name in info["missing_keys"] if not name.startswith("layernorm."))
    if absent:
        raise UserError(f"{folder}: transformers' {HF_MODELS[layout]} finds no {', '.join(absent[:5])} in it")
    model.layernorm = nn.Identity()
    run = _vitmae_tokens if layout == "hf-vitmae" else _vit_tokens
    return _Named(f"transformers' {HF_MODELS[layout]}", model, run)


def _our_tokens(model: Any, imgs: Tensor) -> Tensor:
    return model.features(model.embed(imgs), [model.depth - 1])[0]


def _timm_tokens(model: Any, imgs: Tensor) -> Tensor:
    return model.forward_features(imgs)


def _detectron2_tokens(model: Any, imgs: Tensor) -> Tensor:
    return model(imgs)["last_feat"].flatten(2).transpose(1, 2)


def _vit_tokens(model: Any, imgs: Tensor) -> Tensor:
    return model(imgs).last_hidden_state


def _vitmae_tokens(model: Any, imgs: Tensor) -> Tensor:
    """Patches are sorted by their noise before the last are masked: here none is, and they keep their order."""
    noise = torch.arange(model.embeddings.patch_embeddings.num_patches, dtype=imgs.dtype)
    return model(imgs, noise=noise.expand(imgs.shape[0], -1)).last_hidden_state


def _tokens(make: Callable[[], Encoder], images: list[Tensor], role: str) -> tuple[str, Tensor]:
    """Whose code the encoder is, and the tokens of all images in a row; the encoder is gone when this returns."""
    try:
        encoder = make()
        return getattr(encoder, "name", "an encoder"), torch.cat([encoder(image) for image in images], dim=1)
    except Missing:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"the encoder of the {role} can not be run: {_one_line(error)}") from None


def _architecture(arguments: Mapping[str, Any]) -> dict[str, Any]:
    absent = [key for key in ARCHITECTURE if key not in arguments]
    if absent:
        raise UserError(f"not all of the encoder's architecture is known: {', '.join(absent)} missing")
    known = {key: arguments[key] for key in ARCHITECTURE}
    return known if isinstance(known["img_size"], int) else known | {"img_size": tuple(known["img_size"])}


def _relative_sides(tensors: Mapping[str, Tensor]) -> dict[int, int]:
    """Block -> side in patches of what its relative positions are for; {} where there are none."""
    found = {name: _RELATIVE.fullmatch(name) for name in tensors}
    return {int(match[1]): window_of(tensors[name]) for name, match in found.items() if match}


def _library(library: str, module: str = "") -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if library == "detectron2":  # imports a module that timm has moved, and turns warnings on again before
                importlib.import_module("timm.models.layers")
            return importlib.import_module(library + module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.partition(".")[0] == library:
            raise Missing(library) from None
        raise Missing(library, f"needs {error.name}, which is not installed") from None
    except ImportError as error:
        raise Missing(library, f"can not be imported: {_one_line(error)}") from None


@contextmanager
def _loading(path: Path, library: str) -> Iterator[None]:
    """Whatever a library has against a file, in one line."""
    try:
        yield
    except ImportError as error:
        raise Missing(library, f"can not be used: {_one_line(error)}") from None
    except Exception as error:
        raise UserError(f"{path}: {library} does not load it: {type(error).__name__}: {_one_line(error)}") from None


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """No progress bars, and no table of the heads that are left out."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:500]
