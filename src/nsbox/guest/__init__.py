# SPDX-License-Identifier: Apache-2.0
"""What runs inside an environment: PID 1, and the worker that calls handlers.

It owns the frames between the host and the two. It may import `nsbox.linux`, `nsbox.isolation` and
`nsbox.values.json_text`: all of it is a clone of the template's memory, where each page counts.
"""
