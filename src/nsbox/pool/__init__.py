# SPDX-License-Identifier: Apache-2.0
"""Warm pools: who gets which environment, and when one goes.

It owns leases, queues, budgets and periodic work. It may import `nsbox.environment` and the rooms
below.
"""
