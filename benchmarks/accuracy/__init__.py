# SPDX-License-Identifier: Apache-2.0
"""Accuracy: methods at budgets on the same questions, beside the stock model."""
