"""Who may ask, how much, and in what order: API keys, their limits, and fair shares of scarce engines."""
