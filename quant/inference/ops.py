"""What the operations of a packed network mean, and how each is computed. `OPS` names them all.

An operation is made from its node once, when the network is loaded, and is then a function of tensors: images
(N, C, H, W), or rows (N, C), of float32. In a network on packed kernels images are channels_last from the first convolution
on, else in the format in which they come, so that all is computed as in training. Only `sign_conv2d` and `sign_linear` may
hand each other packed bits (int32, as `quant.kernels.pack_activations` makes them), or +1 and -1 without these kernels:

    sign_conv2d   y = conv2d(s, sign(w)) step + bias,  s = -1 where x < threshold, else +1 (threshold: 0, or one a channel)
                  with next_threshold: y = the signs (-1 below it, else +1) of the sums, one for each output channel
    affine        y = fma(x, scale, shift)                    a batch normalisation, to the bit what torch computes
    quantize      y = step clamp(round((x - offset) / step), low, high) + offset      (x inverse instead of / step, if given)

The sign of NaN is not defined: -1 in floats, as in training, whatever its bits make of it with packed kernels. What was NaN in
front of a binary layer is a number behind it, so look for NaN in the images, not in the logits.
"""

from quant.inference import pointwise, products
from quant.inference.registry import OPS, Make, Operation, Run

__all__ = ["OPS", "Make", "Operation", "Run", "pointwise", "products"]
