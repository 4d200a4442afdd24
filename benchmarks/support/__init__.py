# SPDX-License-Identifier: Apache-2.0
"""Support: mini models, the masked oracle, and the matrices of what runs."""
