"""Finding, checking, sampling and caching the data of a run."""
