"""CPU kernels of our own (kernels.cpp and its headers), compiled for the machine at hand, and layers built of them."""
