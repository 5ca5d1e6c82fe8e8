"""`model: "auto"`: what the server knows of its adapters, and how a query is turned into a choice among them."""
