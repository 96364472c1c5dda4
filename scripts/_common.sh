# shellcheck shell=bash
# Sourced by the scripts of this folder. Sets top (the clone's folder) and, in use_environment, python.

top=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

fail() {
    echo "$(basename "$0"): $*" >&2
    exit 2
}

# Whether a command is a Python of at least 3.10.
new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

# Makes .venv at the top, whole or not at all.
make_environment() {
    local candidate base=
    for candidate in python3.11 python3 python3.14 python3.13 python3.12 python3.10 python; do
        if command -v "$candidate" >/dev/null && new_enough "$candidate"; then
            base=$candidate
            break
        fi
    done
    [ -n "$base" ] || fail "Python 3.10 or newer is needed, and none is on the PATH (python3: $(python3 --version 2>/dev/null || echo none))"
    echo "making the environment .venv with $("$base" --version)"
    if ! "$base" -m venv "$top/.venv" >/dev/null 2>&1; then
        rm -rf "$top/.venv"
        fail "$base -m venv failed; on Debian and Ubuntu: sudo apt install python3-venv"
    fi
}

# What the installation depends on: pyproject.toml, and where this clone lies.
fingerprint() {
    "$python" - "$top" <<'PYTHON'
import hashlib, pathlib, sys

top = pathlib.Path(sys.argv[1])
print(hashlib.sha256((top / "pyproject.toml").read_bytes() + bytes(top)).hexdigest())
PYTHON
}

# Whether every package that lifequant names, those of the extras dev, demo and plot included, is there.
all_present() {
    "$python" - 2>/dev/null <<'PYTHON'
import re
from importlib import metadata

for requirement in metadata.requires("lifequant"):
    extra = re.search(r"extra == .(\w+)", requirement)
    if extra and extra[1] not in ("dev", "demo", "plot"):
        continue
    metadata.version(re.match(r"[\w.-]+", requirement)[0])
PYTHON
}

# Where the lifequant that the environment has comes from: a folder, an address, "a wheel", or nothing where it has none.
# -I: neither PYTHONPATH nor the folder that we are in counts.
installed_from() {
    "$python" -I - <<'PYTHON'
import json
from importlib import metadata
from urllib.parse import unquote

try:
    record = metadata.distribution("lifequant").read_text("direct_url.json")
except metadata.PackageNotFoundError:
    print()
else:
    url = json.loads(record)["url"] if record else "a wheel"
    print(unquote(url.removeprefix("file://")))
PYTHON
}

# Stops where somebody else's environment has lifequant from elsewhere: to install this clone would replace it.
spare_other_installation() {
    local folder=$1 origin
    origin=$(installed_from)
    [ -z "$origin" ] || [ "$origin" -ef "$top" ] || fail "the active environment $folder has lifequant from $origin, and installing this clone would replace it.
To use .venv of this clone instead: deactivate, then the same command again.
To replace it: $python -m pip install -e '$top', then the same command again."
}

# The active virtual environment, else .venv at the top, made where it is missing; installs what is missing or changed.
# A conda environment or the system's Python is left as it is: .venv is used there.
use_environment() {
    local folder=${VIRTUAL_ENV:-$top/.venv} stamp said
    [ -n "${VIRTUAL_ENV:-}" ] || [ -x "$folder/bin/python" ] || make_environment
    python=$folder/bin/python
    [ -x "$python" ] || fail "$folder is no virtual environment (it has no bin/python): deactivate it, or delete it"
    new_enough "$python" || fail "$folder has $("$python" --version 2>&1); Python 3.10 or newer is needed"
    [ "$folder" -ef "$top/.venv" ] || spare_other_installation "$folder"
    stamp=$folder/.lifequant-installed
    if [ "$(cat "$stamp" 2>/dev/null)" != "$(fingerprint)" ] || ! all_present; then
        echo "installing lifequant and what it needs into $folder"
        echo "(the first time: minutes)"
        said=$("$python" -m pip install --disable-pip-version-check -e "${top}[dev,demo,plot]" 2>&1) || {
            echo "$said" >&2
            fail "pip could not install what is needed (its message is above)"
        }
        fingerprint >"$stamp"
    fi
}
