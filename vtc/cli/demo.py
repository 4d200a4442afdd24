# SPDX-License-Identifier: Apache-2.0
"""``vtc demo``: the page in the browser."""

from __future__ import annotations

import os
import signal
import time
from typing import Annotated

import typer

from .common import Device, Mistake, command, device_of, err, out


@command
def demo(
    model: Annotated[
        str | None,
        typer.Option(help="Folder or hub id; default: the embedded models.", show_default=False),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Default: the first free one from 7860."),
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")
    ] = "127.0.0.1",
    device: Device = "auto",
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; with --model.")
    ] = "float32",
    share: Annotated[
        bool, typer.Option("--share", help="A public link through Gradio's servers.")
    ] = False,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="Run Python code that comes with the checkpoint."),
    ] = False,
) -> None:
    """The page in the browser: ask, compare methods, search images, with and without compression.

    Reached from this machine only; stop it with Ctrl-C.

    Example: vtc demo --port 7860
    """
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # torch's profiler, which counts the memory
    import gradio  # noqa: F401  before the models: a missing extra should not take seconds to say
    import transformers

    from ..demos.engine import Engine
    from ..demos.loading import embedded, other
    from ..demos.server import is_loopback, serving

    if dtype not in ("float32", "bfloat16", "float16"):
        raise Mistake(f'unknown dtype "{dtype}"; use float32, bfloat16 or float16')
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    place = device_of(device)
    try:
        models = [other(model, place, dtype, trust_remote_code)] if model else embedded(place)
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise Mistake(f"cannot load {model or 'the embedded models'}: {first}") from None
    engine = Engine(models)
    if not is_loopback(host) or share:
        err.print("anyone who reaches this page can use this machine to run the model")
    # Also a polite kill is to remove the uploads.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with serving(engine, host, port, share) as address:
            out.print(f"{address}  (Ctrl-C stops it)", highlight=False, soft_wrap=True)
            while True:
                time.sleep(3600)
    except OSError:
        where = f"{host}:{port or '7860 and up'}"
        raise Mistake(f"cannot listen on {where}; choose another --port or --host") from None
    except KeyboardInterrupt:
        out.print("stopped")
    finally:
        engine.close()
