"""CPU kernels of our own (kernels.cpp and its headers), compiled for the machine they run on, and decoder layers built from them."""
