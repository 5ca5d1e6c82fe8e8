"""What clients send and get, as pydantic models: one module per resource."""
