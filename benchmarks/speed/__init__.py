# SPDX-License-Identifier: Apache-2.0
"""Speed and memory: what compression gains, layer by layer and as a whole."""
