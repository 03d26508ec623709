# SPDX-License-Identifier: Apache-2.0
"""One module per mechanism that shuts an environment in; each knows the kernel, not each other."""
