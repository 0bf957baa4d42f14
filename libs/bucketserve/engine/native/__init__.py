"""CPU kernels of our own (kernels.cpp), compiled for the machine they run on, and decoder layers built from them."""
