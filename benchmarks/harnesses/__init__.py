# SPDX-License-Identifier: Apache-2.0
"""Evaluation harnesses of others, and chats with images for them."""
