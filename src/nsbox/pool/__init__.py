# SPDX-License-Identifier: Apache-2.0
"""Warm pools: who gets which environment, and when one goes. Their public names are nsbox's."""
