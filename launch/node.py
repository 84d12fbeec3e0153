"""A node's part of a job on many: its ranks under the wrapper, for as long as the connection holds.

    python launch/node.py FOLDER PARENT

hostfile.py has put `job.json` into the folder: {command, environment, directory}. It holds secrets, so it is
removed as soon as it is read. `pid` is where hostfile.py finds this process to signal it. When ssh is gone,
be it by SIGKILL of what started the job, the ranks save and leave as after SIGTERM. PARENT is the process id
of sshd's end of the connection: where it is our parent no more, it was gone before we asked to be told.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import signal
import sys
from pathlib import Path

from supervise import PREEMPTED, listen, supervise

PR_SET_PDEATHSIG = 1  # of linux/prctl.h


def main() -> int:
    """Run the job in argv[1], as long as argv[2] lives."""
    folder, parent = Path(sys.argv[1]), int(sys.argv[2])
    try:
        received = listen()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGHUP)
        if os.getppid() != parent:
            return PREEMPTED
        job = json.loads((folder / "job.json").read_text())
        (folder / "job.json").unlink()
        (folder / "pid").write_text(str(os.getpid()))
        os.environ.update(job["environment"])
        os.chdir(job["directory"])
        return supervise(job["command"], received)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    sys.exit(main())
