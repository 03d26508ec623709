# SPDX-License-Identifier: Apache-2.0
"""The compiled part, without which nsbox works as well, with more memory for each environment.

All else about the package is in setup.cfg.
"""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "nsbox.linux._image",
            ["src/nsbox/linux/_image.c"],
            extra_compile_args=["-std=gnu11", "-Wall"],
            extra_link_args=["-Wl,-z,now"],  # why: at the head of the file
            py_limited_api=True,
            optional=True,
        )
    ]
)
