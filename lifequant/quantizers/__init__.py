"""Quantizers: one file each, under the contract of base.py. qat/layers.py puts them into a network."""
