"""Quantizers: one file each, under the contract of base.py; layers.py puts them into a network."""
