"""The equality check of a conversion: run the source encoder and the written encoder on the same random images.

Each encoder runs in the code of the library that its users load it with. So the check covers names, layouts, numbers of
heads, epsilons and configuration files. Symbols in shapes: B batch, C channels, H and W height and width in pixels, E
width, N tokens.
"""

from __future__ import annotations

import importlib
import inspect
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

from crossmae.checkpoints.conversion import TOLERANCE
from crossmae.checkpoints.formats.timm_folder import is_timm_folder, timm_model
from crossmae.checkpoints.reading.files import HUB_CONFIG, read_tensors
from crossmae.checkpoints.resample import window_of
from crossmae.checkpoints.weights import encoder_tensors, read_weights
from crossmae.errors import UserError, shorten
from crossmae.models.encoder import ViTEncoder, patch_grid
from crossmae.models.linear import torch_products

HF_MODELS = {"hf-vit": "ViTModel", "hf-vitmae": "ViTMAEModel"}
_ENCODER_SIZES = tuple(key for key in inspect.signature(ViTEncoder).parameters if key != "class_tokens")
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
    """The error for a library that the equality check needs and cannot use."""

    def __init__(self, library: str, reason: str = "is not installed") -> None:
        super().__init__(f"{library} {reason} ({_REMEDIES[library]})")
        self.library = library


@dataclass(frozen=True)
class Encoder:
    """An encoder in the code of a library. A call runs it on images (B, C, H, W).

    Attributes:
        name: name of the library and its model, for people.
        tokens: function of the model and images (B, C, H, W). It returns the tokens (B, N, E) of the last block, before
            any final norm.
    """

    name: str
    model: nn.Module
    tokens: Callable[[Any, Tensor], Tensor]

    def __call__(self, imgs: Tensor) -> Tensor:
        with torch.no_grad(), torch_products():
            return self.tokens(self.model.eval().to(imgs.dtype), imgs)


@dataclass(frozen=True)
class Proof:
    """The result of an equality check of two encoders.

    Attributes:
        ran: false if a library is missing, so that nothing was compared.
        source, target: names of the models, for example "timm's VisionTransformer".
        what: description of the compared tokens and the images.
        max_difference: largest absolute difference between the tokens, or None if nothing was compared.
        largest: largest absolute value in the tokens of the source, or None if nothing was compared.
        tolerance: bound of `max_difference`, relative to `largest` or to 1, whichever is larger.
        reason: why the check did not run, or the failure other than a difference; else "".
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
        """True if the tokens are equal within the tolerance."""
        if self.max_difference is None or self.largest is None:
            return False
        return self.max_difference <= self.tolerance * max(1.0, self.largest)

    def sentence(self) -> str:
        """Describe the result in one line."""
        if not self.ran:
            return f"proof        not run: {self.reason}"
        if self.max_difference is None or self.largest is None:
            return f"proof        FAILED: {self.reason}"
        between = f"between {self.source} (source) and {self.target} (file), {self.what}"
        if self.max_difference == 0:
            return f"proof        outputs bit-equal, values up to {self.largest:.2g}, {between}"
        verdict = "equal" if self.equal else "NOT EQUAL"
        return (
            f"proof        max difference {self.max_difference:.2g} of values up to {self.largest:.2g} {between}, "
            f"tolerance {self.tolerance:.2g} of the largest value (at least of 1): {verdict}"
        )

    def record(self) -> dict[str, Any]:
        """Return the result for the JSON report."""
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

    Every weight affects the comparison, except the biases of the keys: softmax removes their effect.

    Args:
        source, target: functions that build the encoders. The target is built first, because its library may be
            missing. Only one encoder is in memory at a time.
        size: height and width in pixels of each image, see `image_size`.
        in_chans: channels of the images.
        what: name of the compared tokens, for the report.
        tolerance: see `Proof`.

    Returns:
        The result. It is not `equal` if a library cannot load or run the file, if the shapes differ, or if the tokens
        have NaN or infinity.
    """
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(1, in_chans, *sides, generator=generator, dtype=torch.float32) for sides in size]
    given = " and ".join(f"one random image of {height} x {width}" for height, width in size)
    proof = Proof(True, "", "", f"{what} of {given}", tolerance=tolerance)
    with torch.random.fork_rng(devices=[]):
        try:
            target_name, found = _tokens(target, images, "file")
            source_name, expected = _tokens(source, images, "source")
        except UserError as error:
            return replace(proof, ran=not isinstance(error, MissingLibrary), reason=str(error))
    proof = replace(proof, source=source_name, target=target_name)
    source_name, target_name = f"{source_name} (source)", f"{target_name} (file)"
    if found.shape != expected.shape:
        shapes = f"of shape {tuple(expected.shape)} and {tuple(found.shape)}"
        return replace(proof, reason=f"tokens {shapes} from {source_name} and {target_name}")
    for name, tokens in ((source_name, expected), (target_name, found)):
        if not bool(torch.isfinite(tokens).all()):
            return replace(proof, reason=f"NaN or infinity in the tokens of {name}")
    difference, largest = float((expected - found).abs().max()), float(expected.abs().max())
    return replace(proof, max_difference=difference, largest=largest)


def image_size(tensors: Mapping[str, Tensor], arguments: Mapping[str, Any]) -> list[tuple[int, int]]:
    """Choose (height, width) of images that use every position embedding.

    Without relative positions, one image of the pretraining size is enough. Relative positions may be for larger
    images. Then one image has the full height and another the full width, because a square of the full size would need
    gigabytes and minutes in detectron2.
    """
    size = arguments["img_size"]
    height, width = (size, size) if isinstance(size, int) else size
    sides = sorted(set(_relative_sides(tensors).values()))
    if not sides:
        return [(height, width)]
    *windows, whole = (side * arguments["patch_size"] for side in sides)
    narrow = max([height, *windows])
    return [(whole, narrow), (narrow, whole)] if narrow < whole else [(whole, whole)]


def plain_encoder(tensors: Mapping[str, Tensor], arguments: Mapping[str, Any], *, norm_eps: float = 1e-6) -> Encoder:
    """Build timm's VisionTransformer with the given tensors.

    Args:
        tensors: tensors of an encoder under plain names, of any floating type. They are not copied. Without a class
            token (a dense backbone), the row of the class token in `pos_embed` is left out. Of several class tokens,
            the first is timm's, and the others are timm's registers.
        arguments: constructor arguments of `ViTEncoder`.
        norm_eps: epsilon of the layer norms.
    """
    known, class_token = _sizes(arguments), "cls_token" in tensors
    rows = math.prod(patch_grid(known["img_size"], known["patch_size"]))
    if not class_token and tensors["pos_embed"].shape[1] == 1 + rows:
        tensors = {**tensors, "pos_embed": tensors["pos_embed"][:, 1:]}
    if registers := tensors["cls_token"].shape[1] - 1 if class_token else 0:
        row, patches = tensors["pos_embed"][:, :1], tensors["pos_embed"][:, 1:]
        first, others = (tensors["cls_token"] + row).tensor_split([1], dim=1)
        tensors = {**tensors, "cls_token": first, "reg_token": others, "pos_embed": patches}
    options: dict[str, Any] = {"num_classes": 0, "global_pool": "", "class_token": class_token, "weight_init": "skip"}
    with _Unfilled():
        model = VisionTransformer(**known, **options, reg_tokens=registers, no_embed_class=registers > 0)
    return _filled(_timm(model, norm_eps), tensors)


def detectron2_encoder(
    tensors: Mapping[str, Tensor], arguments: Mapping[str, Any], *, norm_eps: float = 1e-6
) -> Encoder:
    """Build detectron2's ViT, which has no class token, with the given tensors.

    The sizes of the relative position tables show the attention windows. Blocks with the smaller tables attend within
    windows of that size. If all tables have one size, or there are no tables, every block attends to the whole image.

    Args:
        tensors: tensors of an encoder under plain names, without a class token. `pos_embed` may have the row of the
            class token.
        arguments, norm_eps: see `plain_encoder`. ViTDet's configurations use 1e-6, unlike detectron2's class.

    Raises:
        MissingLibrary: detectron2 cannot be imported.
        UserError: the grid is not square, there are windows of several sizes, or the tensors do not fit.
    """
    vit = _library("detectron2", ".modeling.backbone.vit")
    known = _sizes(arguments)
    rows, columns = patch_grid(known["img_size"], known["patch_size"])
    if rows != columns:
        raise UserError(f"pos_embed: detectron2's ViT needs a square, not {rows} x {columns} patches. Set img_size.")
    sides = _relative_sides(tensors)
    smaller = sorted(set(sides.values()))[:-1]
    if len(smaller) > 1:
        raise UserError(f"rel_pos: windows of {smaller}, but detectron2's ViT has one size. Use one window size.")
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
    _set_epsilon(model, norm_eps)
    tokens = lambda vit, imgs: vit(imgs)["last_feat"].flatten(2).transpose(1, 2)  # noqa: E731
    return _filled(Encoder("detectron2's ViT", model, tokens), tensors)


def file_encoder(path: Path, to: str, arguments: Mapping[str, Any], *, norm_eps: float = 1e-6) -> Encoder:
    """Load a written file or folder as users of its library do.

    Args:
        path: the written file or folder.
        to: name of the target, see `TARGETS`.
        arguments, norm_eps: see `plain_encoder`. Folders of transformers record their epsilon.
    """
    if to in HF_MODELS:
        return _transformers_encoder(path, to)
    if to == "timm" and path.is_dir():
        return _timm_folder(path, norm_eps)
    if to == "timm":
        with _loading(path, "timm"):
            tensors = load_state_dict(str(path), weights_only=True)
        return plain_encoder(_without_heads(tensors), arguments, norm_eps=norm_eps)
    if to == "detectron2":
        _library("detectron2")  # before a large file is read
    tensors = encoder_tensors(read_weights(path))
    if to == "detectron2":
        return detectron2_encoder(tensors, arguments, norm_eps=norm_eps)
    if "cls_token" not in tensors:  # a ViTEncoder always has a class token
        return plain_encoder(tensors, arguments, norm_eps=norm_eps)
    with _Unfilled():
        model = ViTEncoder(**_sizes(arguments), class_tokens=tensors["cls_token"].shape[1])
    _set_epsilon(model, norm_eps)
    tokens = lambda vit, imgs: vit.features(vit.embed(imgs), [vit.depth - 1])[0]  # noqa: E731
    return _filled(Encoder("our ViTEncoder", model, tokens), tensors)


def source_encoder(
    path: Path,
    layout: str,
    tensors: Mapping[str, Tensor],
    arguments: Mapping[str, Any],
    *,
    norm_eps: float = 1e-6,
) -> Encoder:
    """Build the source encoder in the code of a suitable library.

    | source                                           | library                        |
    | ------------------------------------------------ | ------------------------------ |
    | tensors with relative positions                  | detectron2 (timm has none)     |
    | a folder of transformers, where it is installed  | transformers                   |
    | a folder of timm                                 | timm, by the folder's config   |
    | any other source                                 | timm, from the given tensors   |

    Args:
        path: weight file of the source.
        layout: layout of the file, see `Weights.layout`. "" means that the tensors differ from the file, for example
            after resampling. Then the file itself is not loaded.
        tensors, arguments, norm_eps: see `plain_encoder`.
    """
    if _relative_sides(tensors):
        return detectron2_encoder(tensors, arguments, norm_eps=norm_eps)
    class_token = "cls_token" in tensors  # which the encoders of these folders have
    whole = (path.parent / HUB_CONFIG).is_file() and any(path.parent.glob("*.safetensors"))
    if layout in HF_MODELS and class_token and whole:
        with suppress(MissingLibrary):
            return _transformers_encoder(path.parent, layout)
    if layout == "plain" and class_token and is_timm_folder(path):
        model = timm_model(path.parent)
        model.reset_classifier(0)
        model.fc_norm = nn.Identity()
        return _filled(_timm(model, None), _without_heads(read_tensors(path).tensors))
    return plain_encoder(tensors, arguments, norm_eps=norm_eps)


class _Unfilled(TorchFunctionMode):
    """A context that builds modules with weights on the meta device, to be filled by assignment.

    Random weights of a ViT-L would take five seconds and a gigabyte. `torch.device("meta")` is not used, because it
    also affects tensors that a constructor computes numbers with, as in detectron2.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return func(*args, **(kwargs or {}) | ({"device": "meta"} if func is torch.empty else {}))


def _filled(encoder: Encoder, tensors: Mapping[str, Tensor]) -> Encoder:
    try:
        encoder.model.load_state_dict(dict(tensors), strict=True, assign=True)
    except RuntimeError as error:
        raise UserError(f"{encoder.name} does not take these tensors: {_one_line(error)}") from None
    return encoder


def _set_epsilon(model: nn.Module, norm_eps: float | None) -> None:
    for module in model.modules():
        if isinstance(module, nn.LayerNorm) and norm_eps is not None:
            module.eps = norm_eps


def _timm(model: nn.Module, norm_eps: float | None) -> Encoder:
    model.norm = nn.Identity()
    _set_epsilon(model, norm_eps)
    return Encoder("timm's VisionTransformer", model, lambda vit, imgs: vit.forward_features(imgs))


def _without_heads(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if not name.startswith(_NOT_ENCODER)}


def _timm_folder(folder: Path, norm_eps: float) -> Encoder:
    if tuple(int(part) for part in re.findall(r"\d+", timm.__version__)[:3]) < _TIMM_FOLDERS:
        raise MissingLibrary("timm", f"{timm.__version__} does not read folders of safetensors")
    with _loading(folder, "timm"):
        model = create_model(f"local-dir:{folder}", pretrained=True)
    return _timm(model, norm_eps)


def _transformers_encoder(folder: Path, layout: str) -> Encoder:
    transformers = _library("transformers")
    with _loading(folder, "transformers"), _quiet(transformers):
        # transformers only warns about missing weights, and fills them with random values.
        model, info = getattr(transformers, HF_MODELS[layout]).from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, output_loading_info=True, **_HF_OPTIONS[layout]
        )
    absent = sorted(name for name in info["missing_keys"] if not name.startswith("layernorm."))
    if absent:
        raise UserError(f"{folder}: transformers' {HF_MODELS[layout]} needs {shorten(absent)}, which the folder lacks")
    model.layernorm = nn.Identity()
    tokens = _vitmae_tokens if layout == "hf-vitmae" else lambda vit, imgs: vit(imgs).last_hidden_state
    return Encoder(f"transformers' {HF_MODELS[layout]}", model, tokens)


def _vitmae_tokens(model: Any, imgs: Tensor) -> Tensor:
    # The model sorts patches by noise and masks the last ones. Ascending noise keeps the order; no patch is masked.
    noise = torch.arange(model.embeddings.patch_embeddings.num_patches, dtype=imgs.dtype)
    return model(imgs, noise=noise.expand(imgs.shape[0], -1)).last_hidden_state


def _tokens(make: Callable[[], Encoder], images: list[Tensor], role: str) -> tuple[str, Tensor]:
    try:
        encoder = make()
        return encoder.name, torch.cat([encoder(image) for image in images], dim=1)
    except MissingLibrary:
        raise
    except (AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"the encoder of the {role} cannot be run: {_one_line(error)}") from None


def _sizes(arguments: Mapping[str, Any]) -> dict[str, Any]:
    known = {key: arguments[key] for key in _ENCODER_SIZES}
    return known if isinstance(known["img_size"], int) else known | {"img_size": tuple(known["img_size"])}


def _relative_sides(tensors: Mapping[str, Tensor]) -> dict[int, int]:
    found = {name: _RELATIVE.fullmatch(name) for name in tensors}
    return {int(match[1]): window_of(tensors[name]) for name, match in found.items() if match}


def _library(library: str, module: str = "") -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # detectron2 turns warnings on and then imports a module that timm has moved. Importing it first is silent.
            if library == "detectron2":
                importlib.import_module("timm.models.layers")
            return importlib.import_module(library + module)
    except ImportError as error:
        absent = isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] == library
        reason = "is not installed" if absent else f"cannot be imported: {_one_line(error)}"
        raise MissingLibrary(library, reason) from None


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
