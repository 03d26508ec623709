# SPDX-License-Identifier: Apache-2.0
"""What others watch pools by.

It owns the forms of other systems (Prometheus) and takes a pool's public events and numbers, never
its insides. It may import `nsbox.pool` and the rooms below.
"""
