# SPDX-License-Identifier: Apache-2.0
"""The encoder's side of the engine: pixels, blocks, image features."""
