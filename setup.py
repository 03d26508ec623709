# SPDX-License-Identifier: Apache-2.0
"""The compiled parts, without which nsbox works as well, with more memory and slower JSON.

All else about the package is in setup.cfg.
"""

import re
from pathlib import Path

from setuptools import Extension, setup


def description() -> str:
    """Return README without links to files: a package index has none of them, the sdist all."""
    readme = Path(__file__).with_name("README.md").read_text("utf-8")
    return re.sub(r"!?\[([^]]*)\]\((?!#|https:)([^)#\s]+)[^)]*\)", _named, readme)


def _named(link: "re.Match[str]") -> str:
    label, path = link[1], link[2]
    return path if path.startswith(label) else f"{label}: {path}"


setup(
    long_description=description(),
    long_description_content_type="text/markdown",
    ext_modules=[
        Extension(
            "nsbox.linux._image",
            ["src/nsbox/linux/_image.c"],
            extra_compile_args=["-std=gnu11", "-Wall"],
            extra_link_args=["-Wl,-z,now"],  # why: at the head of the file
            py_limited_api=True,
            optional=True,
        ),
        Extension(
            "nsbox.values._json",
            ["src/nsbox/values/_json.c"],
            extra_compile_args=["-std=gnu11", "-Wall"],
            extra_link_args=["-Wl,-z,now"],
            py_limited_api=True,
            optional=True,
        ),
    ],
)
