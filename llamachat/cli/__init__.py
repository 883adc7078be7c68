"""Commands: an annotated function each that parses, calls and hands over. No logic."""
