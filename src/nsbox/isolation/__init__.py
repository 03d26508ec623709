# SPDX-License-Identifier: Apache-2.0
"""What shuts an environment in: one module per mechanism; each knows the kernel, not the others.

It owns cgroups, namespaces, file system trees, privileges and their read-back. It may import
`nsbox.linux`; host and launcher both use it.
"""
