"""Generation: request -> schedule -> run -> sample -> output."""
