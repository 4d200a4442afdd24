# SPDX-License-Identifier: Apache-2.0
"""``python -m vtc.cli``."""

import sys

from . import app

sys.exit(app())
