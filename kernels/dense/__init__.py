"""Dense products and row sums whose bits do not depend on the batch: `--deterministic` is built on them.

Row t of a result follows from row t of the input, the weights and their shapes alone; neither how many rows there are,
nor where t lies among them, nor what the others hold changes a bit. `torch_tiles` is for the CPU, `triton_product` for
cards, `torch_lora` and `reference` are built on the same promise.
"""

from .reference import product_reference, row_mean_reference

__all__ = ["product_reference", "row_mean_reference"]
