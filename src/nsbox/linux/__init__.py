# SPDX-License-Identifier: Apache-2.0
"""The raw kernel: a function per system call, constants, parsers of /proc, prepared calls.

It owns ctypes and the C extension; it knows no policy, writes no log and tries nothing twice.
It may import `nsbox.errors`, and nothing that is slow to load: launcher and PID 1 start with it.
"""
