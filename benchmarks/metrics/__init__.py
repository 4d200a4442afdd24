# SPDX-License-Identifier: Apache-2.0
"""Metrics: what an answer or a ranking is worth, and how sure that is."""
