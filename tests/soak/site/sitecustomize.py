"""First on PYTHONPATH of a launcher's job: its ranks then do what tests/ranks.py does in forked ones."""

import os
import sys

if "RANK" in os.environ and any(word.endswith("llmtrain.train") for word in sys.orig_argv):
    from tests.ranks import adapt

    adapt()
