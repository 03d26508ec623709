# SPDX-License-Identifier: Apache-2.0
"""The old place of `nsbox.observe.prometheus`, kept for one release."""

from __future__ import annotations

import warnings

from nsbox.observe.prometheus import PoolCollector as PoolCollector

warnings.warn(
    "nsbox.prometheus is nsbox.observe.prometheus now; the old name goes with the next release",
    DeprecationWarning,
    stacklevel=2,
)
