# SPDX-License-Identifier: Apache-2.0
"""The launcher: a small, single-threaded process that gives birth to environments.

Processes: **host** (the user's program) - **launcher** (one per host process, started on first
use) - **init** (PID 1 of each environment, a clone of the launcher) - **commands** (children of
init). Beside the launcher stands its **janitor**, which removes the launcher's cgroups when it is
gone, whoever killed it.

Messages (`wire`; one SOCK_SEQPACKET datagram each, JSON with descriptors):

1. launcher -> host  ``user-namespace``  without root: "write my id maps"; host answers ``mapped``
2. launcher -> host  ``hello``           what this host can enforce
3. host -> launcher  ``birth``           spec + [control socket of init, supervision socket]
4. launcher -> host  ``born`` | ``failed``  on the supervision socket, with init's pidfd: cloned
5. init -> host      how much of /proc it has, on the control socket: it is locked in. The host
   reads that back from /proc/PID/status; where it may not look (hidepid) it asks for ``verify``
6. host -> launcher  ``freeze`` ``thaw`` ``close``  on the supervision socket; ``done`` | ``failed``
7. launcher -> host  ``gone``            on the supervision socket: the end of that environment

The host talks to init itself (`guest.init`): commands and data never pass through the launcher,
whose memory later environments are clones of. `birth` lists the steps of a birth in order.
"""
