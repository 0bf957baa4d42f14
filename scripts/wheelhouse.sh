#!/usr/bin/env bash
# Fills wheels/ with everything that the images install, so that they build without a network:
#   scripts/wheelhouse.sh && docker compose build --build-arg PIP_OPTIONS=--no-index
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
# async-timeout: redis-py needs it below Python 3.11.3, which some base images have.
"$python" -m pip download --quiet --disable-pip-version-check -c constraints.txt -d wheels \
  '.[gateway,scheduler,worker]' async-timeout hatchling
rm -f wheels/bucketserve-*
echo "$(find wheels -name '*.whl' | wc -l) wheels, $(du -sh wheels | cut -f1)"
