# SPDX-License-Identifier: Apache-2.0
"""Serving the page: on this machine only unless asked otherwise, and nothing from outside."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware

from .app import build
from .engine import Engine
from .style import CSS, theme
from .uploads import MAX_BYTES

POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; "
    "connect-src 'self'; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
    "frame-ancestors 'self'; form-action 'self'"
)
SESSIONS = 24
"""Open pages whose last result can be redrawn; the one unused for longest goes first."""


NO_RECORDS = {
    "GRADIO_ANALYTICS_ENABLED": "False",
    # Gradio keeps thousands of past events and makes statistics of them at each new one.
    "GRADIO_ANALYTICS_MAX_EVENTS": "1",
    "GRADIO_ANALYTICS_CACHE_FREQUENCY": "1000000000",
}


class Guard:
    """ASGI middleware: a content security policy on every answer, no request body that is too
    large or of unknown length."""

    def __init__(self, app: Any) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        if scope["method"] in ("POST", "PUT", "PATCH"):
            length = headers.get(b"content-length", b"")
            if not length.isdigit():
                await _refuse(send, 411, b"a request body needs a Content-Length")
                return
            if int(length) > MAX_BYTES + 2**20:
                await _refuse(send, 413, b"the upload is too large")
                return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                extra = [
                    (b"content-security-policy", POLICY.encode()),
                    (b"referrer-policy", b"no-referrer"),
                    (b"x-content-type-options", b"nosniff"),
                ]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        await self.app(scope, receive, guarded)


async def _refuse(send: Any, code: int, text: bytes) -> None:
    headers = [(b"content-type", b"text/plain"), (b"connection", b"close")]
    await send({"type": "http.response.start", "status": code, "headers": headers})
    await send({"type": "http.response.body", "body": text})


def is_loopback(host: str) -> bool:
    """Whether a host name or address can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def serving(
    engine: Engine, host: str = "127.0.0.1", port: int | None = None, share: bool = False
) -> Iterator[str]:
    """Serve the page for the length of a ``with`` block; gives its address.

    Uploads and pictures go to a folder of their own, which is removed at the end.

    Args:
        port: None takes the first free one from 7860.
        share: a public link through Gradio's servers.

    Raises:
        OSError: the port is taken.
    """
    folder = tempfile.mkdtemp(prefix="vtc-demo-")
    page = None
    try:
        with _environment(GRADIO_TEMP_DIR=folder, **NO_RECORDS):
            page = build(engine)
            local = is_loopback(host) and not share
            hosts = ["127.0.0.1", "localhost", "[::1]", host] if local else ["*"]
            _, address, link = page.launch(
                server_name=host,
                server_port=port,
                share=share,
                prevent_thread_lock=True,
                quiet=True,
                show_error=False,
                max_file_size=MAX_BYTES,
                allowed_paths=[],
                state_session_capacity=SESSIONS,
                enable_monitoring=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                run_history=False,
                strict_cors=True,
                footer_links=[],
                theme=theme(),
                head=f"<style>{CSS}</style>",  # `css` would be confined to parts of the page
                app_kwargs={
                    "middleware": [
                        Middleware(TrustedHostMiddleware, allowed_hosts=hosts),
                        Middleware(Guard),
                    ]
                },
            )
            yield link or address
    finally:
        if page is not None:
            page.close(verbose=False)
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _environment(**settings: str) -> Iterator[None]:
    """Environment variables for the length of a ``with`` block."""
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
