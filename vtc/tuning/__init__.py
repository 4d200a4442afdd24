# SPDX-License-Identifier: Apache-2.0
"""Tuning: methods at equal cost, and the strongest compression within bounds."""
