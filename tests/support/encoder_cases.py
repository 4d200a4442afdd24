# SPDX-License-Identifier: Apache-2.0
"""Recorder of what the views of one kind of stage show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from vtc.method import Method


@dataclass(frozen=True, kw_only=True)
class Rows(Method):
    """Record what the views of one kind of stage show."""

    seen: Any
    behind: bool = False
    proportional_attention: bool = False
    name = "test-rows"

    @property
    def stages(self) -> frozenset:
        return frozenset({"features" if self.behind else "vision"})

    def captures(self, depth: int) -> tuple[int, ...]:
        return tuple(range(depth)) if self.behind else ()

    def on_vision_layer(self, v: Any) -> None:
        self.seen.append(
            {
                "mean": v.key_mean,
                "key": v.key,
                "attention": v.attention,
                "cls": v.cls_attention if v.has_cls else None,
                "again": v.key.mean(1),
            }
        )

    def on_features(self, v: Any) -> None:
        for layer in range(v.depth):
            self.seen.append(
                {
                    "key": v.key(layer),
                    "received": v.attention_received(layer),
                    "cls": v.cls_attention(layer) if v.has_cls else None,
                    "logits": v.cls_logits(layer) if v.has_cls else None,
                }
            )
