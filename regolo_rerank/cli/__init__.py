"""The command line `regolo-rerank`; the extra `[cli]` installs it."""
