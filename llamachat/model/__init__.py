"""The decoder, written once, and its rotary angles."""
