"""launch/supervise.py for a PyTorchJob with restartPolicy ExitCode.

    python launch/supervise_kubeflow.py torchrun -m llmtrain.train ...

Kubeflow's training operator ends the job at an exit code of 1 to 127 and starts the pod again from 128 on
(IsRetryableExitCode). So 128 is added to what another start can cure: 85 becomes 213.
"""

from __future__ import annotations

import sys

from supervise import supervise

FINAL = 0, 73, 78, 87, 88
"""Done, and failures that the same command would meet again."""


def retryable(code: int) -> int:
    """The exit code as the operator reads it."""
    return code if code in FINAL or code >= 128 else code + 128


if __name__ == "__main__":
    sys.exit(retryable(supervise(sys.argv[1:])))
