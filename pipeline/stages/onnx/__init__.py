"""ONNX: exports of checkpoints, quantization, and the engines of ONNX Runtime."""
