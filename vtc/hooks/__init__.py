# SPDX-License-Identifier: Apache-2.0
"""Hooks: state of each thread, attention patched, attention rows read."""
