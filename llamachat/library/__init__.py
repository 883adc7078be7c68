"""Models by name: what exists (`catalog`), what is on disk (`store`), how to fetch it (`hub`)."""
