# SPDX-License-Identifier: Apache-2.0
"""``python -m vtc.cli``."""

from . import main

main()
