# SPDX-License-Identifier: Apache-2.0
"""The image encoder runs once for each batch of images, not once for each method."""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...adapters.locate import locate
from ...method import Method


@dataclass
class EncoderCache:
    """The stock work of an image encoder, done once for each batch of images.

    Attributes:
        tower: the module; layer: the hidden state that the model reads.
        looked_into: attention modules that some method captures.
        memory: of the last batch its key, the tower's output and the calls of those attention
            modules.
    """

    tower: Any
    layer: int
    looked_into: list[Any]
    memory: tuple[int, Any, list[tuple[tuple[Any, ...], dict[str, Any]]]] | None = None

    @classmethod
    def of(cls, model: Any, methods: Sequence[Method]) -> EncoderCache | None:
        """The encoder of a model as these methods see it; None where it cannot be remembered."""
        vision = locate(model).vision
        layer = getattr(model.config, "vision_feature_layer", None)
        if not isinstance(layer, int) or "forward" in vars(vision.tower):
            return None
        depth = len(vision.blocks)
        wanted = {i % depth for m in methods if leaves_encoder_alone(m) for i in m.captures(depth)}
        return cls(vision.tower, layer, [vision.blocks[i].attn for i in sorted(wanted)])

    @contextmanager
    def remembered(self, key: int) -> Iterator[None]:
        """Inside the block the tower's output comes from memory, or goes there if it is new.

        Only one batch is remembered: a new key forgets the last one.

        Hooks on the tower, on the captured attention modules and behind the tower see no
        difference; hooks on its blocks do not run.
        """
        forward = self.tower.forward
        if self.memory is not None and self.memory[0] != key:
            self.memory = None

        @functools.wraps(forward)
        def recall(*args: Any, **kwargs: Any) -> Any:
            if self.memory is None:
                calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
                hooks = [
                    module.register_forward_pre_hook(
                        lambda _, args, kwargs: calls.append((args, kwargs)),
                        with_kwargs=True,
                        prepend=True,
                    )
                    for module in self.looked_into
                ]
                try:
                    out = forward(*args, **kwargs)
                finally:
                    for hook in hooks:
                        hook.remove()
                if out.hidden_states is None:
                    return out
                wanted = self.layer % len(out.hidden_states)
                states = tuple(h if i == wanted else None for i, h in enumerate(out.hidden_states))
                stored = type(out)(last_hidden_state=out.last_hidden_state, hidden_states=states)
                self.memory = key, stored, calls
            else:
                for module, (given, named) in zip(self.looked_into, self.memory[2]):
                    if module._forward_pre_hooks:
                        module(*given, **named)
            return copy.copy(self.memory[1])

        self.tower.forward = recall
        try:
            yield
        finally:
            del self.tower.forward


def leaves_encoder_alone(method: Method) -> bool:
    """Whether a method leaves the encoder's work as it is."""
    return not method.stages & {"pixels", "vision"}
