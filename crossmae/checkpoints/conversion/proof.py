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
from contextlib import contextmanager, suppress
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
from crossmae.errors import UserError, shorten
from crossmae.models.encoder import ViTEncoder, patch_grid

Encoder = Callable[[Tensor], Tensor]  # (B, C, H, W) images to (B, N, E) tokens of the last block, before any final norm

TOLERANCE = 1e-5
HF_MODELS = {"hf-vit": "ViTModel", "hf-vitmae": "ViTMAEModel"}
_ENCODER_SIZES = ("img_size", "patch_size", "in_chans", "embed_dim", "depth", "num_heads", "mlp_ratio")
_REMEDIES = {
    "transformers": 'pip install -e ".[hf]"',
    "detectron2": 'pip install -e ".[det]", then python tools/install_detectron2.py',
    "timm": 'pip install "timm>=1.0.26"',
}
_TIMM_FOLDERS = (1, 0, 26)  # the first version whose "local-dir:" reads safetensors
_HF_OPTIONS: dict[str, dict[str, Any]] = {"hf-vit": {"add_pooling_layer": False}, "hf-vitmae": {"mask_ratio": 0.0}}
_NOT_ENCODER = ("norm.", "fc_norm.", "head.")
_RELATIVE = re.compile(r"blocks\.(\d+)\.attn\.rel_pos_h")


class MissingLibrary(UserError):
    """The error for a library that a proof needs, with the command that installs the library."""

    def __init__(self, library: str, reason: str = "is not installed") -> None:
        super().__init__(f"{library} {reason} ({_REMEDIES[library]})")
        self.library = library


@dataclass(frozen=True)
class Proof:
    """The result of a comparison of two encoders.

    Attributes:
        ran: false where a library is missing.
        source, target: the models, for example "timm's VisionTransformer".
        what: compared outputs and images.
        max_difference: the largest absolute difference of any number of any token; None where there is none.
        largest: the largest absolute output of the source.
        tolerance: bound of `max_difference` over `largest`, or over 1 where that is larger.
        reason: why the proof did not run, or what failed other than a difference; else "".
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
        """True for equal outputs within the tolerance."""
        if not self.ran or self.reason or self.max_difference is None or self.largest is None:
            return False
        return self.max_difference <= self.tolerance * max(1.0, self.largest)

    def sentence(self) -> str:
        """Describe the proof in one line."""
        if not self.ran:
            return f"proof        not run: {self.reason}"
        if self.max_difference is None or self.largest is None:
            return f"proof        FAILED: {self.reason}"
        verdict = ""
        if self.max_difference == 0:
            found = f"outputs bit-equal, values up to {self.largest:.2g},"
        else:
            found = f"max difference {self.max_difference:.2g} of values up to {self.largest:.2g}"
            tolerance = f"tolerance {self.tolerance:.2g} of the largest value (at least of 1)"
            verdict = f", {tolerance}: {'equal' if self.equal else 'NOT EQUAL'}"
        return f"proof        {found} between {self.source} (source) and {self.target} (file), {self.what}{verdict}"

    def record(self) -> dict[str, Any]:
        """Return the proof as a JSON record."""
        return asdict(self) | {"equal": self.equal}


def prove(
    source: Callable[[], Encoder],
    target: Callable[[], Encoder],
    *,
    size: Sequence[tuple[int, int]],
    in_chans: int,
    what: str = "all tokens",
    tolerance: float = TOLERANCE,
) -> Proof:
    """Compare two encoders on random images, in float32 on the CPU.

    Every number of the encoders counts but the biases of the keys, which softmax cancels.

    Args:
        source, target: functions that make the encoders. Only one encoder is in memory at a time; the target is first,
            because its library may be missing.
        size: height and width in pixels of every image, see `image_size`.
        what: which tokens the encoders give, for the sentence.

    Returns:
        A proof, `equal` or not. A file that its library does not load or run, other shapes, NaN and infinity fail; a
        missing library leaves it not run.
    """
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(1, in_chans, *sides, generator=generator, dtype=torch.float32) for sides in size]
    given = " and ".join(f"one random image of {height} x {width}" for height, width in size)
    proof = Proof(True, "", "", f"{what} of {given}", tolerance=tolerance)
    with torch.random.fork_rng(devices=[]):
        try:
            target_name, found = _tokens(target, images, "file")
            source_name, expected = _tokens(source, images, "source")
        except MissingLibrary as error:
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
    """Choose sizes of images that use every table of positions.

    One image of the size of pretraining is enough. With relative positions, which are made for larger ones, there are
    two: as high as the tables of global blocks are made for, and as wide. A square of that size would need several
    gigabytes and minutes in detectron2, whose attention keeps a matrix of all pairs of patches.
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
    """Build timm's VisionTransformer around the tensors.

    Args:
        tensors: of an encoder only, under plain names, of any floating type. They are not copied.
        arguments: of `ViTEncoder`; `img_size` is a number or (height, width).
        norm_eps: epsilon of the layer norms.
        class_token: false leaves it and its row of the position table out, as dense backbones do.

    Raises:
        UserError: tensors missing, left over or of other shapes; an incomplete architecture.
    """
    known = _sizes(arguments)
    tensors = dict(tensors)
    if not class_token:
        tensors.pop("cls_token", None)
        table = tensors.get("pos_embed")
        if table is not None and table.shape[1] == 1 + math.prod(patch_grid(known["img_size"], known["patch_size"])):
            tensors["pos_embed"] = table[:, 1:]
    with _Unfilled():
        model = VisionTransformer(**known, num_classes=0, global_pool="", class_token=class_token, weight_init="skip")
    model.norm = nn.Identity()
    return _filled(model, tensors, "timm's VisionTransformer", norm_eps)


def detectron2_encoder(
    tensors: Mapping[str, Tensor], arguments: Mapping[str, Any], *, norm_eps: float = 1e-6
) -> Encoder:
    """Build detectron2's own ViT, whose tokens come without class token.

    Blocks with smaller tables of relative positions than others attend within windows of that size; where all tables
    are of one size, or there are none, every block attends over the whole image.

    Args:
        tensors: of an encoder under plain names: no class token, but `pos_embed` with or without its row.
        norm_eps: 1e-6 in ViTDet's configurations (not the default of detectron2's class).

    Raises:
        MissingLibrary: detectron2 is not installed.
        UserError: as `plain_encoder`; a table that is not square; windows of two sizes.
    """
    vit = _library("detectron2", ".modeling.backbone.vit")
    known = _sizes(arguments)
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
    return _filled(model, tensors, "detectron2's ViT", norm_eps)


def file_encoder(path: Path, to: str, arguments: Mapping[str, Any], *, norm_eps: float = 1e-6) -> Encoder:
    """Load a written file or folder as its library's users do.

    Args:
        path: a file, or a folder whose config.json then tells the architecture.
        to: the target, see `TARGETS`.
        norm_eps: set in the layer norms where the file does not record it (everywhere but in transformers).

    Raises:
        MissingLibrary: the library is not installed, or too old.
        UserError: the library does not load the file, or not all of it.
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
        model = ViTEncoder(**_sizes(arguments))
    return _filled(model, encoder_tensors(read_weights(path)), "our ViTEncoder", norm_eps)


def source_encoder(
    path: Path,
    layout: str,
    tensors: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    *,
    norm_eps: float = 1e-6,
    class_token: bool = True,
) -> Encoder:
    """Load the source in its own library or timm.

    Transformers and timm load their folders, detectron2 relative positions, which timm does not have.

    Args:
        path: the source itself, a folder or its weight file.
        layout: see `Weights.layout`.
        tensors, arguments, norm_eps, class_token: see `plain_encoder`; not resampled.

    Raises:
        MissingLibrary: relative positions, and detectron2 is not installed.
        UserError: as `plain_encoder`.
    """
    if _relative_sides(tensors):
        tensors = {name: tensor for name, tensor in tensors.items() if name != "cls_token"}
        return detectron2_encoder(tensors, arguments, norm_eps=norm_eps)
    folder = path if path.is_dir() else path.parent
    whole = (folder / HUB_CONFIG).is_file() and any(folder.glob("*.safetensors"))
    if layout in HF_MODELS and class_token and whole:
        with suppress(MissingLibrary):
            return _transformers_encoder(folder, layout)
    if layout == "plain" and class_token and is_timm_folder(path):
        return _timm_source(path)
    return plain_encoder(tensors, arguments, norm_eps=norm_eps, class_token=class_token)


def _timm_source(path: Path) -> Encoder:
    model = timm_model(path.parent)
    model.reset_classifier(0)
    model.norm = model.fc_norm = nn.Identity()
    tensors = {name: tensor for name, tensor in read_tensors(path).tensors.items() if not name.startswith(_NOT_ENCODER)}
    return _filled(model, tensors, "timm's VisionTransformer", None)


@dataclass(frozen=True)
class _Named:
    """An encoder with the name of its code."""

    name: str
    model: nn.Module

    def __call__(self, imgs: Tensor) -> Tensor:
        with torch.no_grad():
            return _TOKENS[self.name](self.model.eval().to(imgs.dtype), imgs)


class _Unfilled(TorchFunctionMode):
    """A context whose modules have weights without memory, to be filled by assignment.

    `torch.device("meta")` would also affect constructors that compute numbers with tensors, as detectron2's does.
    Random weights of a ViT-L take five seconds and a gigabyte.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {}))


def _filled(model: nn.Module, tensors: Mapping[str, Tensor], name: str, norm_eps: float | None) -> Encoder:
    try:
        model.load_state_dict(dict(tensors), strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(f"{name} does not take these tensors: {_one_line(error)}") from None
    return _named(model, name, norm_eps)


def _named(model: nn.Module, name: str, norm_eps: float | None) -> Encoder:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and norm_eps is not None:
            module.eps = norm_eps
    return _Named(name, model)


def _timm_file(path: Path, arguments: Mapping[str, Any], norm_eps: float) -> Encoder:
    with _loading(path, "timm"):
        tensors = load_state_dict(str(path), weights_only=True)
    tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(_NOT_ENCODER)}
    return plain_encoder(tensors, arguments, norm_eps=norm_eps, class_token="cls_token" in tensors)


def _timm_folder(folder: Path, norm_eps: float) -> Encoder:
    if tuple(int(part) for part in re.findall(r"\d+", timm.__version__)[:3]) < _TIMM_FOLDERS:
        raise MissingLibrary("timm", f"{timm.__version__} does not read folders of safetensors")
    with _loading(folder, "timm"):
        model = create_model(f"local-dir:{folder}", pretrained=True)
    model.norm = nn.Identity()
    return _named(model, "timm's VisionTransformer", norm_eps)


def _transformers_encoder(folder: Path, layout: str) -> Encoder:
    transformers = _library("transformers")
    with _loading(folder, "transformers"), _quiet(transformers):
        # Weights that the folder lacks would be new and random, with no more than a warning.
        model, info = getattr(transformers, HF_MODELS[layout]).from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True, **_HF_OPTIONS[layout]
        )
    absent = sorted(name for name in info["missing_keys"] if not name.startswith("layernorm."))
    if absent:
        raise UserError(f"{folder}: transformers' {HF_MODELS[layout]} finds no {shorten(absent)} in it")
    model.layernorm = nn.Identity()
    return _Named(f"transformers' {HF_MODELS[layout]}", model)


def _vitmae_tokens(model: Any, imgs: Tensor) -> Tensor:
    # Patches are sorted by their noise before the last are masked: here none is, and they keep their order.
    noise = torch.arange(model.embeddings.patch_embeddings.num_patches, dtype=imgs.dtype)
    return model(imgs, noise=noise.expand(imgs.shape[0], -1)).last_hidden_state


_TOKENS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "our ViTEncoder": lambda model, imgs: model.features(model.embed(imgs), [model.depth - 1])[0],
    "timm's VisionTransformer": lambda model, imgs: model.forward_features(imgs),
    "detectron2's ViT": lambda model, imgs: model(imgs)["last_feat"].flatten(2).transpose(1, 2),
    "transformers' ViTModel": lambda model, imgs: model(imgs).last_hidden_state,
    "transformers' ViTMAEModel": _vitmae_tokens,
}


def _tokens(make: Callable[[], Encoder], images: list[Tensor], role: str) -> tuple[str, Tensor]:
    """Return an encoder's name and tokens, and free the encoder."""
    try:
        encoder = make()
        return getattr(encoder, "name", "an encoder"), torch.cat([encoder(image) for image in images], dim=1)
    except MissingLibrary:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"the encoder of the {role} cannot be run: {_one_line(error)}") from None


def _sizes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    absent = [key for key in _ENCODER_SIZES if key not in arguments]
    if absent:
        raise UserError(f"not all of the encoder's architecture is known: {', '.join(absent)} missing")
    known = {key: arguments[key] for key in _ENCODER_SIZES}
    return known if isinstance(known["img_size"], int) else known | {"img_size": tuple(known["img_size"])}


def _relative_sides(tensors: Mapping[str, Tensor]) -> dict[int, int]:
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
            raise MissingLibrary(library) from None
        raise MissingLibrary(library, f"needs {error.name}, which is not installed") from None
    except ImportError as error:
        raise MissingLibrary(library, f"cannot be imported: {_one_line(error)}") from None


@contextmanager
def _loading(path: Path, library: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        raise MissingLibrary(library, f"cannot be used: {_one_line(error)}") from None
    except Exception as error:
        raise UserError(f"{path}: {library} does not load it: {type(error).__name__}: {_one_line(error)}") from None


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
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
