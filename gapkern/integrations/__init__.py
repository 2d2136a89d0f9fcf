"""gapkern behind other libraries' interfaces; each module needs the library that it is named after."""
