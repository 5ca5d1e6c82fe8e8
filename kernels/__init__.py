"""Segmented LoRA operations: Triton kernels with the plain torch reference beside each."""
