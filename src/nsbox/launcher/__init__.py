# SPDX-License-Identifier: Apache-2.0
"""The launcher: a small, single-threaded process that gives birth to environments.

Processes: **host** (the user's program) - **launcher** (one per host process, started on first
use) - **template** (started by the launcher; what environments are clones of) - **init** (PID 1 of
each environment) - **commands** (children of init). Beside the launcher stands its **janitor**,
which removes the launcher's cgroups when it is gone, whoever killed it.

What they say to each other has names and fields in `messages`, and its order is told by
docs/architecture.md. A birth and each request bring a socket for their answer, so that nothing is
kept open for an environment.

Asked for a birth the launcher sends what the clone needs to the template (`templates`), which
answers with its pid and pidfd (`template`). The host talks to init itself (`guest.init`): commands
and data never pass through launcher and template, of whose memory later environments are clones.
`birth` lists the steps of a birth, `server` those of the start; `resources` has what births take.
"""
