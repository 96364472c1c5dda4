"""Lifelong quantization-aware training: ProxQ and BaLL on small quantized networks."""
