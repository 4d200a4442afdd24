# SPDX-License-Identifier: Apache-2.0
"""Parts that benchmarks share: prompts, budgets, names, columns, files."""
