"""The HTTP front: one module per resource."""
