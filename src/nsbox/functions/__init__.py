# SPDX-License-Identifier: Apache-2.0
"""The host's side of one function in one environment.

It owns functions and their versions, what is sent at a deployment and with an event, and the
exchange of frames with the worker. It may import `nsbox.supervisor` and the rooms below.
"""
