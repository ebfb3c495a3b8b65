"""Export a trained network to ONNX, PyTorch or NumPy: ``python -m distdl.export``."""
