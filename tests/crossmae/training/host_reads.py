"""Operations that would make the host wait for a GPU, counted on the CPU."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

READS = {
    "_local_scalar_dense",  # item(), float(), bool()
    "is_nonzero",
    "equal",
    "nonzero",
    "masked_select",
    "unique_dim",
    "_unique2",
    "bincount",
    "repeat_interleave.Tensor",
    "lift_fresh",  # a tensor made of values of the host
}
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = ("tolist", "cpu", "numpy")  # no operations of a CPU


class HostReads(TorchDispatchMode):
    """Counter of operations that wait for the device, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()
        self.patched = {name: getattr(Tensor, name) for name in COPIES}

    def __enter__(self) -> HostReads:
        for name, method in self.patched.items():
            setattr(Tensor, name, self._counted(name, method))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        for name, method in self.patched.items():
            setattr(Tensor, name, method)
        super().__exit__(*error)

    def _counted(self, name: str, method: Any) -> Any:
        def count(*args: Any, **kwargs: Any) -> Any:
            self.found[name] += 1
            return method(*args, **kwargs)

        return count

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket.__name__
        if READS & {packet, f"{packet}.{func._overloadname}"}:
            self.found[packet] += 1
        if packet in INDEXING and any(one is not None and one.dtype in (torch.bool, torch.uint8) for one in args[1]):
            self.found["boolean index"] += 1
        return func(*args, **(kwargs or {}))
