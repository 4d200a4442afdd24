# SPDX-License-Identifier: Apache-2.0
"""The engine: what hooks do while a wrapped model runs."""
