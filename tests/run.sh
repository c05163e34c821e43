#!/usr/bin/env bash
# The test command: sets up what is missing, then runs pytest. Arguments go to pytest (-m "not slow" for the quick ones);
# without any, half of the slow tests run beside the others, a core each.
set -euo pipefail
cd "$(dirname "$0")/.."
source support/setup.sh
export OMP_NUM_THREADS=1 # the tests' models are too small for more: a second thread costs half of the time
[ $# -eq 0 ] || exec "$PYTHON" -m pytest -q "$@"

beside=(tests/test_processes.py tests/test_directory.py)
log=$(mktemp)
trap 'kill "$slow" 2>/dev/null || true; rm -f "$log"' EXIT
"$PYTHON" -m pytest -q -p no:cacheprovider -m slow "${beside[@]}" >"$log" 2>&1 &
slow=$!
code=0
"$PYTHON" -m pytest -q -m "not slow" || code=$?
"$PYTHON" -m pytest -q -m slow "${beside[@]/#/--ignore=}" || code=$?
wait "$slow" || code=$?
cat "$log"
exit "$code"
