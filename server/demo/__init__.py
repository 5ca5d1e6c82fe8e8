"""The embedded demo: a small base model, LoRA adapters of one skill each, and the script that trains them."""
