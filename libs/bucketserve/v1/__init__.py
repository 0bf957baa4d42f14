"""Generated from protos/bucketserve/v1 by scripts/gen_protos.py; never edited."""
