"""The page at `/`: plain files, and the small app that serves them. What it shows comes from the public API."""
