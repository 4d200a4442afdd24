# SPDX-License-Identifier: Apache-2.0
"""The package's page: README.md without pictures and without links into the repository.

A package index shows only pictures that lie on a web server, and this repository names none. All
else stands in pyproject.toml.
"""

import re
from pathlib import Path


def page() -> str:
    """README.md as it reads outside of the repository."""
    text = Path(__file__).with_name("README.md").read_text("utf-8")
    text = re.sub(r"<!-- picture -->.*?<!-- /picture -->\n*", "", text, flags=re.DOTALL)
    text = re.sub(r"<!-- .*? -->\n", "", text)
    text = re.sub(r"\[([^\]]+)\]\((?!https?:|#)([^)]+)\)", _named, text)
    return text + "\nPictures, and the files named here, lie in the repository of this package.\n"


def _named(link: re.Match[str]) -> str:
    """A link into the repository as text: its words and, if they are not its name, the file."""
    words, file = link[1], link[2].split("#")[0]
    return words if file.endswith(words) else f"{words} (`{file}`)"


if __name__ == "__main__":
    from setuptools import setup

    setup(long_description=page(), long_description_content_type="text/markdown")
