"""TensorRT and TensorRT-RTX: typed graphs, and plans built where no GPU is."""
