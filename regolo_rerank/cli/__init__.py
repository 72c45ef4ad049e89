"""The command line `regolo-rerank`, which needs the extra `[cli]`."""
