# SPDX-License-Identifier: Apache-2.0
"""Entry point of nsbox's own processes: ``python -I -S main.py ROLE HOST SETTING PATH...``.

ROLE is ``launcher`` or ``template`` and HOST the host's pid. SETTING is the launcher's range of
ids, ``FIRST:COUNT`` or empty, or the template's kind (`nsbox.launcher.template`). PATHs are
imported from. With -I and -S the interpreter starts without site-packages and user code, three
times faster. Descriptors are those of `nsbox.launcher.spawn`, in the order of the calls below.
"""

import os
import sys

if __name__ == "__main__":
    # Nothing of the host's: what is made for environments is for all to read, as what they make is.
    os.umask(0o022)
    os.chdir("/")
    role, host, setting, *paths = sys.argv[1:]
    sys.path[:0] = paths
    if role == "template":
        from nsbox.launcher.template import main as template_main

        template_main(lifeline=3, channel=4, kind=setting)
    else:
        from nsbox.launcher.server import main as launcher_main

        fds = (3, 4, 5)
        launcher_main(*fds, host_pid=int(host), id_range=setting, paths=paths)
