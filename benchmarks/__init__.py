# SPDX-License-Identifier: Apache-2.0
"""What nsbox costs, beside its peers, in one interleaved run. `python -m benchmarks --help`."""
