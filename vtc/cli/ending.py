# SPDX-License-Identifier: Apache-2.0
"""Endings of ``vtc`` where something unexpected happens: sentences, the traceback on request.

Nothing but the standard library is imported here, so that a library that is missing or broken can
be named.
"""

from __future__ import annotations

import os
import sys
import traceback
from importlib import metadata

DISTRIBUTION = "visual-token-compression"
LONGEST = 300
"""Characters of a message that are printed."""


def main() -> None:
    """Run the command; anything unexpected ends it with exit code 1 and a few lines."""
    if sys.version_info < (3, 10):  # noqa: UP036 (a checkout that nobody installed)
        sys.exit("error: vtc needs Python 3.10 or newer, this is " + sys.version.split()[0])
    if "--traceback" in sys.argv[1:]:  # wherever it stands
        os.environ["VTC_TRACEBACK"] = "1"
        sys.argv[1:] = [word for word in sys.argv[1:] if word != "--traceback"]
    try:
        from . import app

        app()
    except Exception as error:
        print_traceback()
        print("\n".join(sentences(error)), file=sys.stderr)
        sys.exit(1)


def traceback_wanted() -> bool:
    """Whether VTC_TRACEBACK is set, by the caller or for --traceback."""
    return os.environ.get("VTC_TRACEBACK", "0") not in ("", "0")


def print_traceback() -> None:
    """The traceback of the exception that is being handled, if it is wanted."""
    if traceback_wanted():
        traceback.print_exc()


def sentences(error: Exception) -> list[str]:
    """Sentences on the error, on what of the environment does not fit, and on how to report it."""
    what = named(error)
    if isinstance(error, ImportError) and error.__cause__ is not None:
        # Libraries that import lazily say "could not import" of whatever it was.
        cause = error.__cause__
        while cause.__cause__ is not None:
            cause = cause.__cause__
        what = f"{what.rstrip('.')}, because of {named(cause)}"
    try:
        found = misfits()
    except Exception:  # a broken environment may break this, too
        found = []
    lines = [f"error: {what}", *found]
    if found or isinstance(error, ImportError):
        lines.append(
            '"pip install -c constraints.txt ." in a checkout of vtc installs releases that fit'
        )
    lines.append(
        '"vtc --traceback COMMAND ...", or VTC_TRACEBACK=1, shows the traceback for a bug report'
    )
    return lines


def named(error: BaseException) -> str:
    """The class and the first line of the message, shortened."""
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 4]} ..."
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def misfits() -> list[str]:
    """Libraries that are missing, or installed in a release that vtc or one of them excludes.

    The ranges are those of the installed distributions, for vtc itself what pyproject.toml says.
    """
    from packaging.requirements import Requirement

    try:
        extras = metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:  # a checkout that was put on sys.path
        return []
    found, todo = [], [DISTRIBUTION]
    for owner in todo:
        ours = owner == DISTRIBUTION
        # What only an extra of vtc asks for may be missing, but must fit if it is there.
        wishes = ["", *extras] if ours else [""]
        for wanted in map(Requirement, metadata.requires(owner) or []):
            marker = wanted.marker
            asking = [e for e in wishes if marker is None or marker.evaluate({"extra": e})]
            if not asking or wanted.name == DISTRIBUTION:
                continue
            who = "vtc" if ours else owner
            try:
                release = metadata.version(wanted.name)
            except metadata.PackageNotFoundError:
                if "" in asking:
                    found.append(f"{wanted.name} is not installed, and {who} needs it")
                continue
            if not wanted.specifier.contains(release, prereleases=True):
                bounds = ", ".join(sorted(map(str, wanted.specifier), reverse=True))
                verb = "is tested with" if ours else "needs"
                found.append(f"{wanted.name} {release} is installed, and {who} {verb} {bounds}")
            if wanted.name not in todo:
                todo.append(wanted.name)
    return list(dict.fromkeys(found))
