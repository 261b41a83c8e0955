"""The web pages: a page a file, put together by `site`. They need the extra `web`."""
