# SPDX-License-Identifier: Apache-2.0
"""What this host can enforce, found out by trying it.

It owns the probes, which run in processes of their own (``python -m nsbox.host.probes``), and the
remedies; `nsbox doctor` prints them and tests skip by them. It may import all but `nsbox.cli`.
"""
