# SPDX-License-Identifier: Apache-2.0
"""Names that result files share."""

from __future__ import annotations

BASELINE = "uncompressed"
