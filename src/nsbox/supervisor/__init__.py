# SPDX-License-Identifier: Apache-2.0
"""The host's side of one environment: its launcher, its birth, its commands, its end.

It owns the connection to PID 1, the plan that a config becomes, standby environments, and evidence
for verdicts. It may import `nsbox.launcher`'s messages and the rooms below.
"""
