# SPDX-License-Identifier: Apache-2.0
"""The launcher: a small, single-threaded process that gives birth to environments.

Processes: **host** (the user's program) - **launcher** (one per host process, started on first
use) - **template** (started by the launcher; what environments are clones of) - **init** (PID 1 of
each environment) - **commands** (children of init). Beside the launcher stands its **janitor**,
which removes the launcher's cgroups when it is gone, whoever killed it.

Messages of host and launcher (`wire`; one SOCK_SEQPACKET datagram each, JSON with descriptors):

1. launcher -> host  ``user-namespace``  without root: "write my id maps"; host answers ``mapped``
2. launcher -> host  ``hello``           what this host can enforce
3. host -> launcher  a birth             id, key of the spec (the spec itself the first time) +
   [control socket of init, a socket for this birth]
4. launcher -> host  ``born`` | ``failed`` | ``unknown-spec``  on the socket of the birth: cloned.
   There ``furnish`` may follow, answered by ``done`` or ``failed``, and ``keep`` or ``claim`` of a
   blank environment; then both ends are closed, and nothing is kept open for an environment
5. init -> host      on the control socket: how much of /proc it has, so that it is locked in; or
   which of its steps failed. The host reads the lock back from /proc/PID/status; where it may not
   look (hidepid) it asks for ``verify``
6. host -> launcher  ``freeze`` ``thaw`` ``verify`` ``close`` ``kill``  with the id, on a socket of
   all environments (`requests`) + [a socket for the answer]; ``done`` | ``failed``
7. launcher -> host  ``gone``            the answer to ``close``, when all is removed; with the last
   counters, if they were asked for. Without a socket ``close`` lets go of the environment

Between 3 and 4 the launcher sends what the clone needs to the template (`templates`), which answers
with its pid and pidfd (`template`). The host talks to init itself (`guest.init`): commands and data
never pass through launcher and template, of whose memory later environments are clones. `birth`
lists the steps of a birth in order.
"""
