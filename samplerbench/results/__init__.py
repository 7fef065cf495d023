"""Results: the store, the typed record, groups of one protocol, comparisons and pairs."""
