# SPDX-License-Identifier: Apache-2.0
"""`ExecutionEnvironment` and `Process`, what is below these two public faces, and `run`.

It owns the states of an environment and which call is allowed in which. It may import
`nsbox.functions` and the rooms below.
"""
