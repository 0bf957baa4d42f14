"""What the transformers engine does on CUDA: attention by Triton kernels over KV pages, and graphs of decode steps."""
