# SPDX-License-Identifier: Apache-2.0
"""The recipe that makes the embedded tiny models, and the functions that load them."""
