"""Many engines as one: placement, the token channel, admission, and the flight of each request."""
