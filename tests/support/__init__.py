"""What several test packages share: tiny random models, adapters as PEFT writes them, an engine to run them."""
