"""The forward pass in one C++ file, compiled when the project is installed; the same step contract as the torch model."""
