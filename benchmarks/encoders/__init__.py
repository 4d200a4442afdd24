# SPDX-License-Identifier: Apache-2.0
"""Compressed image encoders: retrieval and classification."""
