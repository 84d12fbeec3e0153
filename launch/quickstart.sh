#!/usr/bin/env bash
# From nothing to a trained, evaluated model: set up, prepare text, train a tokenizer and a small decoder, report.
#
#   bash launch/quickstart.sh [hydra overrides]
set -euo pipefail
echo "llmtrain quickstart: set up (a minute the first time), prepare text, train a small model (2 to 3 minutes on" \
    "2 CPU cores), evaluate it, write a report."
exec bash "$(dirname "${BASH_SOURCE[0]}")/local.sh" experiment=quickstart "$@"
