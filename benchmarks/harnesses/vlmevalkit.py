# SPDX-License-Identifier: Apache-2.0
"""VLMEvalKit on a model that vtc compresses: ``python -m vtc.benchmarks.harnesses.vlmevalkit``.

VLMEvalKit has no entry points: its ``run.py`` looks a model up in ``vlmeval.config.supported_VLM``,
or its class in ``vlmeval.vlm``. This script puts ours there and goes on with ``run.main()``, which
gets all further options. VLMEvalKit is not on PyPI: tested with a stand-in for that contract only.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import re
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .chat import MAX_NEW_TOKENS, ChatModel, summarize
from .model_args import parse


def model_class(base: type, made: list[Any]) -> type:
    """The class that VLMEvalKit makes models of; ``made`` gets each of them.

    Args:
        base: ``vlmeval.vlm.base.BaseModel``.
    """

    class VTC(base):  # type: ignore[misc, valid-type]
        """A model with or without a method; its arguments are those of `model_args`."""

        INTERLEAVE = True

        def __init__(self, max_new_tokens: int | str = MAX_NEW_TOKENS, **arguments: Any) -> None:
            super().__init__()
            loading, method = parse(arguments)
            device = loading.device or ("cuda" if torch.cuda.is_available() else "cpu")
            self.max_new_tokens = int(max_new_tokens)
            self.chat = ChatModel(*loading.load(torch.device(device)), method)
            made.append(self)

        def generate_inner(self, message: list[dict[str, str]], dataset: str | None = None) -> str:
            """The greedy answer to [{"type": "image" or "text", "value": path or text}]."""
            content = [{"type": m["type"], m["type"]: m["value"]} for m in message]
            chat = [{"role": "user", "content": content}]
            (answer,) = self.chat.answer(
                [chat], max_new_tokens=self.max_new_tokens, do_sample=False
            )
            return answer.text

    return VTC


def runner() -> Any:
    """VLMEvalKit's ``run.py`` as a module.

    Raises:
        ImportError: VLMEvalKit is not there; the message says how to get it.
    """
    how = (
        "get it as a clone: git clone https://github.com/open-compass/VLMEvalKit; "
        "pip install -e VLMEvalKit"
    )
    found = importlib.util.find_spec("vlmeval")
    if found is None or found.origin is None:
        raise ImportError(f"the package vlmeval is missing; {how}")
    path = Path(found.origin).parent.parent / "run.py"
    if not path.is_file():
        raise ImportError(f"{path} is missing, the script that VLMEvalKit is started with; {how}")
    spec: Any = importlib.util.spec_from_file_location("run", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m vtc.benchmarks.harnesses.vlmevalkit",
        description="Run VLMEvalKit on a model with a method; all other options are its own.",
        epilog="Example: python -m vtc.benchmarks.harnesses.vlmevalkit "
        "--data MMBench_DEV_EN --model-args "
        "pretrained=llava-hf/llava-1.5-7b-hf,method=visionzip,keep_ratio=0.25",
        allow_abbrev=False,
    )
    parser.add_argument("--model-args", help="model and method, as lmms-eval takes them")
    parser.add_argument("--model", help="name of the results; default: made of --model-args")
    args, others = parser.parse_known_args()
    if args.model_args is None and "--config" not in others:
        parser.error("give --model-args, or --config with models of class VTC")
    if args.model_args is not None:
        pairs = re.split(r",(?![^\[]*\])", args.model_args)  # no commas within brackets
        arguments = dict(pair.partition("=")[::2] for pair in pairs)
        # Results are filed, and reused, by this name.
        name = args.model or "vtc_" + re.sub(r"[^\w.=+-]+", "_", args.model_args)
        others += ["--model", name]
        try:
            parse({k: v for k, v in arguments.items() if k != "max_new_tokens"})
        except ValueError as error:
            parser.error(str(error))
    try:
        run = runner()  # first: it says which GPUs this process sees
    except ImportError as error:
        parser.error(str(error))
    made: list[Any] = []
    vlm: Any = importlib.import_module("vlmeval.vlm")
    vlm.VTC = model_class(importlib.import_module("vlmeval.vlm.base").BaseModel, made)
    if args.model_args is not None:
        supported = importlib.import_module("vlmeval.config").supported_VLM
        supported[name] = partial(vlm.VTC, **arguments)
    sys.argv = [str(run.__file__), *others]
    run.main()
    for model in made:
        print(f"vtc: {model.chat.session or 'uncompressed'}, {len(model.chat.facts)} prompts")
        if model.chat.facts:  # none where all results were there already
            for key, value in summarize(model.chat.facts).items():
                print(f"  {key} {value:.6g}")


if __name__ == "__main__":
    main()
