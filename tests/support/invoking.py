# SPDX-License-Identifier: Apache-2.0
"""Caller of the command line."""

from __future__ import annotations

from typer.testing import CliRunner

from vtc import cli


def invoke(*args: str):
    return CliRunner().invoke(cli.app, list(args))
