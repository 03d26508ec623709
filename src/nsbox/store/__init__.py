# SPDX-License-Identifier: Apache-2.0
"""Code and layers on disk, by content.

It owns the store's directory: trees of read-only files, their integrity records, and what they are
made of (directories, archives). It may import `nsbox.linux`.
"""
