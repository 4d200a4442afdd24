# SPDX-License-Identifier: Apache-2.0
"""Pages: results as HTML, Markdown and plots."""
