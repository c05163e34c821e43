# Sourced from the root by train.sh and tests/run.sh: leaves in $PYTHON an interpreter that has the pinned packages.
# An environment that has them is used as it is (slightly other versions too); otherwise .venv is made and filled.

has_packages() {
    "$1" - 2>/dev/null <<'PY'
from importlib.metadata import version
need = {"torch": (2, 11), "transformers": (5, 17), "safetensors": (0, 4), "pillow": (10, 1), "numpy": (1, 26), "tqdm": (4,), "pytest": (7,)}
for name, least in need.items():
    assert tuple(int(part) for part in version(name).split("+")[0].split(".")[:2] if part.isdigit()) >= least, name
PY
}

PYTHON=${PYTHON:-$(command -v python3 || command -v python || true)}
if [ -z "$PYTHON" ] || ! "$PYTHON" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
    echo "Python 3.11 or newer is needed; set PYTHON to one" >&2
    exit 1
fi
if ! has_packages "$PYTHON"; then
    if ! has_packages .venv/bin/python; then
        echo "setting up .venv with the packages of requirements.txt"
        "$PYTHON" -m venv .venv || { echo "python3-venv is missing; install it (Debian: apt install python3-venv)" >&2; exit 1; }
        .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
    fi
    PYTHON=$PWD/.venv/bin/python
fi
