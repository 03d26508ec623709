# SPDX-License-Identifier: Apache-2.0
"""Entry point of the launcher process: ``python -I -S main.py SETTINGS``.

SETTINGS is JSON: the paths to import from, the descriptors and the pid of the host. With -I and
-S the interpreter starts without site-packages and user code, three times faster.
"""

import json
import sys

if __name__ == "__main__":
    settings = json.loads(sys.argv[1])
    sys.path[:0] = settings["paths"]
    from nsbox.launcher.server import main

    main(settings["channel"], settings["done"], settings["host"], settings)
