# SPDX-License-Identifier: Apache-2.0
"""What benchmarks share: prompts, budgets, names, columns, files."""
