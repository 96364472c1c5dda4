"""Architectures: one explicit file each. A model receives a quantization scheme, it doesn't choose one."""
