#!/usr/bin/env bash
# Sets up the peers that BucketServe is measured against, each in a virtual environment of its own:
#   benchmarks/peers/setup.sh DIR        (about 4 GB; nothing is installed outside DIR)
set -euo pipefail
dir=${1:?usage: setup.sh DIR}
python=${PYTHON:-python3.11}
mkdir -p "$dir"

"$(dirname "$0")/../../scripts/vllm_env.sh" "$(realpath "$dir")/vllm" "$python"

# vLLM asks for tcmalloc; without apt-get it runs with the C library's allocator.
if command -v apt-get >/dev/null; then
  (cd "$dir" && apt-get download -q libtcmalloc-minimal4 && dpkg -x libtcmalloc-minimal4_*.deb tcmalloc) || true
fi

"$python" -m venv "$dir/transformers"
"$dir/transformers/bin/pip" install -q --disable-pip-version-check torch==2.13.0 transformers==5.23.0 psutil accelerate
echo "peers are ready in $dir"
