# SPDX-License-Identifier: Apache-2.0
"""What runs inside an environment: PID 1. Everything here is a clone of the launcher's memory."""
