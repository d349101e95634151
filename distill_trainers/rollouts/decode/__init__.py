"""The decode loop: one forward a token, rows that have ended leave it."""
