# SPDX-License-Identifier: Apache-2.0
"""Tasks with ground truth for measuring what compression costs."""
