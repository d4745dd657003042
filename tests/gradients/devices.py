"""Several devices in this process's memory, ``lazy:0``, ``lazy:1``, ...: what mixes two of them fails, as on GPUs.

A tensor there is a label on a tensor of the CPU, which computes. torch's device type "lazy" needs no driver, and its
backward passes run in the thread that asks for them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class Placed(Tensor):
    """A tensor that says it is on a device, and the one on the CPU that it is."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device) -> Placed:
        found: Placed = Tensor._make_wrapper_subclass(
            cls, held.shape, held.stride(), held.storage_offset(), dtype=held.dtype, device=device
        )
        found.held = held
        return found

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, arguments: Sequence[Any] = (), options: Any = None
    ) -> Any:
        return _call(function, arguments, options or {})


class Devices(TorchDispatchMode):
    """A context in which these devices are there."""

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Sequence[Any] = (), options: Any = None) -> Any:
        return _call(function, arguments, options or {})


def _call(function: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
    given = [leaf for leaf in tree_leaves((arguments, options)) if isinstance(leaf, Tensor)]
    # As on GPUs, a number on the CPU goes with every device. None is the CPU.
    places = {one.device if isinstance(one, Placed) else None for one in given if isinstance(one, Placed) or one.ndim}
    if len(places) > 1 and function not in _COPIES:
        raise RuntimeError(f"{function} mixes devices: {places}")
    place = options.get("device", given[0].device if function in _COPIES else next(iter(places), None))
    if options.get("device") is not None:
        options = {**options, "device": "cpu"}
    found = function(*tree_map(_held, arguments), **tree_map(_held, options))
    if place is None or torch.device(place).type != "lazy":
        return found
    known = {id(_held(one)): one for one in given}  # what is changed in place stays the object that it is
    return tree_map(
        lambda one: known.get(id(one), Placed(one, torch.device(place))) if isinstance(one, Tensor) else one, found
    )


def _held(value: Any) -> Any:
    return value.held if isinstance(value, Placed) else value
