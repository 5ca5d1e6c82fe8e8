"""The server: HTTP front (api), generation (engine) and the embedded demo."""
