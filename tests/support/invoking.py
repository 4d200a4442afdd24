# SPDX-License-Identifier: Apache-2.0
"""What tests of cli share."""

from __future__ import annotations

from typer.testing import CliRunner

from vtc import cli


def invoke(*args: str):
    return CliRunner().invoke(cli.app, list(args))
