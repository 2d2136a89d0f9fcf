// Makes the library a Python module, which the hub's loader imports; the operators register themselves as it is loaded.
#include "registration.h" // kernel-builder writes it

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
