"""FP8 quantization of activations, gradients and weights, with a scale for each tile of 128."""
