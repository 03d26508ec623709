# SPDX-License-Identifier: Apache-2.0
"""System call filters: a policy becomes the bytes of a BPF program.

It owns the profiles, OCI's JSON form, libseccomp (in a child process only) and the cache of
compiled filters. It may import `nsbox.linux`.
"""
