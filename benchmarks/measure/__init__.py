# SPDX-License-Identifier: Apache-2.0
"""Measures: milliseconds, bytes, allocations."""
