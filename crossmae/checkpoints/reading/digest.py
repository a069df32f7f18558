"""A checksum inside weight files, because safetensors, plain pickles and old torch files have no checksum."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from crossmae.errors import UserError

DIGEST = "digest"  # key of the digest in the metadata
_KIND = "sha256:"  # prefix of the digest; no other value in our metadata has this prefix


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Compute SHA-256 over names, types, shapes, values and metadata without the digest."""
    names = sorted(tensors)
    described = [[name, str(tensors[name].dtype), list(tensors[name].shape)] for name in names]
    rest = sorted((key, value) for key, value in metadata.items() if key != DIGEST)
    found = hashlib.sha256(json.dumps([described, rest]).encode())
    for name in names:
        values = tensors[name].detach().cpu().contiguous().reshape(-1)  # copies only tensors that are not contiguous
        found.update(values.view(torch.uint8).numpy().data)
    return _KIND + found.hexdigest()


def signed(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """Compute the digest of the tensors, and add it to the metadata."""
    return {**metadata, DIGEST: digest(tensors, metadata)}


def check_digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], path: Path) -> dict[str, str]:
    """Return the metadata without the digest, after comparing the digest.

    Raises UserError if the recorded digest differs from the digest of the tensors. Without a recorded digest, nothing
    is compared.
    """
    recorded = {key: value for key, value in metadata.items() if key == DIGEST or value.startswith(_KIND)}
    rest = {key: value for key, value in metadata.items() if key not in recorded}
    if recorded:
        found = digest(tensors, rest)
        if recorded != {DIGEST: found}:  # under another key, the key itself was damaged
            raise UserError(
                f"{path}: the values are not those that were written (recorded digest "
                f"{min(recorded.values())[:23]}..., found {found[:23]}...): changed or damaged. "
                f"Copy or download it again; after a change on purpose, remove {DIGEST!r} from its metadata"
            )
    return rest
