"""Documents into prompts, and citations out of answers."""
