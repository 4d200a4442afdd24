# SPDX-License-Identifier: Apache-2.0
"""`support.mini_families`, under the name by which scripts outside import it."""

from .support.mini_families import *  # noqa: F403
