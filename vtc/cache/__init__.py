# SPDX-License-Identifier: Apache-2.0
"""KV caches that are physically short or hold packed bits."""
