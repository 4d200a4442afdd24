# SPDX-License-Identifier: Apache-2.0
"""The command ``vtc`` as ``python -m vtc``."""

from .cli import main

main()
