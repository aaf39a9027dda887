"""Drawing samples, features, Frechet distance, and the report."""
