# SPDX-License-Identifier: Apache-2.0
"""The isolation mechanisms, a module each; none depends on another.

It owns cgroups, namespaces, file system trees, privileges and their read-back. It may import
`nsbox.linux`; host and launcher both use it.
"""
