# SPDX-License-Identifier: Apache-2.0
"""The raw kernel: `constants`, `calls` (one function per system call) and `proc` (parsers).

The lowest room: it knows no policy, writes no log and tries nothing twice. The launcher imports
it at start-up, so its modules import nothing that is slow to load.
"""
