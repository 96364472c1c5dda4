"""A trained network leaves: as an ONNX file whose convolutions are integer, checked against the network it was made of.

integers.py    every quantizer's values as a scale times integers
deploy.py      a copy of a network whose quantizers are placeholders, which torch.onnx takes into a graph
graph.py       edits that hold for every form: ReLU goes into the clamp of codes, dequantization moves down
fast.py        8 bits wherever training had no quantizer, so that onnxruntime fuses integer convolutions
exact.py       nothing is rounded that training did not round
lower.py       placeholders become ONNX's own operators
run.py         onnxruntime: predictions, ranges of tensors, what its optimized graph computes in integers
parity.py      both networks on the same images
onnx_file.py   all of it, in order
api.py         ``lifequant.export``, for any network of ``quantize_model``
trained.py     a run's network, and the images to check it with
command.py     the verb ``lifequant export``
"""
