# SPDX-License-Identifier: Apache-2.0
"""The launcher: a small, single-threaded process that gives birth to environments.

Processes: **host** (the user's program) - **launcher** (one per host process, started on first
use) - **template** (started by the launcher; what environments are clones of) - **init** (PID 1 of
each environment) - **commands** (children of init). Beside the launcher stands its **janitor**,
which removes the launcher's cgroups when it is gone, whoever killed it.

What they say to each other has names and fields in `messages`:

1. launcher -> host  `UserNamespace`: without root, "write my id maps"; the host answers `Mapped`
2. launcher -> host  `Hello`: what this host can enforce; or `Fatal`, with the step that failed
3. host -> launcher  `GiveBirth`: id, key of the spec (the spec itself the first time) +
   [control socket of init, a socket for this birth]
4. launcher -> host  `Born`, `Failed`, `UnknownSpec` or `NoDescriptors`, on the socket of the birth.
   There `Attach` may follow, answered by `Done` or `Failed`, and `Keep` or `Claim` of a standby
   environment; then both ends are closed, and nothing is kept open for an environment
5. init -> host      on the control socket: how much of /proc it has, so that it is locked in; or
   which of its steps failed. The host reads the lock back from /proc/PID/status; where it may not
   look (hidepid) it asks for `Verify`
6. host -> launcher  `Freeze`, `Thaw`, `Verify`, `Close`, `Kill`, with the id, on a socket of
   all environments + [a socket for the answer]; `Done` or `Failed`
7. launcher -> host  `Gone`: the answer to `Close`, when all is removed; with the last counters, if
   they were asked for. Without a socket `Close` lets go of the environment

Between 3 and 4 the launcher sends what the clone needs to the template (`templates`), which answers
with its pid and pidfd (`template`). The host talks to init itself (`guest.init`): commands and data
never pass through launcher and template, of whose memory later environments are clones. `birth`
lists the steps of a birth in order, `server` those of the start; `resources` has what births take.
"""
