# SPDX-License-Identifier: Apache-2.0
"""The LLM's side of the engine: prompt, layers, KV cache."""
