# SPDX-License-Identifier: Apache-2.0
"""Reports: what ran, what it cost, where each token went."""
