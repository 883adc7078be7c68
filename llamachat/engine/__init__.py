"""Ids in, ids out: the engine, its cache rows, and how the next token is chosen."""
