# SPDX-License-Identifier: Apache-2.0
"""Trained routers of mixture-of-depths models, from files or state dicts."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor


class Routers(dict[int, Tensor]):
    """Router weights (D,) by LLM layer."""

    def __repr__(self) -> str:
        return f"<routers of layers {', '.join(map(str, sorted(self)))}>"

    def __hash__(self) -> int:  # type: ignore[override]
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    @classmethod
    def read(cls, source: str | os.PathLike[str] | Mapping[Any, Tensor]) -> Routers:
        """Routers from a safetensors file, a state dict, or a mapping of layers to weights.

        The layer is the first whole number in a name, as in "layers.3.router.weight"; biases and
        what is no vector are left out.

        Raises:
            ValueError: not such a file, no router weights in it, or two for one layer.
        """
        if isinstance(source, str | os.PathLike):
            from safetensors import SafetensorError
            from safetensors.torch import load_file

            try:
                source = load_file(source)
            except SafetensorError as error:
                raise ValueError(
                    f"{source} is no safetensors file ({error}); save routers with "
                    "safetensors.torch.save_file, pickles are not read"
                ) from error
        if not isinstance(source, Mapping) or not all(
            isinstance(x, Tensor) for x in source.values()
        ):
            raise ValueError(
                "routers are {layer: (D,) weights}, a state dict or a safetensors file; "
                f"got {source!r:.60}"
            )
        found = cls()
        for name, weight in source.items():
            number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", str(name))
            vector = weight.dim() == 1 or (weight.dim() == 2 and weight.shape[0] == 1)
            if number is None or not vector or str(name).endswith("bias"):
                continue
            layer = int(number[1])
            if layer in found:
                raise ValueError(f"two router weights for layer {layer}, the second is {name!r}")
            found[layer] = weight.detach().flatten().float()
        if not found:
            raise ValueError(
                'no router weights found; expected {layer: (D,)} or names like "layers.3.weight"'
            )
        return found
