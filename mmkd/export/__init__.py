"""Writes a detector as a file for onnxruntime, and checks it."""
