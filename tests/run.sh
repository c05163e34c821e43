#!/usr/bin/env bash
# The test command: sets up what is missing, then runs pytest. Arguments go to pytest (-m "not slow" for the quick ones).
set -euo pipefail
cd "$(dirname "$0")/.."
source support/setup.sh
exec "$PYTHON" -m pytest -q "$@"
