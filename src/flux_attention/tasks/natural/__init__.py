"""Makes questions in natural language about local prose, documentation and code, one file a kind of material."""
