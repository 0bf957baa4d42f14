"""Generated from protos/bucketserve/facades by scripts/gen_protos.py; never edited."""
