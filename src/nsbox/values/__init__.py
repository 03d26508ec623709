# SPDX-License-Identifier: Apache-2.0
"""Frozen values that users make or get: configs, results, invocations; JSON as both sides read it.

It owns the checks of their fields and does no input or output. It may import `nsbox.seccomp`, whose
policies are fields of a config.
"""
